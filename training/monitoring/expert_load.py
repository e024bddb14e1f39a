"""Describe what experts did, from the counts of an interval: balance, idle ones, traffic.

L blocks, E experts, B timestep buckets, R ranks of an expert-parallel group, T tokens, D width.
"""

import math
from collections.abc import Iterable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.gate import RoutingPlan

STARVED_FRACTION = 0.1  # of the even share; the paper's prior with 8 experts goes down to 0.18
DEAD_INTERVALS = 10  # logging intervals without a sample
_LOAD_PREFIX = "moe_load/"


def load_metrics(expert_count: Tensor, num_samples: float) -> dict[str, float]:
    """Describe how samples spread over experts.

    Args:
        expert_count: (L, E) samples routed to each expert, summed over ranks.
        num_samples: samples seen; every sample meets K experts in every block.

    Returns:
        Per expert the fraction of samples it received (rows sum to K); per block the entropy of
        the loads relative to its maximum (1 = even, 0 = one expert takes all) and max/mean; and
        the means of both over blocks, plus the numbers of experts that received nothing and of
        those whose share is below STARVED_FRACTION of the even one, the former included.
    """
    depth, num_experts = expert_count.shape
    load = expert_count / num_samples  # (L, E)
    share = expert_count / expert_count.sum(dim=1, keepdim=True)  # (L, E)
    entropy = relative_entropy(expert_count)  # (L,)
    max_over_mean = share.amax(dim=1) * num_experts  # (L,)
    metrics = {
        "moe/load_entropy": float(entropy.mean()),
        "moe/load_max_over_mean": float(max_over_mean.mean()),
        "moe/idle_experts": float((expert_count == 0).sum()),
        "moe/starved_experts": float((share * num_experts < STARVED_FRACTION).sum()),
    }
    for block in range(depth):
        metrics[f"moe_entropy/block_{block:02d}"] = float(entropy[block])
        metrics[f"moe_max_over_mean/block_{block:02d}"] = float(max_over_mean[block])
        for expert in range(num_experts):
            metrics[load_tag(block, expert)] = float(load[block, expert])
    return metrics


def load_tag(block: int, expert: int) -> str:
    """Name the fraction of samples that an expert received."""
    return f"{_LOAD_PREFIX}block_{block:02d}/expert_{expert}"


def by_block(metrics: dict[str, float]) -> dict[str, list[float]]:
    """Collect the loads of `load_metrics` by the part of their names that tells the block."""
    loads: dict[str, list[float]] = {}
    for name, value in metrics.items():
        if name.startswith(_LOAD_PREFIX):
            loads.setdefault(name.rpartition("/")[0], []).append(value)
    return loads


def relative_entropy(counts: Tensor) -> Tensor:
    """Return the entropy of counts over their last dimension, 1 = even, 0 = all in one place.

    A single place is even by definition; nothing at all gives NaN.
    """
    num_places = counts.shape[-1]
    share = counts / counts.sum(dim=-1, keepdim=True)
    entropy = -torch.special.xlogy(share, share).sum(dim=-1)
    return entropy / math.log(num_places) if num_places > 1 else torch.ones_like(entropy)


def entropy_by_timestep(expert_count: Tensor, ranges: list[str]) -> dict[str, float]:
    """Say how evenly each range of timesteps uses the experts, as the mean over blocks.

    Args:
        expert_count: (L, E, B); a range that drew no sample is left out.
        ranges: the names of the B ranges.
    """
    entropy = relative_entropy(expert_count.transpose(1, 2)).mean(dim=0)  # (B,)
    return {
        f"moe_entropy_by_timestep/{name}": float(value)
        for name, value, count in zip(ranges, entropy, expert_count.sum(dim=(0, 1)), strict=True)
        if count > 0
    }


class ExchangeShape(NamedTuple):
    """What expert parallelism sends for one sample of one block."""

    group_rank: int  # this rank's place in its expert-parallel group
    group_size: int  # R
    row_bytes: int  # of a sample's activations, T * D numbers
    num_passes: int  # forward and backward; what is recomputed travels again


def exchange_shape(model: Any, rank: int, group_size: int, precision: str) -> ExchangeShape | None:
    """Describe a model's exchanges; None without expert parallelism.

    Args:
        model: a SwitchDiT.
        group_size: R.
        precision: "bf16", "autocast" or "fp32"; autocast's products, and with them the stream
            between blocks, are bf16.
    """
    if group_size == 1:
        return None
    number_bytes = 4 if precision == "fp32" else 2
    num_passes = 3 if model.options.activation_checkpointing else 2
    row_bytes = model.pos_embed.numel() * number_bytes  # (T, D)
    return ExchangeShape(rank % group_size, group_size, row_bytes, num_passes)


def add_exchanges(sums: Tensor, plan: RoutingPlan, num_samples: int, shape: ExchangeShape) -> None:
    """Count the rows that this rank sends to each rank of its group, from a plan's split sizes.

    They are numbers of the host already, so nothing here touches the device.

    Args:
        sums: (L * R + 2,), added to: rows by block and rank, rows that stay, samples.
    """
    rows = [dispatch.send_splits for dispatch in plan.dispatch]  # (L, R)
    num_kept = sum(of_block[shape.group_rank] for of_block in rows)
    sums += torch.tensor([*chain.from_iterable(rows), num_kept, num_samples])


def exchange_metrics(
    sums: Tensor, shape: ExchangeShape, num_steps: int, world_size: int
) -> dict[str, float]:
    """Describe an interval's exchanges.

    Args:
        sums: of `add_exchanges`, summed over ranks.

    Returns:
        MiB that a rank sends to others per step (mean over ranks; every row there and its sum
        back, in every pass), other ranks that a sample travels to per block, and the rows that
        the busiest place of a group receives relative to the mean: the mean over blocks and the
        worst block. They are those of the interval's sums, so a place that is the busiest in every
        step shows, and chance does not.
    """
    rows, (kept, num_samples) = sums[:-2].view(-1, shape.group_size), sums[-2:].tolist()
    moved = float(rows.sum()) - kept
    sent_bytes = 2 * moved * shape.row_bytes * shape.num_passes
    max_over_mean = rows.amax(dim=1) / rows.mean(dim=1)  # (L,)
    return {
        "comm/mib_sent_per_step": sent_bytes / world_size / num_steps / 2**20,
        "comm/copies_per_sample": moved / (num_samples * len(rows)),
        "comm/rank_load_max_over_mean": float(max_over_mean.mean()),
        "comm/rank_load_max_over_mean_worst_block": float(max_over_mean.max()),
    }


class LoadHistory:
    """Which experts have been without samples for long, and who served which timesteps lately.

    Args:
        num_experts: E; 0 = a model without experts.
        records: of the metrics of earlier intervals, of a run that is continued.
    """

    def __init__(
        self, depth: int, num_experts: int, records: Iterable[dict[str, Any]] = ()
    ) -> None:
        self._shape = depth, num_experts
        self._num_idle = torch.zeros(depth, num_experts, dtype=torch.int64)  # intervals in a row
        self._is_seen = torch.zeros(depth, num_experts, dtype=torch.bool)
        self._since_picture: Tensor | None = None
        self._steps: list[int] = []
        self._loads: list[Tensor] = []
        tags = [[load_tag(block, e) for e in range(num_experts)] for block in range(depth)]
        for record in records:
            if num_experts and tags[0][0] in record:
                load = torch.tensor([[record[tag] for tag in row] for row in tags])
                self._follow(record["step"], load)

    def _follow(self, step: int, load: Tensor) -> None:
        self._steps.append(step)
        self._loads.append(load.float())
        self._is_seen |= load > 0
        self._num_idle = torch.where(load > 0, 0, self._num_idle + 1)

    def add(self, step: int, expert_count: Tensor | None) -> tuple[dict[str, float], str]:
        """Add the counts (L, E, B) of an interval that ended with a step; None if nothing counted.

        Returns:
            The numbers of experts that never had a sample and of those without one in the last
            DEAD_INTERVALS intervals; and, for those that became so just now, who they are.
        """
        if expert_count is None:
            return {}, ""
        self._follow(step, expert_count.sum(dim=2))
        earlier = 0 if self._since_picture is None else self._since_picture
        self._since_picture = earlier + expert_count
        metrics = {
            "moe/never_used_experts": float((~self._is_seen).sum()),
            "moe/dead_experts": float((self._num_idle >= DEAD_INTERVALS).sum()),
        }
        return metrics, _names(self._num_idle == DEAD_INTERVALS)

    def over_time(self) -> tuple[list[int], Tensor]:
        """Return the steps at which intervals ended, and (intervals, L, E) samples or shares."""
        loads = torch.stack(self._loads) if self._loads else torch.zeros(0, *self._shape)
        return self._steps, loads

    def take_counts(self) -> Tensor | None:
        """Return the counts (L, E, B) since the last call, or None, and begin anew."""
        counts, self._since_picture = self._since_picture, None
        return counts


class GateDrift:
    """How far the gates of the timesteps move from one logging interval to the next."""

    def __init__(self) -> None:
        self._before: Tensor | None = None

    def add(self, gates: Tensor) -> float | None:
        """Return the distance from the gates (L, S, E) of the call before; None the first time.

        It is the total variation distance, half the sum of absolute differences over experts, as
        the mean over blocks and timesteps: 0 = unmoved, 1 = everything went to other experts.
        """
        gates, before = gates.detach().float().clone(), self._before
        self._before = gates
        return None if before is None else float((gates - before).abs().sum(dim=2).mean() / 2)


def _names(flags: Tensor) -> str:
    """List the experts whose flag (L, E) is set; empty if there is none."""
    return "; ".join(
        f"block {block}: {', '.join(map(str, row.nonzero()[:, 0].tolist()))}"
        for block, row in enumerate(flags)
        if row.any()
    )
