import math

import numpy as np
import pytest
import torch

from models.randomness import Stream, integers
from models.timestep_sampling import MODE_SCALE_MAX, TimestepSampling
from tests.support import reference_objectives

# density, mean, std, scale, shift
DENSITIES = [
    ("uniform", 0.0, 1.0, 0.0, 3.0),
    ("uniform", 0.0, 1.0, 0.0, 0.4),
    ("logit_normal", 0.0, 1.0, 0.0, 1.0),
    ("logit_normal", -0.5, 0.6, 0.0, 1.0),
    ("logit_normal", 0.5, 1.4, 0.0, 2.0),
    ("mode", 0.0, 1.0, 1.29, 1.0),
    ("mode", 0.0, 1.0, -1.0, 1.0),
    ("mode", 0.0, 1.0, 0.81, 3.0),
]


def sampling(density, mean, std, scale, shift, **options):
    return TimestepSampling(
        density=density, mean=mean, std=std, mode_scale=scale, shift=shift, **options
    )


def test_the_default_draws_every_timestep_alike_from_the_stream():
    positions = torch.arange(5000)

    found = TimestepSampling(num_timesteps=1000).draw(7, positions)

    assert torch.equal(found, integers(7, Stream.TIMESTEP, positions, 1000))


@pytest.mark.parametrize("density", DENSITIES)
def test_times_are_the_inverse_of_the_integrated_density(density):
    quantile = torch.linspace(0.001, 0.999, 333, dtype=torch.float64)

    times = sampling(*density, num_timesteps=1000).time(quantile)

    assert (times.diff() > 0).all() and times[0] > 0 and times[-1] < 1
    integrated = reference_objectives.density_cdf(times.numpy(), *density)
    np.testing.assert_allclose(integrated, quantile.numpy(), atol=2e-5)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("is_stratified", [False, True])
def test_drawn_timesteps_follow_the_density(density, is_stratified):
    num_samples, num_timesteps, batch = 40_000, 40, 200
    drawing = sampling(
        *density,
        num_timesteps=num_timesteps,
        is_stratified=is_stratified,
        global_batch_size=batch,
    )

    t = torch.cat([drawing.draw(3, p) for p in torch.arange(num_samples).split(batch)])

    edges = np.arange(num_timesteps + 1) / num_timesteps
    expected = np.diff(reference_objectives.density_cdf(edges, *density)) * num_samples
    assert expected.sum() == pytest.approx(num_samples, rel=1e-4)
    counts = t.bincount(minlength=num_timesteps).numpy()
    common = expected > 5  # the chi-square approximation needs some in each
    chi_square = ((counts - expected) ** 2 / expected)[common].sum()
    assert counts[~common].sum() < 60
    degrees = common.sum() - 1
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)
    if is_stratified:
        assert chi_square < degrees / 2, "strata make the counts more even than chance"


@pytest.mark.parametrize("density", DENSITIES)
def test_frequencies_are_those_of_the_density(density):
    found = sampling(*density, num_timesteps=40).frequencies()

    expected = np.diff(reference_objectives.density_cdf(np.arange(41) / 40, *density))
    assert found.dtype == np.int64
    np.testing.assert_allclose(found / found.sum(), expected, atol=3e-4)


@pytest.mark.parametrize(
    "density",
    [
        ("logit_normal", 50.0, 1.0, 0.0, 1.0),
        ("logit_normal", -50.0, 9.0, 0.0, 1.0),
        ("mode", 0.0, 1.0, MODE_SCALE_MAX, 1.0),
        ("uniform", 0.0, 1.0, 0.0, 1e-6),
        ("uniform", 0.0, 1.0, 0.0, 1e6),
    ],
)
def test_extreme_densities_stay_within_the_timesteps(density):
    t = sampling(*density, num_timesteps=10).draw(0, torch.arange(10_000))

    assert t.min() >= 0 and t.max() <= 9


def test_a_shift_above_one_moves_towards_noise():
    means = [
        TimestepSampling(num_timesteps=1000, shift=shift)
        .draw(0, torch.arange(20_000))
        .double()
        .mean()
        for shift in (0.5, 1.0, 2.0)
    ]

    assert means[0] < 400 < means[1] < 600 < means[2]


def test_mode_scales_without_a_density_are_refused():
    for scale in (-1.01, MODE_SCALE_MAX + 0.01):
        with pytest.raises(AssertionError, match="out of range"):
            TimestepSampling(num_timesteps=10, density="mode", mode_scale=scale)


@pytest.mark.parametrize("batch", [1, 2, 8, 60, 256])
def test_every_stratum_of_a_global_batch_is_drawn_exactly_once(batch):
    # 100 timesteps to a stratum, so that a timestep tells its stratum.
    drawing = TimestepSampling(
        num_timesteps=100 * batch, is_stratified=True, global_batch_size=batch
    )

    for step in (0, 1, 1000):
        t = drawing.draw(5, step * batch + torch.arange(batch))
        assert (t // 100).sort().values.tolist() == list(range(batch))


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "mode"])
@pytest.mark.parametrize("is_stratified", [False, True])
@pytest.mark.parametrize(("world_size", "micro"), [(1, 24), (1, 3), (2, 4), (4, 6), (8, 1), (3, 2)])
def test_timesteps_depend_on_neither_ranks_nor_micro_batches(
    density, is_stratified, world_size, micro
):
    drawing = TimestepSampling(
        num_timesteps=1000, density=density, is_stratified=is_stratified, global_batch_size=24
    )
    step = 48 + torch.arange(24)

    parts = []
    for first in range(0, 24, world_size * micro):  # micro-steps
        for rank in range(world_size):
            parts.append(drawing.draw(11, step[first + rank * micro :][:micro]))

    assert torch.equal(torch.cat(parts), drawing.draw(11, step))


def test_strata_are_dealt_anew_in_every_batch_and_by_every_seed():
    batch, num_batches = 16, 400
    drawing = TimestepSampling(num_timesteps=1600, is_stratified=True, global_batch_size=batch)

    def deal(seed):
        steps = torch.arange(batch * num_batches).split(batch)
        return torch.stack([drawing.draw(seed, step) for step in steps]) // 100

    dealt = deal(0)

    # Every slot has every stratum equally often: chi-square with 16 * 15 degrees of freedom.
    counts = torch.stack([slot.bincount(minlength=batch) for slot in dealt.T])
    expected = num_batches / batch
    assert ((counts - expected) ** 2 / expected).sum() < 240 + 4 * math.sqrt(480)
    assert (deal(1) == dealt).double().mean() < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("is_stratified", [False, True])
def test_cpu_and_gpu_draw_the_same_timesteps(density, is_stratified):
    positions = torch.arange(256)
    drawing = sampling(
        *density, num_timesteps=1000, is_stratified=is_stratified, global_batch_size=256
    )

    assert torch.equal(drawing.draw(0, positions.cuda()).cpu(), drawing.draw(0, positions))
