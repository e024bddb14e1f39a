"""Gaussians fitted to features, and the Fréchet distance between two of them.

M features, D of their dimensions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D), float64, on the CPU."""

    mean: Tensor
    covariance: Tensor


class GaussianFit:
    """Mean and covariance of features that come in batches, in float64.

    Batches are merged as in Chan, Golub and LeVeque 1983: no sum of raw squares loses digits.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None  # sum of outer products about the mean

    def add(self, features: Tensor) -> None:
        """Take a batch (M, D) of any float type into account, on its device."""
        features = features.double()
        count, mean = len(features), features.mean(dim=0)
        centred = features - mean
        scatter = centred.T @ centred
        if self._mean is None:
            self.count, self._mean, self._scatter = count, mean, scatter
            return
        total, shift = self.count + count, mean - self._mean
        self._scatter += scatter + torch.outer(shift, shift) * (self.count * count / total)
        self._mean += shift * (count / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """Return the unbiased estimate (division by M - 1)."""
        assert self.count > 1, "a covariance needs two features"
        return Gaussian(self._mean.cpu(), (self._scatter / (self.count - 1)).cpu())


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """Return |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)).

    The trace of the root is that of (A^(1/2) B A^(1/2))^(1/2), whose eigenvalues are real and not
    negative, so that nothing complex is rounded away and no singular product needs an offset.
    """
    difference = one.mean - other.mean
    values, vectors = torch.linalg.eigh(one.covariance)
    root = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
    product = root @ other.covariance @ root
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2.0).clamp(min=0.0)
    traces = one.covariance.trace() + other.covariance.trace()
    return float(difference @ difference + traces - 2.0 * eigenvalues.sqrt().sum())
