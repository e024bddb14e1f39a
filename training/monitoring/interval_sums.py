"""Sum a logging interval's metrics on the device and reduce them over ranks in one collective.

What is summed is in the registry (metrics.py), which decides where each sum lies in the vector that
travels. Sums are taken from what a micro-step returned, outside the model, so accumulation counts
every micro-step and activation recomputation counts nothing twice.

N samples, L blocks, E experts, K experts per sample, B ranges of timesteps.
"""

import resource
import sys
import time
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from models.diffusion import LossTerms
from models.gate import RoutingPlan
from training.monitoring import metrics as registry
from training.monitoring.expert_load import ExchangeShape
from training.monitoring.metric import NUM_RANGES, MicroStep, Sum, SumShape, Totals
from training.monitoring.sums import SERVED, expert_count


class Interval(NamedTuple):
    """What happened since the last `reduce`, over all ranks."""

    metrics: dict[str, float]
    step_losses: dict[int, float]  # total loss of each step, NaN where it is not finite
    expert_count: Tensor | None = None  # (L, E, B) float64 on the host; None if nothing counted


class _Vector:
    """Sums that lie in one float64 vector, behind one other number."""

    def __init__(self, sums: Iterable[Sum], shape: SumShape, device: torch.device) -> None:
        sizes = {sum_: size for sum_ in sums if (size := sum_.size(shape))}
        self.flat = torch.zeros(1 + sum(sizes.values()), dtype=torch.float64, device=device)
        self._sizes = [1, *sizes.values()]
        self.first, *places = self.flat.split(self._sizes)
        self.places = dict(zip(sizes, places, strict=True))

    def split(self, flat: Tensor) -> tuple[float, dict[Sum, Tensor]]:
        """Take a vector like this one apart: the number before the sums, and every sum."""
        first, *places = flat.split(self._sizes)
        return float(first), dict(zip(self.places, places, strict=True))

    def add(self, micro_step: MicroStep) -> None:
        """Add a micro-step to every sum."""
        for sum_, place in self.places.items():
            sum_.add(place, micro_step)


class MetricSums:
    """Running sums of one rank over the micro-steps since the last `reduce`.

    A micro-step whose loss is not finite is left out, except from `step_losses` and from what the
    host counts: its step changed nothing.

    Args:
        num_experts: E; 0 = a model without experts.
        exchange: what expert parallelism sends; None without it.
    """

    def __init__(
        self,
        depth: int,
        num_experts: int,
        num_timesteps: int,
        device: torch.device,
        exchange: ExchangeShape | None = None,
    ) -> None:
        self.shape = SumShape(depth, num_experts, num_timesteps, exchange)
        self.device = device
        self._tags: dict[Sum, list[str]] = {}
        for metric in registry.METRICS:
            if metric.sum is not None:
                self._tags.setdefault(metric.sum, []).append(metric.tag)
        self._clear()

    def _clear(self) -> None:
        # Before the sums: the seconds, and the samples of micro-steps whose loss is finite.
        self._on_host, self._on_device = (
            _Vector([one for one in self._tags if one.is_on_host == is_host], self.shape, device)
            for is_host, device in ((True, torch.device("cpu")), (False, self.device))
        )
        self._step_loss: dict[int, Tensor] = {}  # step -> mean over this rank's samples
        self._clock_started = time.monotonic()

    def restart_clock(self) -> None:
        """Start timing an interval that holds no step yet: what came before was not training."""
        assert not self._step_loss, "the interval has begun; reduce it first"
        self._clock_started = time.monotonic()

    def add(
        self,
        step: int,
        terms: LossTerms,
        mse: Tensor,
        t: Tensor,
        plan: RoutingPlan | None,
        wait_sec: float,
        num_micro_steps: int = 1,
    ) -> None:
        """Add one micro-step; nothing here waits for the device.

        Args:
            step: the optimizer step that it belongs to.
            terms: scalars, means over the micro-batch.
            mse: (N,) detached.
            t: (N,) int64.
            plan: this micro-step's routing; its expert_index is (L, N, K) for this rank's
                samples; None without experts.
            wait_sec: time this rank waited for the batch.
            num_micro_steps: equal micro-steps of a step.
        """
        N = t.shape[0]
        values = torch.stack([term.detach() for term in terms]).double()
        is_finite = torch.isfinite(values).all()
        total = values[LossTerms._fields.index("total")]
        self._step_loss[step] = self._step_loss.get(step, 0.0) + total / num_micro_steps
        micro_step = MicroStep(
            shape=self.shape,
            num_samples=N,
            wait_sec=wait_sec,
            is_finite=is_finite.double(),
            terms=N * torch.where(is_finite, values, 0.0),
            mse=torch.where(is_finite, mse.double(), 0.0),
            t=t,
            timestep_range=t * NUM_RANGES // self.shape.num_timesteps,
            plan=plan,
        )
        self._on_device.first.add_(micro_step.is_finite, alpha=N)
        self._on_device.add(micro_step)
        self._on_host.add(micro_step)

    def reduce(self) -> Interval:
        """Sum over ranks, name the results and start a new interval. All ranks must call this."""
        self._on_host.first[0] = time.monotonic() - self._clock_started
        parts = (
            self._on_host.flat.to(self.device),
            self._on_device.flat,
            torch.stack(list(self._step_loss.values())),
        )
        sums = torch.cat(parts)
        torch.distributed.all_reduce(sums)
        host, device, steps = sums.cpu().split([len(part) for part in parts])
        rank_sec, found = self._on_host.split(host)
        num_finite, of_device = self._on_device.split(device)
        if num_finite > 0:
            found |= of_device
        world_size = torch.distributed.get_world_size()
        totals = Totals(self.shape, num_finite, rank_sec, len(self._step_loss), world_size)
        values = _memory_metrics(self.device)
        for one, place in found.items():
            described = one.describe(place, totals)
            if not isinstance(described, dict):
                (tag,) = self._tags[one]  # of several metrics it must name the values itself
                described = {tag: described}
            values |= described
        count = expert_count(found[SERVED], self.shape) if SERVED in found else None
        losses = dict(zip(self._step_loss, (steps / world_size).tolist(), strict=True))
        self._clear()
        return Interval(values, losses, count)


def _memory_metrics(device: torch.device) -> dict[str, float]:
    """Peak memory of this process in GiB: reserved on the GPU, and resident on the host."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    metrics = {"memory/max_rss_gib": peak / (2**30 if sys.platform == "darwin" else 2**20)}
    if device.type == "cuda":
        metrics["memory/max_reserved_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
    return metrics
