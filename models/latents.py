"""Convert latents: from what is stored to what the network sees, and back for the VAE to decode.

Raw latents are the moments of the VAE posterior, mean | log-variance on the channel axis, unscaled.
Final latents are one draw from that posterior, shifted and scaled to about unit variance. Frozen
latents are one draw that a data set made elsewhere has stored in place of the moments.

N batch, C latent channels, H W latent size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# The bounds diffusers puts on the log-variance of a VAE posterior before it takes the exponential.
LOG_VARIANCE_MIN = -30.0
LOG_VARIANCE_MAX = 20.0
DECODE_BATCH_SIZE = 16  # bounds the memory of decoding; at 512 pixels about 16 GiB on a GPU
PIXEL_CENTRE = 127.5  # uint8 0..255 to -1..1


def scale_and_shift(
    scaling_factor: float,
    shift_factor: float,
    latents_mean: Sequence[float],
    latents_std: Sequence[float],
    device: torch.device | str = "cpu",
) -> tuple[float | Tensor, float | Tensor]:
    """Return what normalises a VAE's latents: final = (latent - shift) * scale.

    As the pipelines of diffusers do it: with statistics (latent - mean) * scaling_factor / std,
    without them (latent - shift_factor) * scaling_factor.

    Args:
        scaling_factor: of the VAE's configuration.
        shift_factor: of the VAE's configuration; 0 where it has none.
        latents_mean: of the VAE's configuration, (C,); empty where it has none.
        latents_std: of the VAE's configuration, (C,); empty where it has none.
        device: of the latents.

    Returns:
        Scale and shift: numbers, or (C, 1, 1) float32 on the device.
    """
    if not len(latents_mean):
        return scaling_factor, shift_factor
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)
        for values in (latents_mean, latents_std)
    )
    return scaling_factor / std, mean


def final_latents(
    raw: Tensor,
    noise: Tensor,
    scaling_factor: float | Tensor,
    shift_factor: float | Tensor = 0.0,
) -> Tensor:
    """Draw from the VAE posterior and normalise.

    Args:
        raw: (N, 2C, H, W) mean | log-variance, any float dtype.
        noise: (N, C, H, W) standard normal numbers.
        scaling_factor: of the VAE (0.18215 for Stable Diffusion's), or by channel (C, 1, 1).
        shift_factor: of the VAE, or by channel; 0 where its config has none.

    Returns:
        (N, C, H, W) float32.
    """
    mean, log_variance = raw.to(torch.float32).chunk(2, dim=1)
    std = torch.exp(0.5 * log_variance.clamp(LOG_VARIANCE_MIN, LOG_VARIANCE_MAX))
    return (mean + std * noise.to(torch.float32) - shift_factor) * scaling_factor


def frozen_latents(
    raw: Tensor, scaling_factor: float | Tensor, shift_factor: float | Tensor = 0.0
) -> Tensor:
    """Normalise stored draws of the VAE posterior, (N, C, H, W) of any float dtype, to float32."""
    return (raw.to(torch.float32) - shift_factor) * scaling_factor


def vae_latents(
    final: Tensor, scaling_factor: float | Tensor, shift_factor: float | Tensor = 0.0
) -> Tensor:
    """Undo the scaling of `final_latents`: what the VAE decodes, (N, C, H, W)."""
    return final / scaling_factor + shift_factor


@torch.no_grad()
def decode(
    vae: nn.Module,
    final: Tensor,
    scaling_factor: float | Tensor,
    shift_factor: float | Tensor = 0.0,
) -> Tensor:
    """Decode final latents to pixels.

    Args:
        vae: an AutoencoderKL of diffusers.
        final: (N, C, H, W), N > 0, on the VAE's device.
        scaling_factor: see `scale_and_shift`.
        shift_factor: see `scale_and_shift`.

    Returns:
        uint8 (N, height, width, 3) on the CPU.
    """
    parameter = next(vae.parameters())
    pictures = []
    for part in final.split(DECODE_BATCH_SIZE):
        latents = vae_latents(part.float(), scaling_factor, shift_factor)
        decoded = vae.decode(latents.to(parameter)).sample.float()
        pixels = ((decoded + 1) * PIXEL_CENTRE).round().clamp(0, 255).to(torch.uint8)
        pictures.append(pixels.permute(0, 2, 3, 1).cpu())
    return torch.cat(pictures).contiguous()
