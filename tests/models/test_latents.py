import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_tools.errors import ConfigError
from data_tools.vae.autoencoder import decode_pixels, encode_moments, load_decoder, load_vae
from models.latents import final_latents, frozen_latents, scale_and_shift, vae_latents
from tests.support.small_vae import save_small_vae


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


def diffusers_in(latents, config):
    """What the pipelines of diffusers do with the latents of an image."""
    if config.latents_mean is not None and config.latents_std is not None:
        mean = torch.tensor(config.latents_mean).view(1, 4, 1, 1)
        std = torch.tensor(config.latents_std).view(1, 4, 1, 1)
        return (latents - mean) * config.scaling_factor / std
    return (latents - (config.shift_factor or 0)) * config.scaling_factor


def diffusers_out(latents, config):
    """What the pipelines of diffusers do with latents before they decode them."""
    if config.latents_mean is not None and config.latents_std is not None:
        mean = torch.tensor(config.latents_mean).view(1, 4, 1, 1)
        std = torch.tensor(config.latents_std).view(1, 4, 1, 1)
        return latents * std / config.scaling_factor + mean
    return latents / config.scaling_factor + (config.shift_factor or 0)


STATISTICS = {"latents_mean": [-1.6, 1.9, -1.4, 2.5], "latents_std": [8.5, 5.9, 6.5, 5.2]}


@pytest.mark.parametrize(
    "numbers",
    [
        {"scaling_factor": 0.3},
        {"scaling_factor": 0.3609, "shift_factor": 0.1159},
        {"scaling_factor": 0.5, **STATISTICS},
    ],
    ids=["scale", "scale and shift", "statistics"],
)
def test_latents_are_normalised_as_the_pipelines_of_diffusers_do(tmp_path, numbers):
    vae = load_vae(save_small_vae(tmp_path / "vae", **numbers))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    raw = encode_moments(vae, torch.from_numpy(pixels))
    noise = torch.randn(3, 4, 8, 8)
    mean, log_variance = raw.float().chunk(2, dim=1)
    draw = mean + torch.exp(0.5 * log_variance) * noise
    numbers_of_manifest = scale_and_shift(*vae.reference.normalisation)

    final = final_latents(raw, noise, *numbers_of_manifest)
    frozen = frozen_latents(draw, *numbers_of_manifest)
    back = vae_latents(final, *numbers_of_manifest)
    pictures = decode_pixels(vae, final)

    wanted = diffusers_in(draw, vae.model.config)
    torch.testing.assert_close(final, wanted)
    torch.testing.assert_close(frozen, wanted)
    torch.testing.assert_close(back, draw)
    with torch.no_grad():
        decoded = vae.model.decode(diffusers_out(wanted, vae.model.config)).sample
    decoded = ((decoded.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).numpy()
    assert np.abs(pictures - decoded).max() <= 1


def test_a_model_is_decoded_by_the_numbers_of_the_data_that_it_learned_from(tmp_path):
    folder = save_small_vae(tmp_path / "vae", scaling_factor=0.5, **STATISTICS)
    with_them = load_vae(folder).reference
    # Encoded before these statistics were used.
    without = replace(with_them, scaling_factor=0.25, latents_mean=[], latents_std=[])
    for reference in (with_them, without):
        for named in (None, folder):
            vae = load_decoder(named, reference)
            assert vae.reference == reference
            config = vae.model.config  # which an exported pipeline takes along
            assert config.scaling_factor == reference.scaling_factor
            assert list(config.latents_mean or []) == reference.latents_mean
            assert list(config.latents_std or []) == reference.latents_std


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ({"latents_mean": [0, 0, 0, 0]}, "are not 4 numbers each, the latter positive; give both"),
        ({"latents_std": [1, 1, 1, 1]}, "are not 4 numbers each"),
        ({"latents_mean": [0, 0], "latents_std": [1, 1]}, "are not 4 numbers each"),
        ({"latents_mean": [0] * 4, "latents_std": [1, 1, 0, 1]}, "are not 4 numbers each"),
        (STATISTICS | {"shift_factor": 0.1}, "a shift_factor (0.1) and latents_mean, which both"),
    ],
)
def test_statistics_that_have_no_meaning_are_refused(tmp_path, numbers, sentence):
    save_small_vae(tmp_path / "vae", **numbers)
    with pytest.raises(ConfigError) as error:
        load_vae(tmp_path / "vae")
    assert str(error.value).startswith(f"--vae {tmp_path}/vae: ") and sentence in str(error.value)
