import numpy as np
import pytest
import torch

from models.diffusion import Diffusion
from tests import reference


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


@pytest.mark.parametrize("noise_schedule", ["cosine", "linear"])
def test_loss_terms_equal_the_numpy_reference(noise_schedule):
    diffusion = Diffusion(noise_schedule)
    powers = reference.signal_power(noise_schedule, 1000)
    x_start, noise, prediction = random_batch()
    # Near the truth: far out in the tails, float32 has no digits left for the bins of t = 0.
    prediction[:, :4] = noise + 0.2 * prediction[:, :4]
    t = torch.tensor([0, 0, 1, 10, 300, 600, 900, 990])
    assert (x_start[:2].abs() > 0.999).any(), "the premise: some values lie in the open bins"
    x_t = diffusion.q_sample(x_start, t, noise)

    mse, vlb = diffusion.loss_terms(prediction, x_start, x_t, t, noise)

    for i, step in enumerate(t.tolist()):
        expected = reference.variational_bound(prediction[i], x_start[i], x_t[i], step, powers)
        assert vlb[i].item() == pytest.approx(expected, rel=2e-5)
        error = (prediction[i, :4] - noise[i]).square().mean()
        torch.testing.assert_close(mse[i], error)


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
