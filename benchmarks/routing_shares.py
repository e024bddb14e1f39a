"""How much of a batch each rank of an expert-parallel group serves, from the routing plan itself.

The plan is that of models/gate.py for a gate that follows the diffusion prior: what training pulls
every gate towards. N samples of a rank, L blocks, E experts, K experts per sample, S diffusion
timesteps, U = L * E units, R ranks of a group.
"""

import dataclasses
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.gate import ExpertProduct, build_plan
from models.prior import diffusion_prior
from models.switch_dit import MODEL_SIZES
from training.config import Config
from training.objective import build_timestep_sampling

NUM_SAMPLES = 4096  # of the timesteps' density, one from each of as many equal parts of it


class RoutingShares(NamedTuple):
    """Expected routing, per sample of the group and by block.

    Attributes:
        arrivals: (L, R) chance that a sample uses an expert of a rank.
        uses: (L, R) experts of a rank that a sample uses, on average.
    """

    arrivals: np.ndarray
    uses: np.ndarray

    @property
    def group_size(self) -> int:
        """R."""
        return self.arrivals.shape[1]

    @property
    def copies(self) -> float:
        """Ranks other than its own that a sample is sent to, mean over samples and blocks."""
        R = self.group_size
        return float(self.arrivals.sum(1).mean()) * (R - 1) / R

    @property
    def imbalance(self) -> float:
        """Samples of the busiest rank over the mean, mean over blocks."""
        return float((self.arrivals.max(1) / self.arrivals.mean(1)).mean())


def prior_gate_table(prior: Tensor, depth: int) -> Tensor:
    """Turn the prior's map (S, U) into the gates (L, S, E) of a network that follows it exactly.

    Block i plays units i, i + L, i + 2 L ...: every window of L K consecutive units then holds K
    units of each block, as top-k routing needs.
    """
    S, U = prior.shape
    table = prior.view(S, U // depth, depth).permute(2, 0, 1)  # (L, S, E)
    return table / table.sum(-1, keepdim=True)


def shares_of(gate_table: Tensor, t: Tensor, top_k: int, group_size: int) -> RoutingShares:
    """Count what the plans of all ranks of a group say about these timesteps.

    Args:
        gate_table: (L, S, E) float32.
        t: (G,) int64, G a multiple of R.
        top_k: K.
        group_size: R.
    """
    L, G, N = gate_table.shape[0], len(t), len(t) // group_size
    if group_size == 1:
        return RoutingShares(np.ones((L, 1)), np.full((L, 1), float(top_k)))
    arrivals, uses = np.empty((L, group_size)), np.empty((L, group_size))
    for rank in range(group_size):
        plan = build_plan(
            gate_table,
            t[rank * N : (rank + 1) * N],
            top_k,
            group_t=t,
            group_rank=rank,
            group_size=group_size,
            product=ExpertProduct.LOOP,
        )
        arrivals[:, rank] = [sum(block.recv_splits) / G for block in plan.dispatch]
        uses[:, rank] = [int(block.counts.sum()) / G for block in plan.rows]
    return RoutingShares(arrivals, uses)


@lru_cache(maxsize=64)
def prior_shares(config: Config, group_size: int) -> RoutingShares:
    """Return the expected routing of a configuration whose gates follow its prior."""
    depth = MODEL_SIZES[config.model.size].depth
    if config.model.routing != "switch":
        assert group_size == 1, "there are no experts to share out"
        return RoutingShares(np.ones((depth, 1)), np.ones((depth, 1)))
    model, diffusion = config.model, config.diffusion
    prior = diffusion_prior(
        diffusion.num_timesteps, depth, model.num_experts, model.top_k, alpha=diffusion.prior_alpha
    )
    table = prior_gate_table(prior, depth)
    return shares_of(table, spread_timesteps(config, group_size), model.top_k, group_size)


def spread_timesteps(config: Config, group_size: int) -> Tensor:
    """Draw timesteps that are spread evenly over the configured density, in random order."""
    count = -(-NUM_SAMPLES // group_size) * group_size
    density = dataclasses.replace(
        build_timestep_sampling(config), is_stratified=True, global_batch_size=count
    )
    return density.draw(config.run.seed, torch.arange(count))
