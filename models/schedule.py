"""Noise schedules: tables of signal and noise by timestep.

Every process is x_t = signal[t] * x_0 + sigma[t] * noise. t is an integer in [0, S), the number
that the network and its gate see; t = 0 has the least noise.

S timesteps of the chain.
"""

import math

import numpy as np

NOISE_SCHEDULES = ("cosine", "linear")

MAX_BETA = 0.999  # keeps the last step of the cosine schedule away from a division by zero
COSINE_OFFSET = 0.008  # s of improved DDPM, Eq. 17: beta does not vanish at t = 0
LINEAR_BETA_START, LINEAR_BETA_END = 1e-4, 2e-2  # of DDPM, for 1,000 timesteps
MIN_LINEAR_TIMESTEPS = 21  # with fewer, the last beta, 20 / S, leaves no signal


def straight_line(num_timesteps: int) -> np.ndarray:
    """Return sigma of rectified flow, (num_timesteps,) float64; signal is 1 - sigma.

    Timestep t stands for the time (t + 1) / S, so that the last one is noise only, where sampling
    starts, and the first one still has noise to remove.
    """
    return np.arange(1, num_timesteps + 1) / num_timesteps


def betas(noise_schedule: str, num_timesteps: int) -> np.ndarray:
    """Return beta_t of a diffusion process, (num_timesteps,) float64."""
    assert noise_schedule in NOISE_SCHEDULES, f"unknown noise schedule {noise_schedule}"
    if noise_schedule == "linear":
        assert num_timesteps >= MIN_LINEAR_TIMESTEPS, "beta must stay below 1"
        scale = 1000 / num_timesteps  # the same total noise for any number of timesteps
        return np.linspace(scale * LINEAR_BETA_START, scale * LINEAR_BETA_END, num_timesteps)
    time = np.arange(num_timesteps + 1) / num_timesteps
    level = np.cos((time + COSINE_OFFSET) / (1.0 + COSINE_OFFSET) * math.pi / 2.0) ** 2
    return np.minimum(1.0 - level[1:] / level[:-1], MAX_BETA)


def reverse_tables(alphas_cumprod: np.ndarray) -> dict[str, np.ndarray]:
    """Build the tables of q(x_{t-1} | x_t, x_0) (DDPM, Eq. 6 and 7).

    Args:
        alphas_cumprod: (S,) float64, signal squared.

    Returns:
        Tables (S,) float64, by name. The variance of the first step is 0, which has no logarithm;
        that of the second step replaces it. The large variance is beta, the other common choice for
        a reverse step (DDPM, Section 3.2), with the same first entry.
    """
    previous = np.append(1.0, alphas_cumprod[:-1])
    alphas = alphas_cumprod / previous
    steps = 1.0 - alphas
    posterior_variance = steps * (1.0 - previous) / (1.0 - alphas_cumprod)
    posterior_variance[0] = posterior_variance[1] if len(steps) > 1 else steps[0]
    return {
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": previous,
        "log_betas": np.log(steps),
        "large_log_variance": np.log(np.append(posterior_variance[0], steps[1:])),
        "posterior_log_variance": np.log(posterior_variance),
        "posterior_mean_of_x_start": steps * np.sqrt(previous) / (1.0 - alphas_cumprod),
        "posterior_mean_of_x_t": (1.0 - previous) * np.sqrt(alphas) / (1.0 - alphas_cumprod),
    }
