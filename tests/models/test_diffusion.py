import numpy as np
import pytest
import torch

from models.diffusion import OBJECTIVES, Diffusion
from models.loss_weights import x_start_error
from tests.support import reference, reference_objectives

GAUSSIAN = ("epsilon", "v", "x0")


def random_batch(num_samples=8, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    x_start, noise = draw(num_samples, 4, 5, 5), draw(num_samples, 4, 5, 5)
    return x_start, noise, draw(num_samples, 8, 5, 5)


@pytest.mark.parametrize("noise_schedule", ["cosine", "linear"])
@pytest.mark.parametrize("num_timesteps", [100, 1000])
def test_schedules_equal_the_closed_form(noise_schedule, num_timesteps):
    diffusion = Diffusion(noise_schedule, num_timesteps)

    expected = reference.signal_power(noise_schedule, num_timesteps)
    np.testing.assert_allclose(diffusion.alphas_cumprod.numpy(), expected, rtol=1e-10)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(AssertionError, match="unknown noise schedule cubic"):
        Diffusion("cubic")


def test_noised_latents_have_the_moments_of_the_schedule():
    diffusion = Diffusion()
    noise = torch.randn(50_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))

    for t in (0, 400, 999):
        x_t = diffusion.q_sample(torch.ones_like(noise), torch.full((50_000,), t), noise)
        power = diffusion.alphas_cumprod[t].item()
        assert x_t.mean().item() == pytest.approx(power**0.5, abs=0.02)
        assert x_t.var().item() == pytest.approx(1 - power, rel=0.03)


def test_rectified_flow_is_a_straight_line_from_data_to_noise():
    diffusion = Diffusion(num_timesteps=8, objective="flow")
    x_start, noise, _ = random_batch()
    t = torch.arange(8)

    sigma = ((t + 1) / 8)[:, None, None, None]
    expected = x_start + sigma * (noise - x_start)
    torch.testing.assert_close(diffusion.q_sample(x_start, t, noise), expected)
    assert torch.equal(diffusion.q_sample(x_start, t, noise)[7], noise[7])


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("noise_schedule", ["cosine", "linear"])
def test_targets_and_conversions_equal_the_solved_equations(objective, noise_schedule):
    diffusion = Diffusion(noise_schedule, objective=objective, learned_variance=False)
    signals, sigmas = reference_objectives.process(objective, noise_schedule, 1000)
    x_start, noise, prediction = random_batch()
    t = torch.tensor([0, 1, 10, 300, 600, 900, 998, 999])
    x_t = diffusion.q_sample(x_start, t, noise)

    target = diffusion.target(x_start, noise, t)
    found = diffusion.denoised(prediction[:, :4], x_t, t)

    for i, step in enumerate(t.tolist()):
        signal, sigma = signals[step], sigmas[step]
        expected = reference_objectives.target(objective, x_start[i], noise[i], signal, sigma)
        np.testing.assert_allclose(target[i], expected, rtol=1e-6, atol=1e-6)
        expected = reference_objectives.implied(objective, prediction[i, :4], x_t[i], signal, sigma)
        for ours, theirs in zip(found, expected, strict=True):
            scale = np.abs(theirs).max()
            np.testing.assert_allclose(ours[i] / scale, theirs / scale, rtol=0, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_target_denoises_to_the_truth_at_every_timestep(objective):
    diffusion = Diffusion(objective=objective, learned_variance=False)
    t = torch.arange(1000)
    x_start, noise, _ = random_batch(num_samples=1000)

    x_t = diffusion.q_sample(x_start, t, noise)
    found = diffusion.denoised(diffusion.target(x_start, noise, t), x_t, t)

    # What the conversions divide by enlarges the rounding of the other terms.
    of_start = 1 / diffusion.signal if objective == "epsilon" else torch.ones(1000)
    of_noise = 1 / diffusion.sigma if objective == "x0" else torch.ones(1000)
    assert ((found.x_start - x_start).abs().amax((1, 2, 3)) < 2e-6 * of_start).all()
    assert ((found.noise - noise).abs().amax((1, 2, 3)) < 2e-6 * of_noise).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_conversions_are_finite_at_every_timestep_under_any_prediction(objective):
    diffusion = Diffusion(objective=objective, learned_variance=False)
    t = torch.arange(1000)
    prediction = torch.full((1000, 1, 1, 1), 1e4)

    found = diffusion.denoised(prediction, -prediction, t)

    assert torch.isfinite(found.x_start).all() and torch.isfinite(found.noise).all()


@pytest.mark.parametrize("noise_schedule", ["cosine", "linear"])
@pytest.mark.parametrize("objective", GAUSSIAN)
def test_loss_terms_equal_the_numpy_reference(objective, noise_schedule):
    diffusion = Diffusion(noise_schedule, objective=objective, learned_variance=True)
    powers = reference.signal_power(noise_schedule, 1000)
    signals, sigmas = reference_objectives.process(objective, noise_schedule, 1000)
    x_start, noise, prediction = random_batch()
    t = torch.tensor([0, 0, 1, 10, 300, 600, 900, 990])
    assert (x_start[:2].abs() > 0.999).any(), "the premise: some values lie in the open bins"
    x_t = diffusion.q_sample(x_start, t, noise)
    # Near the truth, with the error of the noise as a measure: far out in the tails, float32 has no
    # digits left for the bins of t = 0.
    far = 0.2 * (diffusion.sigma / diffusion.signal)[t] / x_start_error(diffusion)[t].sqrt()
    error = far.clamp(max=1.0).float()[:, None, None, None] * prediction[:, :4]
    prediction[:, :4] = diffusion.target(x_start, noise, t) + error

    mse, vlb = diffusion.loss_terms(prediction, x_start, x_t, t, noise)

    for i, step in enumerate(t.tolist()):
        main, channels = prediction[i].chunk(2)
        at = signals[step], sigmas[step]
        start, _ = reference_objectives.implied(objective, main, x_t[i], *at)
        expected = reference.variational_bound(start, channels, x_start[i], x_t[i], step, powers)
        assert vlb[i].item() == pytest.approx(expected, rel=5e-5, abs=1e-7)
        aim = reference_objectives.target(objective, x_start[i], noise[i], *at)
        assert mse[i].item() == pytest.approx(np.mean((main.numpy() - aim) ** 2), rel=1e-4)


@pytest.mark.parametrize("objective", GAUSSIAN)
def test_a_fixed_variance_is_the_larger_one_and_has_no_bound(objective):
    diffusion = Diffusion(objective=objective, learned_variance=False)
    x_start, noise, prediction = random_batch()
    t = torch.tensor([0, 1, 2, 50, 100, 400, 700, 999])
    x_t = diffusion.q_sample(x_start, t, noise)

    step = diffusion.p_mean_variance(prediction[:, :4], x_t, t)
    _, vlb = diffusion.loss_terms(prediction[:, :4], x_start, x_t, t, noise)

    powers = np.append(1.0, reference.signal_power("cosine", 1000))
    beta = 1 - powers[1:] / powers[:-1]
    expected = beta[t.numpy()]
    expected[0] = beta[1] * (1 - powers[1]) / (1 - powers[2])  # the posterior's of t = 1
    assert torch.equal(vlb, torch.zeros(8))
    np.testing.assert_allclose(step.log_variance[:, 0, 0, 0], np.log(expected), rtol=1e-5)


def test_only_epsilon_learns_the_variance_unless_told():
    learned = {name: Diffusion(objective=name).learned_variance for name in OBJECTIVES}

    assert learned == {"epsilon": True, "v": False, "x0": False, "flow": False}
    with pytest.raises(AssertionError, match="no variance to learn"):
        Diffusion(objective="flow", learned_variance=True)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_respaced_chain_keeps_everything_else(objective):
    full = Diffusion("linear", 100, objective=objective, learned_variance=False)
    x_start, noise, prediction = random_batch(num_samples=3)
    kept = torch.tensor([0, 40, 99])

    chain = full.respaced(kept.tolist())

    assert (chain.objective, chain.learned_variance, chain.num_steps) == (objective, False, 3)
    along = torch.arange(3)
    x_t = full.q_sample(x_start, kept, noise)
    assert torch.equal(chain.q_sample(x_start, along, noise), x_t)
    on_full = full.denoised(prediction[:, :4], x_t, kept)
    on_chain = chain.denoised(prediction[:, :4], x_t, along)
    assert torch.equal(on_chain.x_start, on_full.x_start)


def test_one_timestep_may_stand_for_all_samples():
    diffusion = Diffusion()
    x, _, prediction = random_batch()

    one = diffusion.p_mean_variance(prediction, x, torch.tensor([300]))
    all_equal = diffusion.p_mean_variance(prediction, x, torch.full((8,), 300))

    for a, b in zip(one, all_equal, strict=True):
        assert torch.equal(a, b)


def test_the_bound_vanishes_for_a_perfect_prediction():
    diffusion = Diffusion()
    x_start, noise, _ = random_batch()
    t = torch.tensor([1, 2, 5, 50, 100, 400, 700, 900])
    perfect = torch.cat((noise, torch.full_like(noise, -1.0)), dim=1)

    mse, vlb = diffusion.loss_terms(
        perfect, x_start, diffusion.q_sample(x_start, t, noise), t, noise
    )

    assert torch.equal(mse, torch.zeros(8))
    assert vlb.abs().max() < 1e-4


def test_each_term_trains_its_own_channels():
    diffusion = Diffusion()
    x_start, noise, prediction = random_batch()
    prediction.requires_grad_()
    t = torch.tensor([0, 1, 10, 100, 300, 500, 700, 900])
    x_t = diffusion.q_sample(x_start, t, noise)

    mse, vlb = diffusion.loss_terms(prediction, x_start, x_t, t, noise)
    (of_mse,) = torch.autograd.grad(mse.sum(), prediction, retain_graph=True)
    (of_vlb,) = torch.autograd.grad(vlb.sum(), prediction)

    assert of_mse[:, :4].abs().sum() > 0 and not of_mse[:, 4:].any()
    assert of_vlb[:, 4:].abs().sum() > 0 and not of_vlb[:, :4].any()


def test_losses_are_float32_for_a_bf16_prediction():
    diffusion = Diffusion()
    x_start, noise, prediction = random_batch()
    t = torch.arange(8) * 100
    x_t = diffusion.q_sample(x_start, t, noise)
    rounded = prediction.bfloat16()

    found = diffusion.loss_terms(rounded, x_start, x_t, t, noise)
    expected = diffusion.loss_terms(rounded.float(), x_start, x_t, t, noise)

    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_nothing_of_the_schedule_is_saved():
    assert Diffusion().state_dict() == {}
