"""Terms of the variational bound (DDPM, Ho et al. 2020), element by element, in nats, float32."""

import math

import torch
from torch import Tensor

PIXEL_HALF_WIDTH = 1.0 / 255.0  # half a bin of 8-bit data scaled to [-1, 1]
LOG_FLOOR = 1e-12  # smallest probability inside a logarithm


def gaussian_kl(
    mean_q: Tensor, log_variance_q: Tensor, mean_p: Tensor, log_variance_p: Tensor
) -> Tensor:
    """Return KL(q || p) of two diagonal Gaussians."""
    log_ratio = log_variance_q - log_variance_p
    squared_distance = (mean_q - mean_p).square() * torch.exp(-log_variance_p)
    return 0.5 * (torch.exp(log_ratio) - 1.0 - log_ratio + squared_distance)


def binned_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Return the log probability of x's bin of width 2/255 under a Gaussian.

    The outermost bins reach to infinity (DDPM, Eq. 13). Latents are not 8-bit pixels. The term is
    kept as in the reference models all the same, because it sets the variance's scale at t = 0.
    """
    inverse_std = torch.exp(-log_std)
    below_upper = _normal_cdf((x - mean + PIXEL_HALF_WIDTH) * inverse_std)
    below_lower = _normal_cdf((x - mean - PIXEL_HALF_WIDTH) * inverse_std)
    probability = torch.where(x > 0.999, 1.0 - below_lower, below_upper - below_lower)
    probability = torch.where(x < -0.999, below_upper, probability)
    return torch.log(probability.clamp(min=LOG_FLOOR))


def _normal_cdf(z: Tensor) -> Tensor:
    """Approximate the standard normal distribution function as tanh-GELU does."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)))
