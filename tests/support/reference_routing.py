"""Slow, obvious versions of routing: experts and masks one sample and one cell at a time."""

import math

import numpy as np
import torch

from tests.support.reference import top_k_experts


def affine_expert(x, weight, bias):
    return x @ weight + bias


def mlp_expert(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    hidden = x @ fc1_weight + fc1_bias
    inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
    return (0.5 * hidden * (1 + torch.tanh(inner))) @ fc2_weight + fc2_bias


def mixture_of(expert, x, probs, parameters, top_k, renormalize=False):
    """sum over the top k of g_e expert_e(x), one sample and one expert at a time."""
    outputs = []
    for sample, sample_probs in zip(x, probs, strict=True):
        chosen = top_k_experts(sample_probs, top_k)
        scale = sum(value for _, value in chosen) if renormalize else 1.0
        total = torch.zeros_like(sample)
        for e, value in chosen:
            total = total + value / scale * expert(sample, *(p[e] for p in parameters))
        outputs.append(total)
    return torch.stack(outputs)


def expert_rows(expert_index, held, received):
    """Group samples by expert: (places among `received`, experts from held[0] on, ends)."""
    samples, experts, ends = [], [], []
    for e in held:
        for place, row in enumerate(received):
            if e in expert_index[row].tolist():
                samples.append(place)
                experts.append(e - held[0])
        ends.append(len(samples))
    return samples, experts, ends


def channel_mask(num_timesteps, width, alpha, beta):
    """DTR's masks, one cell at a time."""
    mask = np.zeros((num_timesteps, width))
    num_open = int(width * beta)
    for t in range(num_timesteps):
        start = round((t / (num_timesteps - 1)) ** alpha * (width - num_open))
        for channel in range(start, start + num_open):
            mask[t, channel] = 1.0
    return mask
