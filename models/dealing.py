"""Deal the timesteps of an expert-parallel group to its ranks, so that fewer samples travel.

An image and the timestep at which it is trained are independent draws, so ranks may exchange
timesteps. A sample whose timestep is dealt to the rank that holds most of its experts travels less.
Every rank keeps its number of samples, and the group keeps its timesteps.

L blocks, E experts, S diffusion timesteps, R ranks of a group, N samples per rank, G = R * N.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from models.placement import IntArray

DEALINGS = ("position", "affine")


def served_at_home(
    gate_table: Tensor, top_k: int, slot_of_expert: Tensor, num_ranks: int
) -> Tensor:
    """Count the blocks in which a rank holds one of a timestep's experts, (S, R) int64.

    In each of these blocks a sample saves one copy if it belongs to the rank.

    Args:
        gate_table: (L, S, E) gate values; a 0/1 table with K ones per row states the choice itself.
        top_k: K.
        slot_of_expert: (L, E) int64 placement, on the device of gate_table.
        num_ranks: R.
    """
    L, S, num_experts = gate_table.shape
    chosen = gate_table.topk(top_k, dim=-1).indices  # (L, S, K)
    slot = slot_of_expert.gather(1, chosen.flatten(1)).view_as(chosen)
    serves = torch.zeros(L, S, num_ranks, dtype=torch.int64, device=gate_table.device)
    return serves.scatter_(-1, slot // (num_experts // num_ranks), 1).sum(0)


def deal(group_t: IntArray, at_home: IntArray) -> IntArray:
    """Exchange timesteps among ranks so that the fewest copies travel.

    A pure function of integers: all ranks of a group compute the same result. Ties go by place.

    Args:
        group_t: (G,) int64 timesteps in rank order, N per rank.
        at_home: (S, R) int64 from `served_at_home`. Counts from older gates save fewer copies and
            are not wrong.

    Returns:
        (G,) the same timesteps in another order.
    """
    num_ranks = at_home.shape[1]
    N = len(group_t) // num_ranks
    assert N * num_ranks == len(group_t), "ranks of a group need equal batches"
    benefit = at_home[group_t].repeat(N, axis=1)  # (G, G): sample, place
    sample, taken = linear_sum_assignment(benefit, maximize=True)
    # A rank's N places are equal, so the solver's order among them means nothing; keep the old one.
    return group_t[sample[np.argsort(taken // N, kind="stable")]]
