"""The diffusion process: noise samples, say what the network predicts, compute its loss.

Every process is x_t = signal[t] * x_0 + sigma[t] * noise. The network predicts one of

    epsilon  the noise (DDPM, Ho et al. 2020)
    v        signal * noise - sigma * x_0 (Salimans and Ho 2022)
    x0       the clean latents
    flow     noise - x_0, the velocity of rectified flow (Liu et al. 2022), on a straight line

and, if asked to, the variance of a reverse step (Nichol and Dhariwal 2021, improved DDPM); flow has
no such variance.

N batch, C latent channels, H W latent size, S timesteps of the chain.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from models.schedule import betas, reverse_tables, straight_line
from models.variational import binned_log_likelihood, gaussian_kl

OBJECTIVES = ("epsilon", "v", "x0", "flow")


class LossTerms(NamedTuple):
    """The loss of a step and its parts: float32 scalars, on the device until they are logged."""

    total: Tensor
    mse: Tensor
    vlb: Tensor
    prior: Tensor


class Denoised(NamedTuple):
    """The x_0 and the noise that a prediction implies, both (N, C, H, W) float32."""

    x_start: Tensor
    noise: Tensor


class GaussianStep(NamedTuple):
    """The model's p(x_{t-1} | x_t) and the x_0 it implies, all (N, C, H, W) float32."""

    mean: Tensor
    log_variance: Tensor
    pred_x_start: Tensor
    noise: Tensor


def learns_variance(objective: str, learned_variance: bool | None) -> bool:
    """Tell whether the variance is learned; None means with objective epsilon only."""
    return objective == "epsilon" if learned_variance is None else learned_variance


class Diffusion(nn.Module):
    """A process as float64 tables; what is computed from them is float32.

    The tables are buffers: move the object to a device with `.to(device)`. It has no parameters
    and nothing in it is saved.

    Attributes:
        objective: what the network predicts, one of OBJECTIVES.
        learned_variance: whether a prediction has variance channels.
        num_steps: S, the number of timesteps of the chain.
        timesteps: (S,) int64, the original timestep of every step of the chain.
        signal: (S,) float64, factor of x_0 in x_t.
        sigma: (S,) float64, factor of the noise in x_t.
    """

    def __init__(
        self,
        noise_schedule: str = "cosine",
        num_timesteps: int = 1000,
        timesteps: Sequence[int] | None = None,
        objective: str = "epsilon",
        learned_variance: bool | None = None,
    ) -> None:
        """Build the tables.

        Args:
            noise_schedule: "cosine" or "linear"; flow does not use it.
            num_timesteps: length of the full chain.
            timesteps: the increasing original timesteps of a shorter chain; all when None. The
                argument `t` of the methods counts along this chain.
            objective: one of OBJECTIVES.
            learned_variance: see `learns_variance`; never with flow.
        """
        super().__init__()
        assert objective in OBJECTIVES, f"unknown objective {objective}"
        self.noise_schedule, self.num_timesteps = noise_schedule, num_timesteps
        self.objective = objective
        self.learned_variance = learns_variance(objective, learned_variance)
        kept = np.arange(num_timesteps) if timesteps is None else np.asarray(timesteps)
        self.num_steps = len(kept)
        self.register_buffer("timesteps", torch.from_numpy(kept.astype(np.int64)), persistent=False)
        if objective == "flow":
            assert not self.learned_variance, "rectified flow has no variance to learn"
            sigma = straight_line(num_timesteps)[kept]
            tables = {"signal": 1.0 - sigma, "sigma": sigma}
        else:
            power = np.cumprod(1.0 - betas(noise_schedule, num_timesteps))[kept]
            tables = {"signal": np.sqrt(power), "sigma": np.sqrt(1.0 - power)}
            tables |= reverse_tables(power)
        for name, table in tables.items():
            self.register_buffer(name, torch.from_numpy(table), persistent=False)

    def respaced(self, timesteps: Sequence[int]) -> "Diffusion":
        """Return a chain of these original timesteps, with everything else equal."""
        chain = Diffusion(
            self.noise_schedule,
            self.num_timesteps,
            timesteps,
            self.objective,
            self.learned_variance,
        )
        return chain.to(self.timesteps.device)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Noise x_start to timestep t (DDPM, Eq. 4), (N, C, H, W) float32."""
        return _at(self.signal, t) * x_start.float() + _at(self.sigma, t) * noise.float()

    def target(self, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the network should predict, (N, C, H, W) float32."""
        x_start, noise = x_start.float(), noise.float()
        if self.objective == "epsilon":
            return noise
        if self.objective == "x0":
            return x_start
        if self.objective == "flow":
            return noise - x_start
        return _at(self.signal, t) * noise - _at(self.sigma, t) * x_start

    def split(self, prediction: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split a prediction into its C main channels and its C variance channels, if any."""
        if not self.learned_variance:
            return prediction, None
        main, variance_channels = prediction.chunk(2, dim=1)
        return main, variance_channels

    def denoised(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Denoised:
        """Convert a prediction to the x_0 and the noise it implies.

        Finite at every timestep. Two conversions divide by a small number, which enlarges errors,
        rounding errors among them. With epsilon it is the signal, 4.9e-5 at the last step of the
        cosine schedule: an error of the noise becomes 2e4 times as large in x_0. With x0 it is
        sigma, 6.4e-3 at the first step. v and flow divide by nothing.

        Args:
            prediction: (N, C, H, W), or (N, 2C, H, W) with variance channels, which are ignored.
            x_t: (N, C, H, W).
            t: (N,) int64, or (1,) for all.
        """
        main, x_t = self.split(prediction)[0].float(), x_t.float()
        signal, sigma = _at(self.signal, t), _at(self.sigma, t)
        if self.objective == "epsilon":
            return Denoised((x_t - sigma * main) / signal, main)
        if self.objective == "x0":
            return Denoised(main, (x_t - signal * main) / sigma)
        if self.objective == "flow":
            return Denoised(x_t - sigma * main, x_t + signal * main)
        return Denoised(signal * x_t - sigma * main, sigma * x_t + signal * main)

    def p_mean_variance(self, prediction: Tensor, x: Tensor, t: Tensor) -> GaussianStep:
        """Turn a prediction into p(x_{t-1} | x_t); not for flow, which is no Gaussian chain.

        A learned variance lies between the posterior's (-1) and beta (1), in logarithms (improved
        DDPM, Eq. 15); a fixed one is the larger of the two, as in DiT.

        Args:
            prediction: as for `denoised`.
            x: (N, C, H, W) x_t.
            t: (N,) int64, or (1,) for all.
        """
        assert self.objective != "flow", "rectified flow has no Gaussian reverse step"
        x = x.float()
        variance_channels = self.split(prediction)[1]
        if variance_channels is None:
            log_variance = _at(self.large_log_variance, t).expand_as(x)
        else:
            fraction = (variance_channels.float() + 1.0) / 2.0
            low, high = _at(self.posterior_log_variance, t), _at(self.log_betas, t)
            log_variance = fraction * high + (1.0 - fraction) * low
        implied = self.denoised(prediction, x, t)
        mean = self._posterior_mean(implied.x_start, x, t)
        return GaussianStep(mean, log_variance, implied.x_start, implied.noise)

    def loss_terms(
        self, prediction: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the two loss terms of every sample, without any weight.

        Args:
            prediction: (N, C or 2C, H, W), any float dtype; the loss is computed in float32.
            x_start: (N, C, H, W) final latents; x_t and noise are of the same shape.
            t: (N,) int64.

        Returns:
            mse (N,): mean squared error of what the network predicts.
            vlb (N,): variational bound in bits per element, which trains the variance channels
                only: KL to the posterior, or the decoder's likelihood at t = 0. Zero with a fixed
                variance. The official code does not multiply it by S / 1,000 either. It measures
                errors of x_0 in units of the reverse step, which is tiny near t = 0: with objective
                x0 it is in the hundreds there until x_0 is predicted well.
        """
        prediction = prediction.float()
        main, variance_channels = self.split(prediction)
        mse = (main - self.target(x_start, noise, t)).square().flatten(1).mean(1)
        if variance_channels is None:
            return mse, torch.zeros_like(mse)
        frozen = torch.cat((main.detach(), variance_channels), dim=1)
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
        kl = gaussian_kl(
            self._posterior_mean(x_start, x_t, t),
            _at(self.posterior_log_variance, t),
            step.mean,
            step.log_variance,
        )
        nll = -binned_log_likelihood(x_start, step.mean, 0.5 * step.log_variance)
        nats = torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1))
        return nats / math.log(2.0)


def _at(table: Tensor, t: Tensor) -> Tensor:
    """Look up (S,) at t (N,), as (N, 1, 1, 1) float32."""
    return table[t].float()[:, None, None, None]
