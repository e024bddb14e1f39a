"""Slow, obvious versions of objectives, loss weights and timestep densities, in float64 NumPy."""

import math

import numpy as np

from tests.support import reference


def process(objective, noise_schedule, num_timesteps):
    """Signal and sigma of every timestep, as lists."""
    if objective == "flow":
        sigmas = [(t + 1) / num_timesteps for t in range(num_timesteps)]
        return [1 - sigma for sigma in sigmas], sigmas
    powers = reference.signal_power(noise_schedule, num_timesteps)
    return [math.sqrt(p) for p in powers], [math.sqrt(1 - p) for p in powers]


def target_coefficients(objective, signal, sigma):
    """What the network predicts as (factor of x_0, factor of the noise)."""
    return {
        "epsilon": (0.0, 1.0),
        "x0": (1.0, 0.0),
        "v": (-sigma, signal),
        "flow": (-1.0, 1.0),
    }[objective]


def target(objective, x_start, noise, signal, sigma):
    """What the network should predict."""
    of_start, of_noise = target_coefficients(objective, signal, sigma)
    return of_start * np.asarray(x_start, np.float64) + of_noise * np.asarray(noise, np.float64)


def implied(objective, prediction, x_t, signal, sigma):
    """(x_0, noise) that a prediction implies: two equations with two unknowns, solved."""
    rows = np.array([[signal, sigma], target_coefficients(objective, signal, sigma)])
    given = np.stack([np.ravel(np.asarray(a, np.float64)) for a in (x_t, prediction)])
    x_start, noise = np.linalg.solve(rows, given)
    return x_start.reshape(np.shape(x_t)), noise.reshape(np.shape(x_t))


def published_weight(kind, objective, snr, sigma, gamma):
    """The factor of a squared error at one timestep, from the formulas as their papers print them.

    For flow, whose formulas are not printed anywhere, through the error of x_0.
    """
    if kind == "cosmap":
        return 2 / (math.pi - 2 * math.pi * sigma + 2 * math.pi * sigma**2)
    if kind == "sigma_sqrt":
        return 1 / sigma**2
    if kind == "min_snr":
        return {
            "epsilon": min(snr, gamma) / snr if snr else 1.0,
            "x0": min(snr, gamma),
            "v": min(snr, gamma) / (snr + 1),
            "flow": min(snr, gamma) * sigma**2,
        }[objective]
    if kind == "p2":
        of_noise = 1 / (1 + snr) ** gamma
        # |error of the noise|^2 = SNR * |error of x_0|^2
        of_start = of_noise * snr
        return {
            "epsilon": of_noise,
            "x0": of_start,
            "v": of_start / (snr + 1),
            "flow": of_start * sigma**2,
        }[objective]
    return 1.0


def official_uncertainty_loss(losses_of_clusters, log_variances):
    """The official code's loss: a sum over 8 equally large clusters."""
    total = 0.0
    for losses, s in zip(losses_of_clusters, log_variances, strict=True):
        total += 0.5 * (math.exp(-s) * (np.mean(losses) / 8) + s)
    return total


def official_clusters(num_timesteps):
    """First timestep and end of each of the official code's 8 clusters."""
    return [(int(num_timesteps / 8 * c), int(num_timesteps / 8 * (c + 1))) for c in range(8)]


def logit_normal_cdf(times, mean, std, num_points=400_001):
    """SD3, Eq. 19, integrated with the trapezoidal rule."""
    x = np.linspace(0, 1, num_points)[1:-1]
    logit = np.log(x / (1 - x))
    density = np.exp(-((logit - mean) ** 2) / (2 * std**2)) / (
        std * math.sqrt(2 * math.pi) * x * (1 - x)
    )
    area = np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(x))))
    return np.interp(times, x, area)


def mode_cdf(times, scale, num_points=400_001):
    """How many of the values of SD3, Eq. 20, over evenly spaced u lie below a time."""
    u = (np.arange(num_points) + 0.5) / num_points
    values = np.sort(1 - u - scale * (np.cos(math.pi / 2 * u) ** 2 - 1 + u))
    return np.searchsorted(values, times) / num_points


def unshifted(times, shift):
    """Inverse of SD3, Eq. 23, t' = s t / (1 + (s - 1) t), solved for t."""
    return times / (shift - (shift - 1) * times)


def density_cdf(times, density, mean, std, scale, shift):
    """The distribution function of a density after the shift."""
    times = unshifted(np.asarray(times, np.float64), shift)
    if density == "logit_normal":
        return logit_normal_cdf(times, mean, std)
    if density == "mode":
        return mode_cdf(times, scale)
    return times
