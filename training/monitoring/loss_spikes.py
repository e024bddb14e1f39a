"""Find loss spikes: losses that lie far above the recent ones."""

import math
from typing import NamedTuple

MEMORY_STEPS = 100  # time constant of the recent mean and variance
WARMUP_STEPS = 50  # with fewer losses seen, their spread is not known


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
        if 0 < self.threshold * deviation < difference and self._num_seen >= WARMUP_STEPS:
            spike = Spike(step, loss, self._mean, difference / deviation)
            # One outlier must not hide the next: it counts as the largest loss that is none.
            difference = self.threshold * deviation
        self._num_seen += 1
        rate = max(1.0 / self._num_seen, 1.0 / MEMORY_STEPS)
        self._mean += rate * difference
        self._variance = (1.0 - rate) * (self._variance + rate * difference * difference)
        return spike
