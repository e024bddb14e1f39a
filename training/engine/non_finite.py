"""Find losses and gradients that are not finite, and losses that jump."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.diffusion import LossTerms
from training.engine.objective import SampleLosses

MAX_TIMESTEPS_SHOWN = 8
SPIKE_MEMORY_STEPS = 100  # time constant of the recent mean and variance
SPIKE_WARMUP_STEPS = 50  # with fewer losses seen, their spread is not known


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


class Spike(NamedTuple):
    """A loss far above those before it."""

    step: int
    loss: float
    mean: float  # of the recent losses before it
    deviations: float  # distance from the mean, in their standard deviations

    def __str__(self) -> str:
        return (
            f"loss spike at step {self.step}: {self.loss:.4g} is {self.deviations:.1f} standard "
            f"deviations above its recent mean {self.mean:.4g}"
        )


class SpikeDetector:
    """Find losses that lie far above an exponential moving mean and deviation of earlier ones.

    It needs losses of single steps, as reduced over all ranks, but not at once: it can be fed at
    the end of a logging interval. It starts anew when a run is resumed.

    Args:
        threshold: standard deviations; 0 = never.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._mean, self._variance, self._num_seen = 0.0, 0.0, 0

    def add(self, step: int, loss: float) -> Spike | None:
        """Compare the loss of a step with those before it, then remember it."""
        spike = None
        difference = loss - self._mean
        deviation = math.sqrt(self._variance)
        if 0 < self.threshold * deviation < difference and self._num_seen >= SPIKE_WARMUP_STEPS:
            spike = Spike(step, loss, self._mean, difference / deviation)
            # One outlier must not hide the next: it counts as the largest loss that is none.
            difference = self.threshold * deviation
        self._num_seen += 1
        rate = max(1.0 / self._num_seen, 1.0 / SPIKE_MEMORY_STEPS)
        self._mean += rate * difference
        self._variance = (1.0 - rate) * (self._variance + rate * difference * difference)
        return spike
