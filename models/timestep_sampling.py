"""Draw the timesteps of a batch from a density over noise levels.

A timestep is a pure function of (seed, stream position). It is the same for any number of ranks and
micro-batches, and every rank can compute the timesteps of its whole expert-parallel group.

On the unit interval 0 is data and 1 is noise; the number u falls on timestep floor(u * S). The
densities and the shift are those of Esser et al. 2024 (SD3, arXiv 2403.03206), Eq. 19, 20 and 23.

N positions, S timesteps.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.randomness import Stream, integers, uniform

DENSITIES = ("uniform", "logit_normal", "mode")
# SD3, Eq. 20: outside of these scales the mapping of "mode" is not monotonic.
MODE_SCALE_MIN, MODE_SCALE_MAX = -1.0, 2.0 / (math.pi - 2.0)

QUANTILES_PER_TIMESTEP = 100  # from which `frequencies` counts how often a timestep is drawn


@dataclass(frozen=True, kw_only=True)
class TimestepSampling:
    """A density over timesteps.

    Args:
        num_timesteps: S.
        density: uniform; logit_normal: the logit of the time is normal with `mean` and `std`; mode:
            heavy in the middle for a positive `mode_scale`, at the ends for a negative one.
        is_stratified: cut the distribution into as many equal parts as the global batch has
            samples and draw one sample from each. Every batch permutes parts over samples anew.
        global_batch_size: positions of one optimizer step; used by stratification.
        mean: of logit_normal; above 0 is more noise.
        std: of logit_normal.
        mode_scale: of mode, within [MODE_SCALE_MIN, MODE_SCALE_MAX]; 0 is uniform.
        shift: moves the drawn times towards noise (above 1) or data (below): SD3, Eq. 23.
    """

    num_timesteps: int
    density: str = "uniform"
    is_stratified: bool = False
    global_batch_size: int = 1
    mean: float = 0.0
    std: float = 1.0
    mode_scale: float = 1.29
    shift: float = 1.0

    def __post_init__(self) -> None:
        assert self.density in DENSITIES, f"unknown density {self.density}"
        in_range = MODE_SCALE_MIN <= self.mode_scale <= MODE_SCALE_MAX
        assert in_range or self.density != "mode", "mode_scale is out of range"

    def draw(self, seed: int, positions: Tensor) -> Tensor:
        """Return the timesteps (N,) int64 of stream positions (N,) of one global batch."""
        if self.density == "uniform" and not self.is_stratified and self.shift == 1.0:
            return integers(seed, Stream.TIMESTEP, positions, self.num_timesteps)
        time = self.time(self._quantile(seed, positions))
        return (time * self.num_timesteps).long().clamp(0, self.num_timesteps - 1)

    def frequencies(self) -> NDArray[np.int64]:
        """Return how often each timestep is drawn, (S,), out of S * QUANTILES_PER_TIMESTEP."""
        count = self.num_timesteps * QUANTILES_PER_TIMESTEP
        time = self.time((torch.arange(count, dtype=torch.float64) + 0.5) / count)
        index = (time * self.num_timesteps).long().clamp(0, self.num_timesteps - 1)
        return index.bincount(minlength=self.num_timesteps).numpy()

    def time(self, quantile: Tensor) -> Tensor:
        """Map quantiles of the density, float64 in (0, 1), to times: the inverse of its CDF."""
        u = quantile
        if self.density == "logit_normal":
            u = torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
        elif self.density == "mode":
            # Eq. 20 at 1 - u, which has the same density and grows with u.
            u = u + self.mode_scale * (u - torch.sin(math.pi / 2.0 * u).square())
        return self.shift * u / (1.0 + (self.shift - 1.0) * u)

    def _quantile(self, seed: int, positions: Tensor) -> Tensor:
        """Draw (N,) float64 in (0, 1), each within its stratum if there are any."""
        # The middle of the bin of width 2^-24: never 0 or 1, where the normal quantile is infinite.
        u = uniform(seed, Stream.TIMESTEP, positions, 1)[:, 0].double() + 2.0**-25
        if not self.is_stratified:
            return u
        G = self.global_batch_size
        first = positions[0] // G * G
        # Checked on the CPU only: on a GPU the host would wait for the answer.
        assert positions.is_cuda or bool((positions // G * G == first).all()), "one global batch"
        batch = first + torch.arange(G, device=positions.device)
        keys = integers(seed, Stream.TIMESTEP_STRATUM, batch, (1 << 63) - 1)
        stratum = keys.argsort(stable=True).argsort()  # of every slot of the batch
        return (stratum[positions - first] + u) / G
