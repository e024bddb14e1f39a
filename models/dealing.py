"""Dealing timesteps: which rank of an expert-parallel group trains which of the group's timesteps.

What an image is and at which timestep it is trained are independent draws, so the timesteps of a
group's samples may be exchanged among its ranks. Given to the rank that holds most of its experts,
a sample travels less. Every rank keeps its number of samples, and the group its timesteps.

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
    """Count the blocks in which a rank serves a timestep, (S, R) int64.

    In these a sample of the timestep need not be copied to the rank, if the rank is its own.

    Args:
        gate_table: (L, S, E); with 0/1 entries, K of them 1, it is the choice itself.
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

    A pure function of whole numbers: all ranks of a group find the same. Ties are broken by place.

    Args:
        group_t: (G,) in rank order, N per rank.
        at_home: (S, R) from `served_at_home`; of older gates it deals less well, not wrongly.

    Returns:
        (G,) the same timesteps in another order.
    """
    num_ranks = at_home.shape[1]
    N = len(group_t) // num_ranks
    assert N * num_ranks == len(group_t), "ranks of a group need equal batches"
    benefit = at_home[group_t].repeat(N, axis=1)  # (G, G): sample, place
    sample, taken = linear_sum_assignment(benefit, maximize=True)
    # A rank's samples in the order that they had, whatever the solver made of its N equal places.
    return group_t[sample[np.argsort(taken // N, kind="stable")]]
