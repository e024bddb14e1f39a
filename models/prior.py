"""Diffusion prior: the loss that teaches nearby timesteps to share experts (arXiv 2403.09176).

The prior says which of U abstract units a timestep uses. A unit of the network is one expert of one
block. The network's units are matched to the prior's (unit_matching.py); the loss then pulls every
gate towards the units that the prior gives to its timestep.

N batch, L blocks, E experts, K experts per sample, S diffusion timesteps, U = L * E units.
"""

import numpy as np
import torch
from torch import Tensor

LOG_OFFSET = 1e-6  # inside the logarithms of the divergence, as in the official code


def diffusion_prior(
    num_timesteps: int, depth: int, num_experts: int, top_k: int, alpha: float = 4.0
) -> Tensor:
    """Build the 0/1 map of the units that each timestep uses, (S, U) float32.

    Timestep t owns a window of L * K consecutive units, which slides from the first to the last
    unit as (t / (S - 1)) ** alpha: slowly where noise is low, fast where it is high.
    """
    num_units, window = depth * num_experts, depth * top_k
    progress = np.linspace(0.0, 1.0, num_timesteps) ** alpha
    start = np.round(progress * (num_units - window)).astype(np.int64)[:, None]
    unit = np.arange(num_units)
    return torch.from_numpy(((unit >= start) & (unit < start + window)).astype(np.float32))


def prior_loss(gate_table: Tensor, prior: Tensor, t: Tensor, assignment: Tensor) -> Tensor:
    """Compute the Jensen-Shannon divergence between gates and matched prior, mean over the batch.

    Args:
        gate_table: (L, S, E) float32, with gradient.
        prior: (S, U) 0/1.
        t: (N,) int64 timesteps of the batch.
        assignment: (U,) from `match_units`.

    Returns:
        A float32 scalar between 0 and log 2.
    """
    gate = _by_timestep(gate_table[:, t].float()) / gate_table.shape[0]  # (N, U), rows sum to 1
    target = prior[t][:, assignment].float()
    target = target / target.sum(1, keepdim=True)
    log_middle = torch.log((gate + target) / 2.0 + LOG_OFFSET)
    of_gate = gate * (torch.log(gate + LOG_OFFSET) - log_middle)
    of_target = target * (torch.log(target + LOG_OFFSET) - log_middle)
    return ((of_gate + of_target).sum(1) / 2.0).mean()


def _by_timestep(table: Tensor) -> Tensor:
    """Reorder (L, S, E) to (S, U)."""
    return table.transpose(0, 1).flatten(1)
