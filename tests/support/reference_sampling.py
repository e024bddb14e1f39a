"""Samplers as loops over timesteps in float64 NumPy, and data whose best denoiser is known.

A process is two lists, signal[t] and sigma[t], of x_t = signal x_0 + sigma noise; `predict` maps x
and t to what the network predicts. Timesteps increase; sampling walks them backwards.
"""

import math

import numpy as np

from tests.support import reference


def process(objective, noise_schedule="linear", num_timesteps=1000):
    """signal, sigma."""
    if objective == "flow":
        sigma = np.array([(t + 1) / num_timesteps for t in range(num_timesteps)])
        return 1 - sigma, sigma
    powers = reference.signal_power(noise_schedule, num_timesteps)
    return np.sqrt(powers), np.sqrt(1 - powers)


def implied(objective, prediction, x, signal, sigma):
    """The x_0 and the noise that solve x = signal x_0 + sigma noise and prediction = ..."""
    if objective == "x0":
        return prediction, (x - signal * prediction) / sigma
    if objective == "v":  # signal^2 + sigma^2 = 1
        return signal * x - sigma * prediction, sigma * x + signal * prediction
    assert objective == "epsilon"
    return (x - sigma * prediction) / signal, prediction


def ddim(objective, predict, x, timesteps, signal, sigma):
    """Song et al. 2021, Eq. 12 with sigma 0."""
    for i in reversed(range(len(timesteps))):
        t = timesteps[i]
        x_start, noise = implied(objective, predict(x, t), x, signal[t], sigma[t])
        if i == 0:
            return x_start
        before = timesteps[i - 1]
        x = signal[before] * x_start + sigma[before] * noise


def ddpm(objective, predict, x, timesteps, signal, sigma, noises, fraction=None):
    """Ho et al. 2020, Eq. 7; `fraction` of the way from the posterior's variance to beta, in logs.

    None is the fixed variance of DiT: beta, but in the second step the posterior's. noises: one
    per step, in the order in which they are taken.
    """
    noises = iter(noises)
    for i in reversed(range(len(timesteps))):
        t = timesteps[i]
        x_start, _ = implied(objective, predict(x, t), x, signal[t], sigma[t])
        if i == 0:
            return x_start
        power, previous = signal[t] ** 2, signal[timesteps[i - 1]] ** 2
        alpha = power / previous
        x = (
            math.sqrt(previous) * (1 - alpha) * x_start + math.sqrt(alpha) * (1 - previous) * x
        ) / (1 - power)
        low, high = math.log((1 - alpha) * (1 - previous) / (1 - power)), math.log(1 - alpha)
        log_variance = high if fraction is None else low + fraction * (high - low)
        x = x + math.exp(log_variance / 2) * next(noises)


def dpmpp_2m(objective, predict, x, timesteps, signal, sigma):
    """Lu et al. 2022 (2211.01095), Algorithm 2, and a last step of first order to sigma 0."""
    older, older_h = None, None
    for i in reversed(range(len(timesteps))):
        t = timesteps[i]
        x_start, _ = implied(objective, predict(x, t), x, signal[t], sigma[t])
        if i == 0:
            return x_start
        before = timesteps[i - 1]
        h = math.log(signal[before] / sigma[before]) - math.log(signal[t] / sigma[t])
        extrapolated = x_start
        if older is not None:
            r = older_h / h
            extrapolated = (1 + 1 / (2 * r)) * x_start - 1 / (2 * r) * older
        x = sigma[before] / sigma[t] * x - signal[before] * math.expm1(-h) * extrapolated
        older, older_h = x_start, h


def euler(predict, x, timesteps, sigma):
    """dx = velocity dsigma, down to sigma 0."""
    for i in reversed(range(len(timesteps))):
        below = sigma[timesteps[i - 1]] if i > 0 else 0.0
        x = x + (below - sigma[timesteps[i]]) * predict(x, timesteps[i])
    return x


def heun(predict, x, timesteps, sigma):
    """Mean of the velocities at both ends of a step; the last step, to sigma 0, is Euler's."""
    for i in reversed(range(len(timesteps))):
        below = sigma[timesteps[i - 1]] if i > 0 else 0.0
        length = below - sigma[timesteps[i]]
        velocity = predict(x, timesteps[i])
        if i > 0:
            ahead = predict(x + length * velocity, timesteps[i - 1])
            velocity = (velocity + ahead) / 2
        x = x + length * velocity
    return x


def best_prediction(objective, x, signal, sigma, mean, std):
    """The prediction of least squared error for data drawn from N(mean, std^2)."""
    x_start = mean + signal * std**2 / (signal**2 * std**2 + sigma**2) * (x - signal * mean)
    noise = (x - signal * x_start) / sigma
    return {
        "x0": x_start,
        "epsilon": noise,
        "v": signal * noise - sigma * x_start,
        "flow": noise - x_start,
    }[objective]


def flow_of_gaussian(x, signal, sigma, mean, std):
    """Where the probability flow with the best prediction takes x from (signal, sigma) to x_0.

    (x_t - signal mean) / sqrt(signal^2 std^2 + sigma^2) does not change along it.
    """
    return mean + std * (x - signal * mean) / np.sqrt(signal**2 * std**2 + sigma**2)
