"""The way from stored latents to what the model sees, and back to what the VAE decodes.

Raw latents are the moments of the VAE posterior, mean | log-variance on the channel axis, unscaled.
Final latents are one draw of that posterior, shifted and scaled to about unit variance. Data sets
made elsewhere may hold one draw for good: frozen latents.

N batch, C latent channels, H W latent size.
"""

import torch
from torch import Tensor

# The bounds diffusers puts on the log-variance of a VAE posterior before it takes the exponential.
LOG_VARIANCE_MIN = -30.0
LOG_VARIANCE_MAX = 20.0


def final_latents(
    raw: Tensor, noise: Tensor, scaling_factor: float, shift_factor: float = 0.0
) -> Tensor:
    """Draw from the VAE posterior and normalise.

    Args:
        raw: (N, 2C, H, W) mean | log-variance, any float dtype.
        noise: (N, C, H, W) standard normal numbers.
        scaling_factor: of the VAE (0.18215 for Stable Diffusion's).
        shift_factor: of the VAE; 0 where its config has none.

    Returns:
        (N, C, H, W) float32.
    """
    mean, log_variance = raw.to(torch.float32).chunk(2, dim=1)
    std = torch.exp(0.5 * log_variance.clamp(LOG_VARIANCE_MIN, LOG_VARIANCE_MAX))
    return (mean + std * noise.to(torch.float32) - shift_factor) * scaling_factor


def frozen_latents(raw: Tensor, scaling_factor: float, shift_factor: float = 0.0) -> Tensor:
    """Normalise stored draws of the VAE posterior, (N, C, H, W) of any float dtype, to float32."""
    return (raw.to(torch.float32) - shift_factor) * scaling_factor


def vae_latents(final: Tensor, scaling_factor: float, shift_factor: float = 0.0) -> Tensor:
    """Undo the scaling of `final_latents`: what the VAE decodes, (N, C, H, W)."""
    return final / scaling_factor + shift_factor
