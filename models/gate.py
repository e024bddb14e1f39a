"""Timestep gate and routing plan: which experts denoise which noise level.

The gate of block i is softmax(Linear_i(SiLU(t_emb))) (Switch-DiT, arXiv 2403.09176). The k largest
values are kept; they are divided by their sum only if asked. The gate sees the timestep alone, so
the gates of all blocks for all timesteps are one small table, and the routing of a step is known
before its first block runs.

N batch, D width, L blocks, E experts, K experts per sample, S diffusion timesteps, R ranks of an
expert-parallel group, G = R * N samples of the group, P pairs of a sample and one of its experts.
"""

import enum
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ExpertProduct(enum.Enum):
    """How experts multiply, and so what a plan must hold."""

    MERGED = "one matrix per sample: the gate values alone"
    GROUPED = "samples grouped by expert, one grouped product"
    LOOP = "samples grouped by expert, one product after the other: their numbers on the host"


class Dispatch(NamedTuple):
    """What one block exchanges within an expert-parallel group, seen from one rank.

    A sample is sent once to every rank that holds one of its experts. Sender and receiver order
    rows alike: by the other rank, and ascending for each of these.
    """

    send_rows: Tensor  # own samples to send, (sum of send_splits,) int64 in [0, N)
    send_splits: list[int]  # how many go to each rank
    recv_rows: Tensor  # samples that arrive, (sum of recv_splits,) int64 in [0, G)
    recv_splits: list[int]  # how many come from each rank


class ExpertRows(NamedTuple):
    """The samples of one block grouped by expert, for experts that are not merged.

    A sample appears once for each of its experts on this rank.
    """

    samples: Tensor  # (P,) int64 rows of the block's input, ascending within an expert
    experts: Tensor  # (P,) int64 ascending, counted from this rank's first
    ends: Tensor  # (experts,) int32, where each expert's rows end
    counts: Tensor | None  # (experts,) int64 on the host; None where only a loop would need it


class BlockPlan(NamedTuple):
    """One block's share of a RoutingPlan."""

    # (N, E); (1, E) serves all samples; (G, E), experts by slot, under expert parallelism
    expert_weight: Tensor
    dispatch: Dispatch | None = None
    rows: ExpertRows | None = None  # None = experts are merged


class RoutingPlan(NamedTuple):
    """All routing of one forward pass, for every block.

    Attributes:
        expert_weight: (L, N, E) float32, the gate values; zero outside the top k. Under expert
            parallelism (L, G, E): the rows of the whole group, with experts in the order of their
            slots (placement.py), so that a rank's are E / R neighbours.
        expert_index: (L, N, K) int64, the experts of this rank's own samples, by their own numbers.
        dispatch: what every block exchanges; empty without expert parallelism.
        rows: every block's samples by expert; empty if experts are merged. Under expert
            parallelism, of the samples that arrive.
    """

    expert_weight: Tensor
    expert_index: Tensor
    dispatch: Sequence[Dispatch]
    rows: Sequence[ExpertRows] = ()

    def blocks(self) -> list[BlockPlan]:
        """Split the plan by block."""
        weights = self.expert_weight.unbind(0)
        nothing = [None] * len(weights)
        parts = zip(weights, self.dispatch or nothing, self.rows or nothing, strict=True)
        return [BlockPlan(*part) for part in parts]


class TimestepGate(nn.Module):
    """The gates of all blocks as one stacked linear layer, computed in float32."""

    def __init__(self, depth: int, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(depth, num_experts, hidden_size))
        self.bias = nn.Parameter(torch.zeros(depth, num_experts))
        for weight in self.weight:
            nn.init.xavier_uniform_(weight)

    def forward(self, t_emb: Tensor) -> Tensor:
        """Return the gate table (L, S, E) float32 for timestep embeddings (S, D)."""
        # Float32 whatever the parameters' dtype: ties must not flip between ranks.
        with torch.autocast(t_emb.device.type, enabled=False):
            logits = F.linear(
                F.silu(t_emb.float()),
                self.weight.float().flatten(0, 1),
                self.bias.float().flatten(),
            )  # (S, L * E)
            return logits.unflatten(1, self.bias.shape).transpose(0, 1).softmax(dim=-1)


def build_plan(
    gate_table: Tensor,
    t: Tensor,
    top_k: int,
    group_t: Tensor | None = None,
    group_rank: int = 0,
    group_size: int = 1,
    *,
    slot_of_expert: Tensor | None = None,
    renormalize: bool = False,
    product: ExpertProduct = ExpertProduct.MERGED,
) -> RoutingPlan:
    """Route samples by their timesteps.

    Nothing is communicated: every rank of a group computes the routing of the whole group. The host
    waits for the device at most once, for the numbers that it needs: the sizes of what is exchanged
    with group_size > 1, the samples of each expert if experts multiply one after the other.

    Args:
        gate_table: (L, S, E) float32; gradients flow into it through the gate values.
        t: (N,) int64 timesteps of this rank's samples.
        top_k: K.
        group_t: (G,) timesteps of the expert-parallel group, in rank order, N per rank.
        group_rank: this rank's place in the group; it owns slots
            [group_rank * E / R, (group_rank + 1) * E / R).
        group_size: R.
        slot_of_expert: (L, E) int64, the experts' slots in each block; None = expert e in slot e.
            Without sharing it has no effect.
        renormalize: divide the k values by their sum.
        product: how the experts multiply.
    """
    num_experts, N = gate_table.shape[-1], t.shape[0]
    if group_size == 1:
        expert_weight, expert_index = _top_k_weights(gate_table[:, t], top_k, renormalize)
        rows = _group_all_samples(expert_index, num_experts, product)
        return RoutingPlan(expert_weight, expert_index, [], rows)
    assert group_t is not None, "expert parallelism needs the timesteps of the whole group"
    assert group_t.shape[0] == group_size * N, "ranks of a group need equal batches"
    expert_weight, expert_index = _top_k_weights(gate_table[:, group_t], top_k, renormalize)
    own = slice(group_rank * N, (group_rank + 1) * N)
    slot_index = expert_index
    if slot_of_expert is not None:  # from here on an expert is known by its slot
        slot_index = slot_of_expert.gather(1, expert_index.flatten(1)).view_as(expert_index)
        expert_of_slot = slot_of_expert.argsort(1)[:, None].expand_as(expert_weight)
        expert_weight = expert_weight.gather(-1, expert_of_slot)
    dispatch, rows = _plan_dispatch(slot_index, num_experts, group_rank, group_size, product)
    return RoutingPlan(expert_weight, expert_index[:, own], dispatch, rows)


def _top_k_weights(probs: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Keep the k largest of (L, N, E); return them in place, and their indices (L, N, K)."""
    values, expert_index = probs.topk(top_k, dim=-1)
    if renormalize:
        values = values / values.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probs).scatter(-1, expert_index, values), expert_index


def _group_all_samples(
    expert_index: Tensor, num_experts: int, product: ExpertProduct
) -> list[ExpertRows]:
    """Group the samples of every block by expert on a rank that holds all experts."""
    if product is ExpertProduct.MERGED:
        return []
    L, N, K = expert_index.shape
    uses = _uses(expert_index, num_experts)
    row = torch.arange(N, device=uses.device).expand(L, N)
    counts = uses.sum(-1)  # (L, E)
    host_counts = counts.cpu() if product is ExpertProduct.LOOP else None
    return _expert_rows(uses, row, counts, host_counts, [N * K] * L)


def _plan_dispatch(
    slot_index: Tensor,
    num_experts: int,
    group_rank: int,
    group_size: int,
    product: ExpertProduct,
) -> tuple[list[Dispatch], list[ExpertRows]]:
    """Find for every block the rows that this rank sends and receives, and who multiplies them.

    Args:
        slot_index: (L, G, K) slots of the experts of the whole group's samples.
    """
    L, G, _ = slot_index.shape
    N, num_local = G // group_size, num_experts // group_size
    owner = slot_index // num_local  # (L, G, K) rank that holds the expert
    is_sent = torch.zeros(L, G, group_size, dtype=torch.bool, device=owner.device)
    is_sent.scatter_(-1, owner, True)
    is_sent = is_sent.view(L, group_size, N, group_size)  # by source, sample, destination
    sends = is_sent[:, group_rank].transpose(1, 2)  # (L, destination, N)
    receives = is_sent[..., group_rank]  # (L, source, N)
    own_slots = slice(group_rank * num_local, (group_rank + 1) * num_local)
    uses = _uses(slot_index, num_experts)[:, own_slots]  # (L, local experts, G)
    # The only wait for the device; everything below is slicing by numbers known to the host.
    host = torch.cat((sends.sum(-1), receives.sum(-1), uses.sum(-1)), dim=1).cpu()
    send_splits, recv_splits, counts = host.split([group_size, group_size, num_local], dim=1)
    # A stable sort puts the rows to exchange first, without the wait that nonzero() would cost.
    send_order = _true_first(sends.flatten(1)) % N
    recv_order = _true_first(receives.flatten(1))
    dispatch = [
        Dispatch(send_order[i, : sum(send)], send, recv_order[i, : sum(recv)], recv)
        for i, (send, recv) in enumerate(
            zip(send_splits.tolist(), recv_splits.tolist(), strict=True)
        )
    ]
    if product is ExpertProduct.MERGED:
        return dispatch, []
    arrival = receives.flatten(1).cumsum(1) - 1  # (L, G) place among the rows that arrive
    host_counts = counts if product is ExpertProduct.LOOP else None
    num_pairs = counts.sum(1).tolist()
    return dispatch, _expert_rows(uses, arrival, uses.sum(-1), host_counts, num_pairs)


def _uses(expert_index: Tensor, num_experts: int) -> Tensor:
    """Turn (L, N, K) indices into a map of which expert serves which sample, (L, E, N) bool."""
    L, N, _ = expert_index.shape
    uses = torch.zeros(L, N, num_experts, dtype=torch.bool, device=expert_index.device)
    return uses.scatter_(-1, expert_index, True).transpose(1, 2)


def _expert_rows(
    uses: Tensor,
    row: Tensor,
    counts: Tensor,
    host_counts: Tensor | None,
    num_pairs: list[int],
) -> list[ExpertRows]:
    """Group samples by expert, for every block.

    Args:
        uses: (L, E, N) bool, which expert serves which sample.
        row: (L, N) int64, where a sample is in the block's input.
        counts: (L, E) samples of each expert.
        host_counts: the same on the host, where they are needed.
        num_pairs: P of each block.
    """
    N = uses.shape[2]
    order = _true_first(uses.flatten(1))  # (L, E * N), by expert, then by sample
    samples, experts = row.gather(1, order % N), order // N
    ends = counts.cumsum(1).int()
    host = [None] * len(num_pairs) if host_counts is None else host_counts.unbind(0)
    return [
        ExpertRows(samples[i, :P], experts[i, :P], ends[i], host[i])
        for i, P in enumerate(num_pairs)
    ]


def _true_first(flags: Tensor) -> Tensor:
    """Return for each row of (L, X) bool the places of its true values in order, then the rest."""
    return flags.to(torch.int8).argsort(dim=1, descending=True, stable=True)
