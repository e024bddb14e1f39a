"""Dealing timesteps: which rank of an expert-parallel group trains which of the group's timesteps.

What an image is and at which timestep it is trained are independent draws, so the timesteps of a
group's samples may be exchanged among its ranks. Given to the rank that holds most of its experts,
a sample travels less. Every rank keeps its number of samples, and the group its timesteps.

L blocks, E experts, S diffusion timesteps, R ranks of a group, N samples per rank, G = R * N.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment

from models.placement import BoolArray, IntArray, reached_ranks

DEALINGS = ("position", "affine")


def served_at_home(chosen: BoolArray, slot_of_expert: IntArray, num_ranks: int) -> IntArray:
    """Count the blocks in which a rank serves a timestep, (S, R).

    A sample of timestep t on rank r is copied to as many other ranks as serve t, less [t, r].

    Args:
        chosen: (L, S, E) which experts serve which timestep.
        slot_of_expert: (L, E) their placement.
        num_ranks: R.
    """
    return reached_ranks(chosen, slot_of_expert, num_ranks).sum(0)


def deal(group_t: IntArray, at_home: IntArray) -> IntArray:
    """Exchange timesteps among ranks so that the fewest copies travel.

    A pure function of whole numbers: all ranks of a group find the same. Ties are broken by place.

    Args:
        group_t: (G,) in rank order, N per rank.
        at_home: (S, R) from `served_at_home`.

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
