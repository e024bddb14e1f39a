"""Profiles of the averages of the weights: how much each past step counts.

P parameters.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.config.tree import OptimConfig

EMA_KEY = "ema"  # state of the first average, the one that is sampled from


@dataclass(frozen=True)
class TraditionalProfile:
    """An exponential moving average: a step counts `decay` times as much as the one after it.

    Attributes:
        decay: weight of the old average, per step.
        has_warmup: use min(decay, (1 + step) / (10 + step)), step from 0, so that the random
            start is forgotten early.
    """

    decay: float
    has_warmup: bool = False

    @property
    def name(self) -> str:
        """What commands and file names call it."""
        return f"{self.decay:g}" if float(f"{self.decay:g}") == self.decay else repr(self.decay)

    def new_weight(self, steps: Tensor) -> Tensor | float:
        """Return the weight of the newest parameters after `steps` (P,) float64 steps, from 1."""
        if not self.has_warmup:
            return 1.0 - self.decay
        return 1.0 - (steps / (9.0 + steps)).clamp(max=self.decay)


@dataclass(frozen=True)
class PowerProfile:
    """The power function of EDM2 (arXiv 2312.02696, section 3.1): time i of n counts as i^gamma.

    Attributes:
        std: relative width sigma_rel, the profile's standard deviation as a part of the training.
    """

    std: float

    @property
    def name(self) -> str:
        """What commands and file names call it."""
        short = f"{self.std:.3f}"
        return f"std{short if float(short) == self.std else repr(self.std)}"

    @property
    def gamma(self) -> float:
        """The exponent."""
        return gamma_of_std(self.std)

    def new_weight(self, steps: Tensor) -> Tensor:
        """Return the weight of the newest parameters after `steps` (P,) float64 steps, from 1.

        1 - (1 - 1 / n)^(gamma + 1), written so that no digits are lost at large n.
        """
        return -torch.expm1((self.gamma + 1) * torch.log1p(-1 / steps))


Profile = TraditionalProfile | PowerProfile


def gamma_of_std(std: float) -> float:
    """Return the exponent of the power function with relative width `std`, in (0, 0.289).

    The largest root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / std^2.
    """
    power = std**-2.0
    roots = np.roots([1.0, 7.0, 16.0 - power, 12.0 - power])
    return float(roots[np.isreal(roots)].real.max())


def std_of_gamma(gamma: float) -> float:
    """Return the relative width of the power function with this exponent."""
    return float(np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))))


def profiles_of(optim: OptimConfig) -> dict[str, Profile]:
    """List a run's averages, decays first, by the key of their state and the stem of their file.

    The first is `ema`, whatever its profile, the others `ema-<name>`.
    """
    profiles: list[Profile] = [TraditionalProfile(d, optim.ema_warmup) for d in optim.ema_decays]
    profiles += [PowerProfile(std) for std in optim.ema_stds]
    return {
        EMA_KEY if i == 0 else f"{EMA_KEY}-{profile.name}": profile
        for i, profile in enumerate(profiles)
    }
