"""Leave out steps whose loss or gradient is not finite, on all ranks alike, and say why."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.diffusion import LossTerms
from training.engine.objective import SampleLosses

MAX_TIMESTEPS_SHOWN = 8


def poison_non_finite(loss: Tensor) -> Tensor:
    """Return the loss, with gradients that are all NaN where it is not finite itself.

    An infinite loss can have finite gradients, which nobody would notice on another rank. NaN
    reaches every rank with the averaging of gradients, so all of them leave the step out.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)


class MicroStepRecord(NamedTuple):
    """Losses and timesteps of one micro-step, on the device, to say why its step was left out."""

    terms: LossTerms
    samples: SampleLosses
    t: Tensor  # (N,) int64


def describe_non_finite(records: list[MicroStepRecord]) -> str:
    """Say on which ranks and at which timesteps a step was not finite. All ranks must call this.

    Args:
        records: of this rank's micro-steps.
    """
    causes, timesteps = [], []
    for record in records:
        timesteps += record.t.tolist()
        wrong = [
            f"{name} is {value.item()}"
            for name, value in record.terms._asdict().items()
            if not torch.isfinite(value)
        ]
        if wrong:
            is_wrong = ~torch.isfinite(record.samples.mse + record.samples.vlb)
            causes.append(", ".join(wrong) + _at_timesteps(record.t[is_wrong].tolist()))
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, (causes, timesteps))
    lines = [f"rank {rank}: {one}" for rank, (those, _) in enumerate(everyone) for one in those]
    if lines:
        return "; ".join(lines)
    # Gradients are averaged before anybody looks at them, so the rank is not known any more.
    trained = [f"rank {rank}{_at_timesteps(t)}" for rank, (_, t) in enumerate(everyone)]
    return "a gradient is not finite although every loss is; " + ", ".join(trained)


def _at_timesteps(timesteps: list[int]) -> str:
    if not timesteps:
        return ""
    shown = ", ".join(str(t) for t in timesteps[:MAX_TIMESTEPS_SHOWN])
    left = len(timesteps) - MAX_TIMESTEPS_SHOWN
    return f" at timesteps {shown}" + (f" and {left} more" if left > 0 else "")
