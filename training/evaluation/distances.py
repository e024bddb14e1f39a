"""Compare sets of features: Fréchet and kernel distance, precision and recall, Inception Score.

All but the kernel distance are computed as ADM's evaluation does. M and N features, D of their
dimensions.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NEIGHBOURS = 3
BLOCK = 2048  # rows whose distances are in memory at a time
SPLIT_SIZE = 5000
MIN_KERNEL_FEATURES = 4  # of either set: two subsets of two
NUM_SUBSETS, SUBSET_SIZE, SUBSET_SEED = 100, 1000, 0


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D), float64, on the CPU."""

    mean: Tensor
    covariance: Tensor


class GaussianFit:
    """Mean and covariance of features that come in batches, in float64.

    Batches are merged as in Chan, Golub and LeVeque 1983, which loses no digits to sums of squares.
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

    The root has the trace of (A^(1/2) B A^(1/2))^(1/2), whose eigenvalues are real and at least 0:
    no complex part is dropped, and a singular product needs no offset.
    """
    difference = one.mean - other.mean
    values, vectors = torch.linalg.eigh(one.covariance)
    root = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
    product = root @ other.covariance @ root
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2.0).clamp(min=0.0)
    traces = one.covariance.trace() + other.covariance.trace()
    return float(difference @ difference + traces - 2.0 * eigenvalues.sqrt().sum())


class KernelDistance(NamedTuple):
    """Over subsets, the mean and the standard deviation (division by their number)."""

    mean: float
    std: float


def subset_size(num_reference: int, num_samples: int) -> int:
    """Return the features of a subset: half of the smaller set, so that subsets do differ."""
    return min(SUBSET_SIZE, num_reference // 2, num_samples // 2)


def kernel_distance(
    reference: Tensor, samples: Tensor, size: int, num_subsets: int = NUM_SUBSETS
) -> KernelDistance:
    """Return the unbiased squared MMD of features (M, D) and (N, D), on their device, in float64.

    That of arXiv 1801.01401 with its kernel (u v / D + 1)^3, over pairs of random subsets without
    repetition. Unlike the Fréchet distance it is not larger with fewer images, and may be negative.
    """
    generator = torch.Generator().manual_seed(SUBSET_SEED)
    found = []
    for _ in range(num_subsets):
        x, y = (
            features[torch.randperm(len(features), generator=generator)[:size].to(features.device)]
            for features in (reference, samples)
        )
        x, y = x.double(), y.double()
        own = sum((kernel := _kernel(z, z)).sum() - kernel.trace() for z in (x, y))
        found.append(own / (size * (size - 1)) - 2.0 * _kernel(x, y).mean())
    values = torch.stack(found)
    return KernelDistance(float(values.mean()), float(values.std(correction=0)))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1.0) ** 3


class PrecisionRecall(NamedTuple):
    """Both are shares, 0 to 1."""

    precision: float
    recall: float


def precision_and_recall(
    reference: Tensor, samples: Tensor, neighbours: int = NEIGHBOURS
) -> PrecisionRecall:
    """Compare features (M, D) of the reference with those (N, D) of samples, on their device.

    As in arXiv 1904.06991. A set's manifold is the union of balls about its features; each ball
    reaches to the third nearest other feature. Precision is the share of samples on the reference's
    manifold, recall the share of the reference on the manifold of the samples.
    """
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
    """Return (M, N) float32 squared distances of features (M, D) and (N, D).

    Rounded to half precision, like those of the official evaluation, which all published numbers
    contain; in float32 where one of them is too large for a half.
    """
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


def inception_score(logits: Tensor, split_size: int = SPLIT_SIZE) -> float:
    """Return the mean score of consecutive splits, exp(mean KL(p(y|x) || p(y))), arXiv 1606.03498.

    Args:
        logits: (N, classes), without the bias of the last layer.
        split_size: images of a split; the last one may be smaller and counts as much.
    """
    scores = []
    for part in logits.double().split(split_size):
        log_p = torch.log_softmax(part, dim=1)
        p = log_p.exp()
        scores.append((p * (log_p - p.mean(dim=0).log())).sum(dim=1).mean().exp())
    return float(torch.stack(scores).mean())
