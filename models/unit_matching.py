"""Match the units of a network to the units of the diffusion prior (arXiv 2403.09176).

Two units match well if nearly the same timesteps use them; linear assignment finds the best pairs.

L blocks, E experts, K experts per sample, S diffusion timesteps, U = L * E units.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


@torch.no_grad()
def match_units(gate_table: Tensor, top_k: int, prior: Tensor, seed: int) -> Tensor:
    """Match the units of the network to the units of the prior by which timesteps use them.

    The host waits for the device once, for what its current stream holds. Ties are common (they
    change the loss's third digit). The seed alone breaks them, so ranks with equal seeds get equal
    matchings.

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
    assignment = assign_units(uses.transpose(0, 1).flatten(1), prior, gate_order, prior_order)
    units = torch.from_numpy(assignment)
    if gate_table.is_cuda:
        units = units.pin_memory()  # an ordinary copy would wait for the device a second time
    return units.to(gate_table.device, non_blocking=True)


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
