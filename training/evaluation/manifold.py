"""Precision and recall of improved-precision-and-recall (arXiv 1904.06991), as ADM computes them.

A set's manifold is the union of balls about its features, each reaching to the third nearest other
one. Precision: the share of samples on the reference's manifold; recall: the other way round.

Squared distances are half precision, like those of the official evaluation, which all published
numbers contain; float32 where a half is too small for them.

M and N features, D of their dimensions.
"""

from typing import NamedTuple

import torch
from torch import Tensor

NEIGHBOURS = 3
BLOCK = 2048  # rows whose distances are in memory at a time


class PrecisionRecall(NamedTuple):
    """Both are shares, 0 to 1."""

    precision: float
    recall: float


def precision_and_recall(
    reference: Tensor, samples: Tensor, neighbours: int = NEIGHBOURS
) -> PrecisionRecall:
    """Compare features (M, D) of the reference with those (N, D) of samples, on their device."""
    radii = _radii(reference, neighbours), _radii(samples, neighbours)
    is_real = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    is_covered = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for start in range(0, len(reference), BLOCK):
        rows = slice(start, start + BLOCK)
        distances = squared_distances(reference[rows], samples)
        is_real |= (distances <= radii[0][rows, None]).any(dim=0)
        is_covered[rows] = (distances <= radii[1]).any(dim=1)
    return PrecisionRecall(float(is_real.double().mean()), float(is_covered.double().mean()))


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """Return the squared distance (M,) of each feature to its n-th nearest other one."""
    assert len(features) > neighbours, "fewer features than neighbours"
    # The nearest of all is the feature itself.
    return torch.cat(
        [
            squared_distances(rows, features).kthvalue(neighbours + 1, dim=1).values
            for rows in features.split(BLOCK)
        ]
    )


def squared_distances(one: Tensor, other: Tensor) -> Tensor:
    """Return (M, N) float32 squared distances of features (M, D) and (N, D)."""
    half = _expanded(one, other, torch.float16)
    if half.isfinite().all():
        return half.float()
    return _expanded(one, other, torch.float32)


def _expanded(one: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute |u|^2 - 2 u v + |v|^2; sums are accumulated in float32 and rounded to `dtype`."""
    one, other = one.to(dtype).float(), other.to(dtype).float()
    of_one = (one * one).to(dtype).float().sum(dim=1).to(dtype)
    of_other = (other * other).to(dtype).float().sum(dim=1).to(dtype)
    products = (one @ other.T).to(dtype)
    return (of_one[:, None] - 2 * products + of_other).clamp(min=0)
