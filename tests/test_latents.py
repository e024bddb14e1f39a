import math

import torch

from models.latents import final_latents, vae_latents


def raw_latents(num_samples, std, dtype=torch.float16):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(num_samples, 4, 8, 8, generator=generator)
    log_variance = torch.full_like(mean, 2 * math.log(std))
    return torch.cat((mean, log_variance), dim=1).to(dtype)


def test_scaling_is_undone_before_decoding():
    raw = raw_latents(3, std=0.1)
    noise = torch.zeros(3, 4, 8, 8)

    final = final_latents(raw, noise, 0.18215, 0.3)

    assert final.dtype == torch.float32
    torch.testing.assert_close(vae_latents(final, 0.18215, 0.3), raw[:, :4].float())


def test_draws_have_the_mean_and_spread_of_the_posterior():
    raw = raw_latents(1, std=0.5).expand(20_000, -1, -1, -1)
    noise = torch.randn(20_000, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    final = final_latents(raw, noise, 2.0, 0.25)

    expected_mean = (raw[0, :4].float() - 0.25) * 2.0
    assert (final.mean(0) - expected_mean).abs().max() < 5 / math.sqrt(20_000)
    torch.testing.assert_close(final.std(0), torch.full((4, 8, 8), 1.0), rtol=0.03, atol=0)


def test_extreme_log_variances_stay_finite():
    raw = torch.zeros(1, 8, 2, 2)
    raw[:, 4:] = torch.tensor([[-1e4, 1e4], [60.0, -60.0]])

    final = final_latents(raw, torch.ones(1, 4, 2, 2), 1.0)

    expected = torch.tensor([[math.exp(-15), math.exp(10)], [math.exp(10), math.exp(-15)]])
    torch.testing.assert_close(final[0, 0], expected)


def test_the_mirrored_moments_give_the_mirrored_latents():
    raw = raw_latents(2, std=0.1)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))

    mirrored = final_latents(raw.flip(-1), noise.flip(-1), 0.5)

    assert torch.equal(mirrored, final_latents(raw, noise, 0.5).flip(-1))
