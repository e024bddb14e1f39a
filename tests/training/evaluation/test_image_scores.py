"""FID's and KID's arithmetic, precision, recall and Inception Score against slow references."""

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from tests.support import reference_scores
from training.evaluation.distances import (
    Gaussian,
    GaussianFit,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_and_recall,
    squared_distances,
    subset_size,
)


def features(count, width, seed=0, scale=1.0, shift=0.0):
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((width, width)) / width**0.5
    return (random.standard_normal((count, width)) @ mixing * scale + shift).astype(np.float32)


def fitted(*batches):
    fit = GaussianFit()
    for batch in batches:
        fit.add(torch.from_numpy(batch))
    return fit.gaussian()


@pytest.mark.parametrize("sizes", [(50,), (1, 49), (20, 1, 29)])
def test_batches_give_the_mean_and_covariance_of_all(sizes):
    values = features(50, 6, shift=1000.0)

    found = fitted(*np.split(values, np.cumsum(sizes)[:-1]))

    exact = values.astype(np.float64)
    np.testing.assert_allclose(found.mean, exact.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("count", [400, 20])  # with 20 of 32 the covariance is singular
def test_the_distance_is_that_of_the_matrix_square_root(count):
    one, other = fitted(features(count, 32)), fitted(features(300, 32, seed=1, shift=0.3))

    found = frechet_distance(one, other)

    pairs = [(g.mean.numpy(), g.covariance.numpy()) for g in (one, other)]
    assert found == pytest.approx(reference_scores.frechet_distance(*pairs), rel=1e-6)
    assert frechet_distance(other, one) == pytest.approx(found, rel=1e-8)


class Network(nn.Module):
    """Features (N, 24) of images, uint8 (N, 3, 8, 8); torchmetrics asks for their number."""

    num_features = 24

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 24, 3, stride=2)

    def forward(self, pixels):
        return self.convolution(pixels.double() / 128).relu().mean(dim=(2, 3))


@pytest.mark.parametrize("count", [100, 16])  # with 16 of 24 the covariance is singular
def test_the_distance_is_that_of_torchmetrics(count):
    torch.manual_seed(0)
    network = Network().double().eval().requires_grad_(False)
    metric, fits = FrechetInceptionDistance(network), []
    for is_real, limit in ((True, 256), (False, 200)):
        fits.append(GaussianFit())
        for batch in torch.randint(0, limit, (count, 3, 8, 8), dtype=torch.uint8).split(7):
            metric.update(batch, real=is_real)
            fits[-1].add(network(batch))

    found = frechet_distance(*(fit.gaussian() for fit in fits))

    assert found == pytest.approx(float(metric.compute()), rel=1e-6)
    assert found > 0.01


def test_the_distance_of_gaussians_that_commute_is_known_in_closed_form():
    def gaussian(mean, variances):
        double = torch.float64
        return Gaussian(torch.tensor(mean, dtype=double), torch.tensor(variances).double().diag())

    one, other = gaussian([0.0, 0.0], [4.0, 9.0]), gaussian([3.0, 4.0], [1.0, 16.0])

    assert frechet_distance(one, other) == pytest.approx(25 + (2 - 1) ** 2 + (3 - 4) ** 2)
    assert frechet_distance(one, one) == pytest.approx(0.0, abs=1e-9)


def test_the_kernel_distance_is_that_of_a_loop_over_pairs():
    """With subsets of all features but for their order, so that all subsets are alike."""
    one, other = features(12, 5, shift=0.5), features(12, 5, seed=1)

    found = kernel_distance(torch.from_numpy(one), torch.from_numpy(other), 12, num_subsets=3)

    assert found.mean == pytest.approx(reference_scores.kernel_distance(one, other), rel=1e-10)
    doubles = torch.from_numpy(one).double(), torch.from_numpy(other).double()
    assert found.mean == pytest.approx(float(poly_mmd(*doubles)), rel=1e-10)
    assert found.std == pytest.approx(0.0, abs=1e-12)


def test_the_spread_of_the_kernel_distance_is_over_the_subsets_that_its_seed_draws():
    one, other = features(40, 5, shift=0.5), features(30, 5, seed=1)
    generator, values = torch.Generator().manual_seed(0), []
    for _ in range(6):
        chosen = [torch.randperm(n, generator=generator)[:15].numpy() for n in (40, 30)]
        values.append(reference_scores.kernel_distance(one[chosen[0]], other[chosen[1]]))

    found = kernel_distance(torch.from_numpy(one), torch.from_numpy(other), 15, num_subsets=6)

    assert found == pytest.approx((np.mean(values), np.std(values)), rel=1e-9)
    assert found.std > 0


def test_the_kernel_distance_of_one_distribution_is_zero_on_average_whatever_the_count():
    """The Fréchet distance is not: with few features it is large."""
    sets = [torch.randn(1000, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]

    few, many = (kernel_distance(*sets, size, num_subsets=300) for size in (10, 200))

    assert abs(few.mean) < 4 * few.std / 300**0.5 + many.std
    assert many.std < few.std / 4
    gaussians = [fitted(part[:10].numpy()) for part in sets]
    assert frechet_distance(*gaussians) > 1.0


@pytest.mark.parametrize(
    ("counts", "size"), [((10_000, 50_000), 1000), ((50, 1999), 25), ((4, 9), 2)]
)
def test_subsets_are_at_most_half_of_the_smaller_set(counts, size):
    assert subset_size(*counts) == subset_size(*counts[::-1]) == size


@pytest.mark.parametrize(("count", "split_size"), [(20, 5), (20, 6), (3, 5000)])
def test_the_inception_score_is_the_mean_over_splits(count, split_size):
    logits = 3.0 * features(count, 10)

    found = inception_score(torch.from_numpy(logits), split_size)

    expected = reference_scores.inception_score(logits.astype(np.float64), split_size)
    assert found == pytest.approx(expected, rel=1e-9)


def test_the_inception_score_counts_sure_and_different_answers():
    sure = 1000.0 * torch.eye(8)  # probabilities of exactly 0 and 1 must not make it infinite

    assert inception_score(sure) == pytest.approx(8.0)
    assert inception_score(torch.zeros(8, 8)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(3.0, np.float16), (100.0, np.float32)],  # a half ends at 65,504
)
def test_precision_and_recall_are_those_of_a_loop_over_pairs(monkeypatch, scale, dtype):
    monkeypatch.setattr("training.evaluation.distances.BLOCK", 7)
    reference, samples = features(40, 8, scale=scale), features(30, 8, 1, 0.8 * scale)

    found = precision_and_recall(torch.from_numpy(reference), torch.from_numpy(samples))

    expected = reference_scores.precision_and_recall(reference, samples, 3, dtype)
    assert found == pytest.approx(expected)
    assert 0 < found.precision < 1 and 0 < found.recall < 1


def test_distances_are_rounded_to_half_precision_as_the_official_ones_are():
    """On features whose sums are exact in float32, so that only the rounding to halves counts."""
    one, other = (np.round(16 * features(6, 40, seed, scale=2.0)) / 16 for seed in (0, 1))

    found = squared_distances(torch.from_numpy(one), torch.from_numpy(other)).numpy()

    half, single = (
        [[reference_scores.squared_distance(u, v, dtype) for v in other] for u in one]
        for dtype in (np.float16, np.float32)
    )
    np.testing.assert_array_equal(found, np.array(half, np.float32))
    assert (found != np.array(single)).mean() > 0.5


def test_precision_and_recall_of_a_set_with_itself_are_whole_and_of_a_far_one_nothing():
    values = torch.from_numpy(features(40, 8))

    assert precision_and_recall(values, values) == (1.0, 1.0)
    assert precision_and_recall(values, values + 50.0) == (0.0, 0.0)


def test_recall_misses_what_is_never_drawn():
    reference = torch.from_numpy(np.concatenate((features(40, 4), features(40, 4, shift=40.0))))

    found = precision_and_recall(reference, reference[:40])

    assert found == (1.0, 0.5)
