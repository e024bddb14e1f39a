"""Slow, obvious versions of what models/ computes: loops and float64 NumPy, nothing shared."""

import math

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment


def top_k_experts(probs, top_k):
    """Sorted (expert, value) pairs of the k largest of one sample's gate values."""
    order = sorted(range(len(probs)), key=lambda e: -probs[e].item())[:top_k]
    return [(e, probs[e]) for e in sorted(order)]


def dispatch(expert_index, num_experts, rank, num_ranks):
    """What one block exchanges: (send rows, send splits, recv rows, recv splits) as lists."""
    num_samples = expert_index.shape[0] // num_ranks
    per_rank = num_experts // num_ranks
    holders = [{int(e) // per_rank for e in row} for row in expert_index]

    def rows_between(source, destination):
        first = source * num_samples
        return [n for n in range(first, first + num_samples) if destination in holders[n]]

    sends = [rows_between(rank, other) for other in range(num_ranks)]
    receives = [rows_between(other, rank) for other in range(num_ranks)]
    send_rows = [n - rank * num_samples for rows in sends for n in rows]
    recv_rows = [n for rows in receives for n in rows]
    return send_rows, [len(r) for r in sends], recv_rows, [len(r) for r in receives]


def prior_map(num_timesteps, depth, num_experts, top_k, alpha):
    """The prior, one cell at a time."""
    num_units, window = depth * num_experts, depth * top_k
    table = np.zeros((num_timesteps, num_units))
    for t in range(num_timesteps):
        start = round((t / (num_timesteps - 1)) ** alpha * (num_units - window))
        for unit in range(start, start + window):
            table[t, unit] = 1.0
    return table


def matched_prior_loss(gate_table, top_k, prior, t, gate_order, prior_order):
    """Prior loss after matching by the (S, U, U) tensor of differences.

    The loss is taken in the permuted order, where the assignment was found.
    """
    depth, num_timesteps, num_experts = gate_table.shape
    probs = gate_table.permute(1, 0, 2).reshape(num_timesteps, depth * num_experts)
    uses = torch.zeros_like(probs)
    for s in range(num_timesteps):
        for block in range(depth):
            for e, _ in top_k_experts(gate_table[block, s], top_k):
                uses[s, block * num_experts + e] = 1.0
    uses, gate = uses[:, gate_order], probs[:, gate_order] / depth
    shuffled = prior[:, prior_order]
    cost = (uses[:, :, None] - shuffled[:, None, :]).abs().sum(0)  # from (S, U, U)
    _, columns = linear_sum_assignment(cost.numpy())
    losses = []
    for timestep in t.tolist():
        p = gate[timestep].double().numpy()
        q = shuffled[timestep].double().numpy()[columns]
        q = q / q.sum()
        middle = np.log((p + q) / 2 + 1e-6)
        of_p = np.sum(p * (np.log(p + 1e-6) - middle))
        of_q = np.sum(q * (np.log(q + 1e-6) - middle))
        losses.append((of_p + of_q) / 2)
    return float(np.mean(losses))


def signal_power(noise_schedule, num_timesteps):
    """alphas_cumprod of the full chain, step by step."""
    powers, power = [], 1.0
    for step in range(num_timesteps):
        if noise_schedule == "linear":
            scale = 1000 / num_timesteps
            low, high = 1e-4 * scale, 2e-2 * scale
            beta = low + (high - low) * step / (num_timesteps - 1)
        else:

            def level(time):
                return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

            ratio = level((step + 1) / num_timesteps) / level(step / num_timesteps)
            beta = min(1 - ratio, 0.999)
        power *= 1 - beta
        powers.append(power)
    return np.array(powers)


def variational_bound(implied_start, channels, x_start, x_t, step, powers):
    """Bits per element of one sample at one step of the chain with these powers.

    All arrays are (C, H, W): the x_0 that the prediction implies, its variance channels, the truth.
    """
    implied_start = np.asarray(implied_start, np.float64)
    channels = np.asarray(channels, np.float64)
    x_start, x_t = np.asarray(x_start, np.float64), np.asarray(x_t, np.float64)
    power, previous = powers[step], powers[step - 1] if step else 1.0

    def posterior_variance(i):
        before = powers[i - 1] if i else 1.0
        return (1 - powers[i] / before) * (1 - before) / (1 - powers[i])

    def posterior_mean(start):
        alpha = power / previous
        of_start = (1 - alpha) * math.sqrt(previous) / (1 - power)
        return of_start * start + (1 - previous) * math.sqrt(alpha) / (1 - power) * x_t

    low = math.log(posterior_variance(max(step, 1)))
    high = math.log(1 - power / previous)
    log_variance = low + (channels + 1) / 2 * (high - low)
    mean = posterior_mean(implied_start)
    if step > 0:
        distance = (posterior_mean(x_start) - mean) ** 2
        ratio = np.exp(low - log_variance)
        kl = 0.5 * (log_variance - low + ratio - 1 + distance / np.exp(log_variance))
        return kl.mean() / math.log(2)

    def cdf(value):
        z = (value - mean) / np.exp(log_variance / 2)
        return 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    upper = np.where(x_start > 0.999, 1.0, cdf(x_start + 1 / 255))
    lower = np.where(x_start < -0.999, 0.0, cdf(x_start - 1 / 255))
    return -np.log(np.maximum(upper - lower, 1e-12)).mean() / math.log(2)


def exponential_average(trajectory, decay, warmup):
    """Average of a start and the values after each step, by every value's own weight."""
    decays = [
        min(decay, (1 + step) / (10 + step)) if warmup else decay
        for step in range(len(trajectory) - 1)
    ]
    total = math.prod(decays) * trajectory[0]
    for step, value in enumerate(trajectory[1:]):
        total = total + (1 - decays[step]) * math.prod(decays[step + 1 :]) * value
    return total


def power_function_average(trajectory, gamma):
    """Integral of tau^gamma over each step's unit of time, as its value's weight."""
    steps = len(trajectory) - 1
    total = 0.0
    for step, value in enumerate(trajectory[1:]):
        weight = ((step + 1) / steps) ** (gamma + 1) - (step / steps) ** (gamma + 1)
        total = total + weight * value
    return total
