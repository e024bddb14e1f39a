"""Timestep gate and routing plan: which experts denoise which noise level.

The gate of block i is softmax(Linear_i(SiLU(t_emb))); the k largest values are kept without
renormalising (Switch-DiT, arXiv 2403.09176). It sees only the timestep, so the gates of all blocks
for all timesteps are one small table, and the routing of a step is known before its first block.

N batch, D width, L blocks, E experts, K experts per sample, S diffusion timesteps, R ranks of an
expert-parallel group, G = R * N samples of the group.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dispatch(NamedTuple):
    """What one block exchanges within an expert-parallel group, seen from one rank.

    A sample is sent once to every rank that holds one of its experts. Rows are grouped by the
    other rank, in rank order, and ascend within a group, on both sides.
    """

    send_rows: Tensor  # own samples to send, (sum of send_splits,) int64 in [0, N)
    send_splits: list[int]  # how many go to each rank
    recv_rows: Tensor  # samples that arrive, (sum of recv_splits,) int64 in [0, G)
    recv_splits: list[int]  # how many come from each rank


class BlockPlan(NamedTuple):
    """One block's share of a RoutingPlan."""

    expert_weight: Tensor  # (N, E), or (G, E) under expert parallelism
    dispatch: Dispatch | None


class RoutingPlan(NamedTuple):
    """All routing of one forward pass, for every block.

    Attributes:
        expert_weight: (L, N, E) float32, the gate values; zero outside the top k. Under expert
            parallelism (L, G, E): the rows of the whole group.
        expert_index: (L, N, K) int64, the experts of this rank's own samples.
        dispatch: what every block exchanges; empty without expert parallelism.
    """

    expert_weight: Tensor
    expert_index: Tensor
    dispatch: list[Dispatch]

    def blocks(self) -> list[BlockPlan]:
        """Split the plan by block."""
        weights = self.expert_weight.unbind(0)
        dispatches = self.dispatch or [None] * len(weights)
        return [BlockPlan(w, d) for w, d in zip(weights, dispatches, strict=True)]


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
) -> RoutingPlan:
    """Route samples by their timesteps.

    No communication: every rank of a group computes the routing of all of it. With group_size > 1
    it waits for the device once, to learn the sizes of what is exchanged.

    Args:
        gate_table: (L, S, E) float32; gradients flow into it through the gate values.
        t: (N,) int64 timesteps of this rank's samples.
        top_k: K.
        group_t: (G,) timesteps of the expert-parallel group, in rank order, N per rank.
        group_rank: this rank's place in the group; it owns experts
            [group_rank * E / R, (group_rank + 1) * E / R).
        group_size: R.
    """
    if group_size == 1:
        expert_weight, expert_index = _top_k_weights(gate_table[:, t], top_k)
        return RoutingPlan(expert_weight, expert_index, [])
    assert group_t is not None, "expert parallelism needs the timesteps of the whole group"
    num_local = t.shape[0]
    assert group_t.shape[0] == group_size * num_local, "ranks of a group need equal batches"
    expert_weight, expert_index = _top_k_weights(gate_table[:, group_t], top_k)
    own = slice(group_rank * num_local, (group_rank + 1) * num_local)
    dispatch = _plan_dispatch(expert_index, gate_table.shape[-1], group_rank, group_size)
    return RoutingPlan(expert_weight, expert_index[:, own], dispatch)


def _top_k_weights(probs: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Keep the k largest of (L, N, E); return them in place, and their indices (L, N, K)."""
    values, expert_index = probs.topk(top_k, dim=-1)
    return torch.zeros_like(probs).scatter(-1, expert_index, values), expert_index


def _plan_dispatch(
    expert_index: Tensor, num_experts: int, group_rank: int, group_size: int
) -> list[Dispatch]:
    """Find for every block the rows that this rank sends and receives.

    Args:
        expert_index: (L, G, K) of the whole group.
    """
    L, G, _ = expert_index.shape
    N = G // group_size
    owner = expert_index // (num_experts // group_size)  # (L, G, K) rank that holds the expert
    is_sent = torch.zeros(L, G, group_size, dtype=torch.bool, device=owner.device)
    is_sent.scatter_(-1, owner, True)
    is_sent = is_sent.view(L, group_size, N, group_size)  # by source, sample, destination
    sends = is_sent[:, group_rank].transpose(1, 2)  # (L, destination, N)
    receives = is_sent[..., group_rank]  # (L, source, N)
    # The only wait for the device; everything below is slicing by numbers known to the host.
    counts = torch.stack((sends.sum(-1), receives.sum(-1))).tolist()
    # A stable sort puts the rows to exchange first, without the wait that nonzero() would cost.
    send_order = sends.flatten(1).to(torch.int8).argsort(dim=1, descending=True, stable=True) % N
    recv_order = receives.flatten(1).to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return [
        Dispatch(send_order[i, : sum(send)], send, recv_order[i, : sum(recv)], recv)
        for i, (send, recv) in enumerate(zip(*counts, strict=True))
    ]
