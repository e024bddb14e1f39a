import numpy as np
import pytest
import torch

from models.diffusion import OBJECTIVES, Diffusion
from models.loss_weights import (
    GRADIENT_SCALE,
    UncertaintyWeights,
    cluster_log_variances,
    loss_weight_table,
    uncertainty_weighted,
)
from tests.support import reference_objectives


def process(objective, noise_schedule="cosine", num_timesteps=1000):
    return Diffusion(noise_schedule, num_timesteps, objective=objective, learned_variance=False)


@pytest.mark.parametrize("noise_schedule", ["cosine", "linear"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    ("kind", "gamma"),
    [("constant", 1.0), ("min_snr", 5.0), ("min_snr", 1.0), ("p2", 0.5), ("p2", 1.0)],
)
def test_weights_equal_the_published_formulas(kind, gamma, objective, noise_schedule):
    table = loss_weight_table(
        kind, process(objective, noise_schedule), min_snr_gamma=gamma, p2_gamma=gamma
    )

    signals, sigmas = reference_objectives.process(objective, noise_schedule, 1000)
    expected = [
        reference_objectives.published_weight(kind, objective, (a / s) ** 2, s, gamma)
        for a, s in zip(signals, sigmas, strict=True)
    ]
    assert table.dtype == torch.float64 and torch.isfinite(table).all()
    np.testing.assert_allclose(table.numpy(), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", ["sigma_sqrt", "cosmap"])
def test_weights_of_flow_equal_the_published_formulas(kind):
    table = loss_weight_table(kind, process("flow"))

    _, sigmas = reference_objectives.process("flow", None, 1000)
    expected = [
        reference_objectives.published_weight(kind, "flow", None, sigma, None) for sigma in sigmas
    ]
    np.testing.assert_allclose(table.numpy(), expected, rtol=1e-12)


def test_the_cosmap_weight_is_a_density():
    table = loss_weight_table("cosmap", process("flow", num_timesteps=10_000))

    assert table.mean().item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("kind", ["sigma_sqrt", "cosmap"])
@pytest.mark.parametrize("objective", ["epsilon", "v", "x0"])
def test_weights_of_flow_are_refused_elsewhere(kind, objective):
    with pytest.raises(AssertionError, match="is defined for flow"):
        loss_weight_table(kind, process(objective))


@pytest.mark.parametrize("kind", ["min_snr", "p2"])
@pytest.mark.parametrize("noise_schedule", ["cosine", "linear"])
def test_a_weight_means_the_same_loss_whatever_is_predicted(kind, noise_schedule):
    """Predictions that imply the same wrong x_0 have the same weighted loss."""
    t = torch.tensor([0, 3, 50, 200, 400, 600, 800, 950])
    generator = torch.Generator().manual_seed(0)
    x_start, noise, error = (
        torch.randn(8, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    signals, sigmas = reference_objectives.process("epsilon", noise_schedule, 1000)
    losses = {}
    for objective in ("epsilon", "v", "x0"):
        weight = loss_weight_table(kind, process(objective, noise_schedule), p2_gamma=1.0)[t]
        mse = []
        for i, step in enumerate(t.tolist()):
            at = signals[step], sigmas[step]
            x_t = at[0] * x_start[i] + at[1] * noise[i]
            wrong_start = x_start[i] + error[i]
            wrong_noise = (x_t - at[0] * wrong_start) / at[1]
            wrong = reference_objectives.target(objective, wrong_start, wrong_noise, *at)
            right = reference_objectives.target(objective, x_start[i], noise[i], *at)
            mse.append(np.mean((wrong - right) ** 2))
        losses[objective] = weight.numpy() * np.array(mse)

    np.testing.assert_allclose(losses["v"], losses["epsilon"], rtol=1e-8)
    np.testing.assert_allclose(losses["x0"], losses["epsilon"], rtol=1e-8)


def test_p2_changes_the_balance_between_timesteps():
    without = loss_weight_table("p2", process("epsilon"), p2_gamma=0.0)
    table = loss_weight_table("p2", process("epsilon"), p2_gamma=1.0)

    torch.testing.assert_close(without, torch.ones(1000, dtype=torch.float64))
    assert (table.diff() > 0).all(), "less noise, higher SNR, smaller weight"
    assert table[-1] / table[0] > 1e4


@pytest.mark.parametrize("num_timesteps", [8, 100, 1000])
def test_clusters_are_those_of_the_official_code(num_timesteps):
    weights = UncertaintyWeights(num_timesteps)

    for c, (first, end) in enumerate(reference_objectives.official_clusters(num_timesteps)):
        assert (weights.cluster[first:end] == c).all()
    assert weights.cluster.bincount().sum() == num_timesteps


def test_the_uncertainty_loss_equals_the_official_sum_over_clusters():
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(8, 3, generator=generator)
    weights = UncertaintyWeights(1000)
    with torch.no_grad():
        weights.scaled_log_variance.normal_(0, 0.004, generator=generator)
    log_variance = weights()
    values = cluster_log_variances(log_variance)
    t = torch.arange(8)[:, None] * 125 + torch.tensor([0, 60, 124])

    found = uncertainty_weighted(losses.flatten(), log_variance[t.flatten()]).mean()

    expected = reference_objectives.official_uncertainty_loss(losses.numpy(), values.tolist())
    assert values.abs().max() > 0.5, "the premise: the weights differ"
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 13])
def test_the_gradient_of_the_uncertainty_is_that_of_any_batch_scaled_down(batch_size):
    generator = torch.Generator().manual_seed(batch_size)
    t = torch.randint(0, 100, (batch_size,), generator=generator)
    losses = torch.rand(batch_size, generator=generator)
    weights = UncertaintyWeights(100)

    uncertainty_weighted(losses, weights()[t]).mean().backward()

    expected = [0.0] * 8
    for loss, step in zip(losses.tolist(), t.tolist(), strict=True):
        cluster = next(
            c
            for c, (first, end) in enumerate(reference_objectives.official_clusters(100))
            if first <= step < end
        )
        expected[cluster] += 0.5 * (8 - loss) / batch_size * GRADIENT_SCALE
    np.testing.assert_allclose(weights.scaled_log_variance.grad, expected, rtol=1e-5)


def test_adam_learns_the_scale_of_every_clusters_loss_at_the_networks_rate():
    weights = UncertaintyWeights(16)
    optimizer = torch.optim.Adam(weights.parameters(), lr=1e-4)
    mean_loss = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.3, 0.2, 0.1, 0.05]).repeat_interleave(2)

    for _ in range(600):  # of the 40,000 that a plain parameter would need
        optimizer.zero_grad()
        uncertainty_weighted(mean_loss, weights()).mean().backward()
        optimizer.step()

    found = cluster_log_variances(weights()).exp() * 8
    torch.testing.assert_close(found.detach(), mean_loss[::2], rtol=0.05, atol=0)
