"""Gaussian diffusion with a learned variance: schedules, noising, the two loss terms.

Ho et al. 2020 (DDPM) for the process, Nichol and Dhariwal 2021 (improved DDPM) for the cosine
schedule and the learned variance. The model predicts the noise and, per element, where its
log-variance lies between the smallest and the largest sensible one.

N batch, C latent channels, H W latent size, S timesteps of the chain.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

NOISE_SCHEDULES = ("cosine", "linear")

MAX_BETA = 0.999  # keeps the last step of the cosine schedule away from a division by zero
COSINE_OFFSET = 0.008  # s of improved DDPM, Eq. 17: beta does not vanish at t = 0
LINEAR_BETA_START, LINEAR_BETA_END = 1e-4, 2e-2  # of DDPM, for 1,000 timesteps
PIXEL_HALF_WIDTH = 1.0 / 255.0  # half a bin of 8-bit data scaled to [-1, 1]
LOG_FLOOR = 1e-12  # smallest probability inside a logarithm


class LossTerms(NamedTuple):
    """The loss of a step and its parts: float32 scalars, on the device until they are logged."""

    total: Tensor
    mse: Tensor
    vlb: Tensor
    prior: Tensor


class GaussianStep(NamedTuple):
    """The model's p(x_{t-1} | x_t) and the x_0 it implies, all (N, C, H, W) float32."""

    mean: Tensor
    log_variance: Tensor
    pred_x_start: Tensor
    noise: Tensor


class Diffusion(nn.Module):
    """A noise schedule as float64 tables, and what is computed from them.

    The tables are buffers: move the object to a device with `.to(device)`. It has no parameters
    and nothing in it is saved.

    Attributes:
        num_steps: S, the number of timesteps of the chain.
        timesteps: (S,) int64, the original timestep of every step of the chain.
    """

    def __init__(
        self,
        noise_schedule: str = "cosine",
        num_timesteps: int = 1000,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Build the tables.

        Args:
            noise_schedule: one of NOISE_SCHEDULES.
            num_timesteps: length of the full chain.
            timesteps: the increasing original timesteps of a shorter chain; all when None. The
                argument `t` of the methods counts along this chain.
        """
        super().__init__()
        self.noise_schedule = noise_schedule
        self.num_timesteps = num_timesteps
        kept = np.arange(num_timesteps) if timesteps is None else np.asarray(timesteps)
        self.num_steps = len(kept)
        self.register_buffer("timesteps", torch.from_numpy(kept.astype(np.int64)), persistent=False)
        full = np.cumprod(1.0 - _betas(noise_schedule, num_timesteps))
        for name, table in _tables(full[kept]).items():
            self.register_buffer(name, torch.from_numpy(table), persistent=False)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Noise x_start to timestep t: DDPM, Eq. 4; (N, C, H, W) float32."""
        signal = _at(self.sqrt_alphas_cumprod, t)
        return signal * x_start.float() + _at(self.sqrt_one_minus_alphas_cumprod, t) * noise.float()

    def p_mean_variance(self, prediction: Tensor, x: Tensor, t: Tensor) -> GaussianStep:
        """Turn a prediction into p(x_{t-1} | x_t).

        Args:
            prediction: (N, 2C, H, W) noise | variance channels; -1 in the latter means the
                posterior's log-variance, 1 means log beta (improved DDPM, Eq. 15).
            x: (N, C, H, W) x_t.
            t: (N,) int64.
        """
        x = x.float()
        noise, variance_channels = prediction.float().chunk(2, dim=1)
        fraction = (variance_channels + 1.0) / 2.0
        log_variance = fraction * _at(self.log_betas, t) + (1.0 - fraction) * _at(
            self.posterior_log_variance, t
        )
        pred_x_start = (
            _at(self.sqrt_recip_alphas_cumprod, t) * x
            - _at(self.sqrt_recipm1_alphas_cumprod, t) * noise
        )
        mean = self._posterior_mean(pred_x_start, x, t)
        return GaussianStep(mean, log_variance, pred_x_start, noise)

    def loss_terms(
        self, prediction: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the two loss terms of every sample.

        Args:
            prediction: (N, 2C, H, W), any float dtype; the loss is computed in float32.
            x_start: (N, C, H, W) final latents; x_t and noise are of the same shape.
            t: (N,) int64.

        Returns:
            mse (N,): mean squared error of the predicted noise.
            vlb (N,): variational bound in bits per element, which trains the variance channels
                only: KL to the posterior, or the decoder's likelihood at t = 0. It is not
                multiplied by S (nor divided by 1,000), as in the official code.
        """
        predicted_noise, variance_channels = prediction.float().chunk(2, dim=1)
        mse = (predicted_noise - noise.float()).square().flatten(1).mean(1)
        frozen = torch.cat((predicted_noise.detach(), variance_channels), dim=1)
        return mse, self._variational_bound(frozen, x_start.float(), x_t.float(), t)

    def _posterior_mean(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0): DDPM, Eq. 7."""
        of_start = _at(self.posterior_mean_of_x_start, t)
        return of_start * x_start + _at(self.posterior_mean_of_x_t, t) * x_t

    def _variational_bound(
        self, prediction: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """L_{t-1}, or L_0 where t = 0, in bits per element, (N,)."""
        step = self.p_mean_variance(prediction, x_t, t)
        kl = _gaussian_kl(
            self._posterior_mean(x_start, x_t, t),
            _at(self.posterior_log_variance, t),
            step.mean,
            step.log_variance,
        )
        nll = -_binned_log_likelihood(x_start, step.mean, 0.5 * step.log_variance)
        nats = torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1))
        return nats / math.log(2.0)


def _betas(noise_schedule: str, num_timesteps: int) -> np.ndarray:
    """Return beta_t of the full chain, (num_timesteps,) float64."""
    assert noise_schedule in NOISE_SCHEDULES, f"unknown noise schedule {noise_schedule}"
    if noise_schedule == "linear":
        scale = 1000 / num_timesteps  # the same total noise for any number of timesteps
        return np.linspace(scale * LINEAR_BETA_START, scale * LINEAR_BETA_END, num_timesteps)
    time = np.arange(num_timesteps + 1) / num_timesteps
    level = np.cos((time + COSINE_OFFSET) / (1.0 + COSINE_OFFSET) * math.pi / 2.0) ** 2
    return np.minimum(1.0 - level[1:] / level[:-1], MAX_BETA)


def _tables(alphas_cumprod: np.ndarray) -> dict[str, np.ndarray]:
    """Derive every table from the signal power that is left after each step of the chain."""
    previous = np.append(1.0, alphas_cumprod[:-1])
    alphas = alphas_cumprod / previous
    betas = 1.0 - alphas
    posterior_variance = betas * (1.0 - previous) / (1.0 - alphas_cumprod)
    if len(betas) > 1:
        posterior_variance[0] = posterior_variance[1]  # it is 0, which has no logarithm
    else:
        posterior_variance[0] = betas[0]
    return {
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": previous,
        "log_betas": np.log(betas),
        "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - alphas_cumprod),
        "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / alphas_cumprod),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / alphas_cumprod - 1.0),
        "posterior_log_variance": np.log(posterior_variance),
        "posterior_mean_of_x_start": betas * np.sqrt(previous) / (1.0 - alphas_cumprod),
        "posterior_mean_of_x_t": (1.0 - previous) * np.sqrt(alphas) / (1.0 - alphas_cumprod),
    }


def _at(table: Tensor, t: Tensor) -> Tensor:
    """Look up (S,) at t (N,), as (N, 1, 1, 1) float32."""
    return table[t].float()[:, None, None, None]


def _gaussian_kl(
    mean_q: Tensor, log_variance_q: Tensor, mean_p: Tensor, log_variance_p: Tensor
) -> Tensor:
    """Return KL(q || p) of two diagonal Gaussians, element by element, in nats."""
    log_ratio = log_variance_q - log_variance_p
    squared_distance = (mean_q - mean_p).square() * torch.exp(-log_variance_p)
    return 0.5 * (torch.exp(log_ratio) - 1.0 - log_ratio + squared_distance)


def _binned_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Return the log probability of x's bin of width 2/255 under a Gaussian, in nats.

    The outermost bins reach to infinity (DDPM, Eq. 13). Latents are no 8-bit pixels; the term is
    kept as it is in the reference models, because it sets the scale of the variance at t = 0.
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
