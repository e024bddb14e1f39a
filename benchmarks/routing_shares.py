"""Count how much of a batch each rank of an expert-parallel group serves, from the routing plan.

The plan is that of models/gate.py for a gate that follows the diffusion prior, towards which
training pulls every gate.

N samples of a rank, L blocks, E experts, K experts per sample, S diffusion timesteps, U = L * E
units, R ranks of a group, G = R * N samples of a group.
"""

import dataclasses
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.dealing import deal, served_at_home
from models.gate import ExpertProduct, build_plan
from models.placement import chosen_experts, place
from models.prior import diffusion_prior
from models.switch_dit import MODEL_SIZES
from training.config.tree import Config
from training.engine.objective import build_timestep_sampling

NUM_SAMPLES = 4096  # of the timesteps' density, one from each of as many equal parts of it
DEALT_TOGETHER = 256  # samples of a group among which timesteps are dealt


class RoutingShares(NamedTuple):
    """Expected routing by block and rank, each (L, R).

    Attributes:
        arrivals: samples that use an expert of the rank, per sample of the group.
        uses: experts of the rank that are used, per sample of the group.
        sent: copies that the rank sends to others, per sample of its own.
        received: copies that it gets from others, per sample of its own.
    """

    arrivals: np.ndarray
    uses: np.ndarray
    sent: np.ndarray
    received: np.ndarray

    @property
    def group_size(self) -> int:
        """R."""
        return self.arrivals.shape[1]

    @property
    def copies(self) -> float:
        """Ranks other than its own that a sample is sent to, mean over samples and blocks."""
        return float(self.sent.mean())

    @property
    def imbalance(self) -> float:
        """Samples that the busiest rank serves over the mean, mean over blocks."""
        return float((self.arrivals.max(1) / self.arrivals.mean(1)).mean())


def unshared(depth: int, top_k: int) -> RoutingShares:
    """Return the shares of a rank that holds all experts."""
    ones, zeros = np.ones((depth, 1)), np.zeros((depth, 1))
    return RoutingShares(ones, top_k * ones, zeros, zeros)


def prior_gate_table(prior: Tensor, depth: int) -> Tensor:
    """Turn the prior's map (S, U) into the gates (L, S, E) of a network that follows it exactly.

    Block i plays units i, i + L, i + 2 L ...: every window of L K consecutive units then holds K
    units of each block, as top-k routing needs.
    """
    S, U = prior.shape
    table = prior.view(S, U // depth, depth).permute(2, 0, 1)  # (L, S, E)
    return table / table.sum(-1, keepdim=True)


def shares_of(gate_table: Tensor, t: Tensor, top_k: int, slots: Tensor, R: int) -> RoutingShares:
    """Count what the plans of all ranks of a group say about these timesteps.

    Args:
        gate_table: (L, S, E) float32.
        t: (G,) int64, in rank order.
        top_k: K.
        slots: (L, E) int64, where experts sit (models/placement.py).
        R: ranks of the group.
    """
    N = len(t) // R
    counts = np.zeros((4, len(gate_table), R))
    for rank in range(R):
        own = t[rank * N : (rank + 1) * N]
        plan = build_plan(
            gate_table,
            own,
            top_k,
            group_t=t,
            group_rank=rank,
            group_size=R,
            slot_of_expert=slots,
            product=ExpertProduct.LOOP,
        )
        for block, (dispatch, rows) in enumerate(zip(plan.dispatch, plan.rows, strict=True)):
            served, kept = sum(dispatch.recv_splits), dispatch.recv_splits[rank]
            sent = sum(dispatch.send_splits) - kept
            counts[:, block, rank] = served / R, int(rows.counts.sum()) / R, sent, served - kept
    return RoutingShares(*(counts / N))


def configured_shares(config: Config, gate_table: Tensor, R: int) -> RoutingShares:
    """Return the expected routing of gates, placed and dealt as configured.

    Args:
        config: with its density of timesteps, placement and dealing.
        gate_table: (L, S, E) float32.
        R: ranks of an expert-parallel group.
    """
    top_k, S = config.model.top_k, config.diffusion.num_timesteps
    t = spread_timesteps(config, R)
    weight = torch.bincount(t, minlength=S).numpy()
    chosen = chosen_experts(gate_table, top_k)
    slots = torch.from_numpy(place(config.run.placement, chosen, weight, R))
    if config.diffusion.timestep_dealing == "affine":
        at_home = served_at_home(gate_table, top_k, slots, R).numpy()
        dealt = [deal(part.numpy(), at_home) for part in t.split(DEALT_TOGETHER // R * R)]
        ranks = zip(*(np.split(part, R) for part in dealt), strict=True)  # each part by rank
        t = torch.from_numpy(np.concatenate([np.concatenate(of_rank) for of_rank in ranks]))
    return shares_of(gate_table, t, top_k, slots, R)


@lru_cache(maxsize=64)
def prior_shares(config: Config, group_size: int) -> RoutingShares:
    """Return the expected routing of a configuration whose gates follow its prior."""
    model, depth = config.model, MODEL_SIZES[config.model.size].depth
    if group_size == 1:
        return unshared(depth, model.top_k)
    process = config.diffusion
    prior = diffusion_prior(
        process.num_timesteps, depth, model.num_experts, model.top_k, alpha=process.prior_alpha
    )
    return configured_shares(config, prior_gate_table(prior, depth), group_size)


def spread_timesteps(config: Config, group_size: int) -> Tensor:
    """Draw timesteps that are spread evenly over the configured density, in random order."""
    count = NUM_SAMPLES // group_size * group_size
    density = dataclasses.replace(
        build_timestep_sampling(config), is_stratified=True, global_batch_size=count
    )
    return density.draw(config.run.seed, torch.arange(count))
