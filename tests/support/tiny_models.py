"""The smallest network of any shape, a batch for it, and a loss of what it gives."""

import torch

from models.network_options import NetworkOptions
from models.switch_dit import SwitchDiT

TINY = {
    "input_size": (4, 6),
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 16,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 10,
    "num_experts": 4,
    "top_k": 2,
    "num_timesteps": 50,
}


def tiny_options(**changes):
    return NetworkOptions(**{**TINY, **changes})


def tiny_model(**changes):
    """A model whose parameters are all random, so that nothing is hidden by zeros."""
    model = SwitchDiT(tiny_options(**changes))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2, generator=generator)
    return model


def batch(num_samples=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(num_samples, 4, 4, 6, generator=generator)
    t = torch.randint(50, (num_samples,), generator=generator)
    y = torch.randint(11, (num_samples,), generator=generator)
    return x_t, t, y


def loss_of(output):
    return output.prediction.float().square().mean() + output.gate_table[:, :, 0].mean()
