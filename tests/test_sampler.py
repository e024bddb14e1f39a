import numpy as np
import pytest
import torch

from models.diffusion import Diffusion
from models.randomness import Stream, normal
from models.sampler import guided_denoise, respaced, sample
from tests import reference


def data_denoiser(diffusion, x_start):
    """The exact denoiser of a data set that holds x_start alone, with the posterior's variance."""

    def denoise(x, t):
        power = diffusion.alphas_cumprod[t].float()[:, None, None, None]
        noise = (x - power.sqrt() * x_start) / (1 - power).sqrt()
        return torch.cat((noise, torch.full_like(noise, -1.0)), dim=1)

    return denoise


def toy_denoiser(x, t):
    scale = torch.cos(t.float() / 300)[:, None, None, None]
    return torch.cat((torch.tanh(x) * scale, torch.zeros_like(x)), dim=1)


def random_latents(num_samples=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_samples, 4, 4, 4, generator=generator)


@pytest.mark.parametrize("num_steps", [2, 10, 250, 1000])
def test_respaced_chains_keep_the_signal_power_at_the_visited_timesteps(num_steps):
    full = Diffusion()

    chain = respaced(full, num_steps)

    assert chain.num_steps == num_steps
    assert chain.timesteps[0] == 0 and chain.timesteps[-1] == 999
    assert (chain.timesteps.diff() > 0).all()
    assert torch.equal(chain.alphas_cumprod, full.alphas_cumprod[chain.timesteps])


def test_ten_steps_visit_every_111th_timestep():
    assert respaced(Diffusion(), 10).timesteps.tolist() == list(range(0, 1000, 111))


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
@pytest.mark.parametrize("num_steps", [1, 20])
def test_a_perfect_denoiser_recovers_the_data(method, num_steps):
    diffusion, x_start = Diffusion(), random_latents(seed=1)

    found = sample(
        data_denoiser(diffusion, x_start),
        random_latents(),
        diffusion=diffusion,
        method=method,
        num_steps=num_steps,
        step_noise=lambda step: random_latents(seed=100 + step),
    )

    torch.testing.assert_close(found, x_start, rtol=0, atol=0.02)


def test_ddim_equals_the_numpy_reference():
    x_T = random_latents()
    powers = reference.signal_power("linear", 1000)

    found = sample(toy_denoiser, x_T, diffusion=Diffusion("linear"), method="ddim", num_steps=12)

    def denoise(x, t):
        return np.tanh(x) * np.cos(t / 300)

    timesteps = [round(i * 999 / 11) for i in range(12)]
    expected = reference.ddim(denoise, x_T.double().numpy(), timesteps, powers)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-4)


def test_ddpm_draws_the_spread_of_gaussian_data():
    """The optimal denoiser of N(0, s^2) data is linear, and the chain must give back s."""
    diffusion, std, num_samples = Diffusion(), 0.5, 4000

    def denoise(x, t):
        power = diffusion.alphas_cumprod[t].float()[:, None, None, None]
        noise = x * (1 - power).sqrt() / (power * std**2 + 1 - power)
        return torch.cat((noise, torch.ones_like(noise)), dim=1)

    positions = torch.arange(num_samples)
    found = sample(
        denoise,
        normal(0, Stream.SAMPLE_START, positions, 4).view(-1, 1, 2, 2),
        diffusion=diffusion,
        method="ddpm",
        num_steps=200,
        step_noise=lambda step: normal(step, Stream.SAMPLE_STEP, positions, 4).view(-1, 1, 2, 2),
    )

    assert found.std().item() == pytest.approx(std, rel=0.05)
    assert abs(found.mean().item()) < 0.02


def test_ddpm_without_noise_is_refused():
    with pytest.raises(AssertionError, match="ddpm draws noise"):
        sample(toy_denoiser, random_latents(), diffusion=Diffusion(), method="ddpm", num_steps=2)


def test_steps_are_counted_from_zero_and_the_last_takes_no_noise():
    drawn, finished, timesteps = [], [], []

    def denoise(x, t):
        timesteps.append(t.tolist())
        return toy_denoiser(x, t)

    def step_noise(step):
        drawn.append(step)
        return torch.zeros(3, 4, 4, 4)

    sample(
        denoise,
        random_latents(),
        diffusion=Diffusion(),
        method="ddpm",
        num_steps=4,
        step_noise=step_noise,
        on_step=finished.append,
    )

    assert drawn == [0, 1, 2] and finished == [0, 1, 2, 3]
    assert timesteps == [[t] * 3 for t in (999, 666, 333, 0)]


def labelled_model(x, t, y):
    noise = x + y[:, None, None, None]
    return torch.cat((noise, 10 + noise), dim=1)


def test_guidance_moves_the_noise_away_from_the_unconditional_one():
    x, y = random_latents(), torch.tensor([1, 2, 3])

    found = guided_denoise(labelled_model, y, null_class=7, cfg_scale=1.5)(x, torch.zeros(3))

    with_label, without = labelled_model(x, None, y), labelled_model(x, None, torch.full((3,), 7))
    expected = without[:, :4] + 1.5 * (with_label[:, :4] - without[:, :4])
    torch.testing.assert_close(found, torch.cat((expected, with_label[:, 4:]), dim=1))


def test_a_guidance_scale_of_one_calls_the_model_with_the_labels_only():
    batches = []

    def model_fn(x, t, y):
        batches.append(y.tolist())
        return labelled_model(x, t, y)

    x, y = random_latents(), torch.tensor([1, 2, 3])
    found = guided_denoise(model_fn, y, null_class=7, cfg_scale=1.0)(x, torch.zeros(3))

    assert batches == [[1, 2, 3]]
    assert torch.equal(found, labelled_model(x, None, y))
