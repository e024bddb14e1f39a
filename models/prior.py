"""Diffusion prior: the loss that teaches nearby timesteps to share experts (arXiv 2403.09176).

The prior says which of U abstract units a timestep uses. A unit of the network is one expert of one
block. Linear assignment matches the network's units to the prior's; the loss then pulls every gate
towards the units that the prior gives to its timestep.

N batch, L blocks, E experts, K experts per sample, S diffusion timesteps, U = L * E units.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
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


@torch.no_grad()
def match_units(gate_table: Tensor, top_k: int, prior: Tensor, seed: int) -> Tensor:
    """Match the units of the network to the units of the prior by which timesteps use them.

    The host waits for the device once. Ties are common (they change the loss's third digit). The
    seed alone breaks them, so ranks with equal seeds get equal matchings.

    Args:
        gate_table: (L, S, E) float32; its units are counted block by block.
        top_k: K.
        prior: (S, U) 0/1, on the device of gate_table.
        seed: of the order in which units are presented, different in every step.

    Returns:
        (U,) int64: network unit u plays prior unit assignment[u].
    """
    generator = np.random.default_rng(seed)
    num_units = prior.shape[1]
    gate_order, prior_order = generator.permutation(num_units), generator.permutation(num_units)
    chosen = gate_table.topk(top_k, dim=-1).indices  # (L, S, K)
    uses = torch.zeros_like(gate_table).scatter(-1, chosen, 1.0)  # (L, S, E)
    assignment = assign_units(_by_timestep(uses), prior, gate_order, prior_order)
    # non_blocking: an ordinary copy to the device would wait for it a second time.
    return torch.from_numpy(assignment).to(gate_table.device, non_blocking=True)


def assign_units(
    uses: Tensor, prior: Tensor, gate_order: np.ndarray, prior_order: np.ndarray
) -> np.ndarray:
    """Solve the matching, with ties broken by the order in which units are presented.

    Args:
        uses: (S, U) 0/1, which units of the network each timestep uses.
        prior: (S, U) 0/1.
        gate_order: (U,) int64 permutation of the network's units.
        prior_order: (U,) int64 permutation of the prior's units.

    Returns:
        (U,) int64, the prior unit of every network unit.
    """
    cost = matching_cost(uses, prior).cpu().numpy()[np.ix_(gate_order, prior_order)]
    rows, columns = linear_sum_assignment(cost)
    assignment = np.empty_like(gate_order)
    assignment[gate_order[rows]] = prior_order[columns]
    return assignment


def matching_cost(uses: Tensor, prior: Tensor) -> Tensor:
    """Return sum_s |uses - prior| of every pair of units, (U, U) float32, from two (S, U) maps.

    For 0/1 maps |a - b| = a + b - 2 a b, so there is no need for an (S, U, U) array. Counts up to
    S are exact in float32.
    """
    with torch.autocast(uses.device.type, enabled=False):
        overlap = uses.float().T @ prior.float()
    return uses.float().sum(0)[:, None] + prior.float().sum(0) - 2.0 * overlap


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
