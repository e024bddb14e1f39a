"""Place experts: choose the rank of an expert-parallel group that holds each expert of a block.

A rank holds E / R experts of every block, in slots: slot s is place s % (E / R) of rank
s // (E / R). A placement gives each expert of every block a slot. It changes traffic and load, but
no result. It matters because the prior gives experts different loads on purpose (prior.py).

    contiguous  expert e in slot e: neighbours share a rank
    strided     expert e on rank e % R: neighbours never share one
    balanced    per block the least load on the worst rank, then the least traffic, by the gates

The load of a rank is the number of pairs of a sample and an expert that it serves. The traffic of a
block is the number of ranks that serve a sample. Both are weighted by how often a timestep is
drawn. All are integers, so no result depends on the order of a sum.

L blocks, E experts, K experts per sample, S diffusion timesteps, R ranks of an expert-parallel
group, P timesteps that differ in their experts.
"""

import itertools
import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

PLACEMENTS = ("contiguous", "strided", "balanced")

# If there are at most this many ways to share out the experts of a block, all are tried: 8 experts
# on 4 ranks have 105 ways, 12 on 3 have 5,775, 16 on 4 have 2.6 million.
MAX_PARTITIONS = 6_000
ALIGNING_SWEEPS = 3

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


def contiguous_slots(depth: int, num_experts: int) -> IntArray:
    """Return the slot of every expert, (L, E), when they are in order."""
    return np.tile(np.arange(num_experts), (depth, 1))


def place(
    kind: str, chosen: BoolArray, timestep_weight: IntArray, num_ranks: int, *, exact: bool = True
) -> IntArray:
    """Return the slot of every expert, (L, E).

    Args:
        kind: one of PLACEMENTS.
        chosen: (L, S, E) which experts serve which timestep.
        timestep_weight: (S,) how often each timestep is drawn, in any unit.
        num_ranks: R.
        exact: let balanced try every way where there are few; False = always search.
    """
    assert kind in PLACEMENTS, f"unknown placement {kind}"
    depth, _, num_experts = chosen.shape
    assert num_experts % num_ranks == 0, "experts must divide evenly over ranks"
    if kind == "contiguous":
        return contiguous_slots(depth, num_experts)
    if kind == "strided":
        return _slots(np.tile(np.arange(num_experts) % num_ranks, (depth, 1)))
    is_few = exact and num_partitions(num_experts, num_ranks) <= MAX_PARTITIONS
    share_out = _best_partition if is_few else _searched_partition
    ranks = [share_out(*_distinct(uses, timestep_weight), num_ranks) for uses in chosen]
    return _slots(_align(np.stack(ranks), chosen, timestep_weight, num_ranks))


def chosen_experts(gate_table: Tensor, top_k: int) -> BoolArray:
    """Return which experts serve which timestep, (L, S, E), from the gate table (L, S, E)."""
    chosen = torch.zeros(gate_table.shape, dtype=torch.bool)
    return chosen.scatter_(-1, gate_table.cpu().topk(top_k, dim=-1).indices, True).numpy()


def rank_of_expert(slot_of_expert: IntArray, num_ranks: int) -> IntArray:
    """Return the rank of every expert, (L, E)."""
    return slot_of_expert // (slot_of_expert.shape[1] // num_ranks)


def reached_ranks(chosen: BoolArray, slot_of_expert: IntArray, num_ranks: int) -> BoolArray:
    """Return which ranks serve which timestep in each block, (L, S, R)."""
    is_held = rank_of_expert(slot_of_expert, num_ranks)[:, :, None] == np.arange(num_ranks)
    return np.matmul(chosen.astype(np.float32), is_held.astype(np.float32)) > 0


def rank_loads(
    chosen: BoolArray, timestep_weight: IntArray, slot_of_expert: IntArray, num_ranks: int
) -> IntArray:
    """Return the load of every rank in each block, (L, R)."""
    ranks = rank_of_expert(slot_of_expert, num_ranks)
    loads = np.zeros((len(ranks), num_ranks), np.int64)
    for of_block, rank, uses in zip(loads, ranks, chosen, strict=True):
        np.add.at(of_block, rank, timestep_weight @ uses)
    return loads


def worst_over_mean(loads: IntArray) -> float:
    """Return the load of the worst rank over the mean rank's, the mean over blocks of (L, R)."""
    return float((loads.max(1) / loads.mean(1)).mean())


def num_partitions(num_experts: int, num_ranks: int) -> int:
    """Count the ways to put experts into equal groups, whichever rank has which group."""
    size = num_experts // num_ranks
    ways = math.factorial(num_experts) // math.factorial(size) ** num_ranks
    return ways // math.factorial(num_ranks)


@lru_cache(maxsize=4)
def _partitions(num_experts: int, num_ranks: int) -> tuple[IntArray, IntArray]:
    """List all ways to put experts into equal groups.

    Returns:
        The groups (number of them, E / R) of ascending experts, and the R groups of each way,
        (ways, R).
    """
    size = num_experts // num_ranks
    groups = list(itertools.combinations(range(num_experts), size))
    number = {group: i for i, group in enumerate(groups)}

    def ways(left: tuple[int, ...]) -> list[list[int]]:
        if not left:
            return [[]]
        first, *others = left
        found = []
        for rest in itertools.combinations(others, size - 1):
            remaining = tuple(expert for expert in others if expert not in rest)
            group = number[(first, *rest)]
            found += [[group, *way] for way in ways(remaining)]
        return found

    return np.array(groups), np.array(ways(tuple(range(num_experts))))


def _distinct(uses: BoolArray, weight: IntArray) -> tuple[BoolArray, IntArray]:
    """Count timesteps with the same experts as one: gates are smooth, so there are few kinds.

    Args:
        uses: (S, E) of one block.
        weight: (S,).

    Returns:
        (P, E) and (P,).
    """
    kinds, kind = np.unique(uses, axis=0, return_inverse=True)
    total = np.zeros(len(kinds), np.int64)
    np.add.at(total, kind.ravel(), weight)
    return kinds, total


def _best_partition(uses: BoolArray, weight: IntArray, num_ranks: int) -> IntArray:
    """Try all ways to share out a block's experts; return the rank of each, (E,).

    Args:
        uses: (P, E).
        weight: (P,).
        num_ranks: R.
    """
    groups, ways = _partitions(uses.shape[1], num_ranks)
    load = (weight @ uses)[groups].sum(1)
    reach = np.array([weight @ uses[:, group].any(1) for group in groups])
    best = np.lexsort((reach[ways].sum(1), load[ways].max(1)))[0]
    ranks = np.empty(uses.shape[1], np.int64)
    for rank, group in enumerate(ways[best]):
        ranks[groups[group]] = rank
    return ranks


def _searched_partition(uses: BoolArray, weight: IntArray, num_ranks: int) -> IntArray:
    """Share out many experts: the heaviest first to the lightest rank, then better by swaps.

    The arguments and the result are those of `_best_partition`.
    """
    loads = weight @ uses  # of experts, (E,)
    num_experts = len(loads)
    ranks, room = np.empty(num_experts, np.int64), np.full(num_ranks, num_experts // num_ranks)
    of_rank = np.zeros(num_ranks, np.int64)
    for expert in np.argsort(-loads, kind="stable"):
        free = np.flatnonzero(room)
        rank = free[of_rank[free].argmin()]
        ranks[expert] = rank
        of_rank[rank] += loads[expert]
        room[rank] -= 1
    while _swap_for_load(ranks, of_rank, loads):
        pass
    while _swap_for_traffic(ranks, of_rank, loads, uses, weight):
        pass
    return ranks


def _swap(ranks: IntArray, of_rank: IntArray, loads: IntArray, one: int, other: int) -> None:
    difference = loads[other] - loads[one]
    of_rank[ranks[one]] += difference
    of_rank[ranks[other]] -= difference
    ranks[[one, other]] = ranks[[other, one]]


def _swap_for_load(ranks: IntArray, of_rank: IntArray, loads: IntArray) -> bool:
    """Exchange two experts so that a worst rank gets better and the other not as bad."""
    worst = of_rank.argmax()
    mine, others = np.flatnonzero(ranks == worst), np.flatnonzero(ranks != worst)
    difference = loads[others] - loads[mine][:, None]
    after = np.maximum(of_rank[worst] + difference, of_rank[ranks[others]] - difference)
    best = np.unravel_index(after.argmin(), after.shape)
    if after[best] >= of_rank[worst]:
        return False
    _swap(ranks, of_rank, loads, mine[best[0]], others[best[1]])
    return True


def _swap_for_traffic(
    ranks: IntArray, of_rank: IntArray, loads: IntArray, uses: BoolArray, weight: IntArray
) -> bool:
    """Exchange the two experts that save most traffic without making the worst rank worse."""
    worst, num_ranks = of_rank.max(), len(of_rank)
    is_held = ranks[:, None] == np.arange(num_ranks)  # (E, R)
    # In float64, which is exact up to 2^53: numpy multiplies matrices of integers slowly.
    used, weight = uses.astype(np.float64), weight.astype(np.float64)
    count = used @ is_held  # (P, R) experts of each rank
    reach = weight @ (count > 0)  # (R,)
    best, saving = None, 0.0
    for one in range(len(ranks)):
        others = np.flatnonzero(ranks > ranks[one])
        if not len(others):
            continue
        mine, theirs = ranks[one], ranks[others]
        difference = loads[others] - loads[one]
        fits = np.maximum(of_rank[mine] + difference, of_rank[theirs] - difference) <= worst
        change = used[:, others] - used[:, [one]]  # (P, others)
        after = weight @ (count[:, [mine]] + change > 0) + weight @ (count[:, theirs] - change > 0)
        saved = np.where(fits, reach[mine] + reach[theirs] - after, 0)
        if saved.max() > saving:
            saving, best = saved.max(), (one, others[saved.argmax()])
    if best is None:
        return False
    _swap(ranks, of_rank, loads, *best)
    return True


def _align(ranks: IntArray, uses: BoolArray, weight: IntArray, num_ranks: int) -> IntArray:
    """Number the ranks of every block so that a timestep is served by the same ones throughout.

    Which group of experts is on which rank changes neither load nor traffic of random timesteps,
    but a sample that is dealt to the rank that serves it most often (dealing.py) travels less. Each
    block in turn is matched to all others, from the first on, more than once.

    Args:
        ranks: (L, E).
        uses: (L, S, E).
        weight: (S,).
        num_ranks: R.
    """
    reached = [
        uses_of.astype(np.int64) @ (rank[:, None] == np.arange(num_ranks)) > 0
        for uses_of, rank in zip(uses, ranks, strict=True)
    ]
    label = np.tile(np.arange(num_ranks), (len(ranks), 1))  # of every block's groups
    total = np.zeros(reached[0].shape, np.int64)  # (S, R) blocks in which a rank serves
    for sweep in range(ALIGNING_SWEEPS):
        for block, reach in enumerate(reached):
            if sweep:
                total[:, label[block]] -= reach
            gain = (reach * weight[:, None]).T @ total  # (group, rank)
            label[block] = linear_sum_assignment(gain, maximize=True)[1]
            total[:, label[block]] += reach
    return np.take_along_axis(label, ranks, axis=1)


def _slots(ranks: IntArray) -> IntArray:
    """Give the experts of each rank its slots in ascending order: (L, E) ranks to slots."""
    return np.argsort(np.argsort(ranks, axis=1, kind="stable"), axis=1)
