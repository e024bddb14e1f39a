"""Metrics of a logging interval: summed on the device, reduced over ranks in one collective.

Sums are taken from what a micro-step returned, outside the model, so accumulation counts every
micro-step and activation recomputation counts nothing twice.

What the counts say of experts is in monitoring/expert_load.py.

N samples, L blocks, E experts, K experts per sample, B timestep buckets.
"""

import resource
import sys
import time
from typing import NamedTuple

import torch
from torch import Tensor

from models.diffusion import LossTerms
from models.gate import RoutingPlan
from training.monitoring.expert_load import (
    ExchangeShape,
    ExchangeSums,
    entropy_by_timestep,
    load_metrics,
)

NUM_TIMESTEP_BUCKETS = 10


class Interval(NamedTuple):
    """What happened since the last `reduce`, over all ranks."""

    metrics: dict[str, float]
    step_losses: dict[int, float]  # total loss of each step, NaN where it is not finite
    expert_count: Tensor | None = None  # (L, E, B) float64 on the host; None if nothing counted


class MetricSums:
    """Running sums of one rank over the micro-steps since the last `reduce`.

    A micro-step whose loss is not finite is left out, except from `step_losses`: its step changed
    nothing.

    Args:
        depth: L.
        num_experts: E; 0 = a model without experts.
        num_timesteps: S.
        device: of the training.
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
        self.depth, self.num_experts, self.num_timesteps = depth, num_experts, num_timesteps
        self.device, self.exchange = device, exchange
        self._clear()

    def _clear(self) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=self.device)

        self._num_samples, self._num_finite = 0, zeros(1)
        self._terms = zeros(len(LossTerms._fields))
        self._step_loss: dict[int, Tensor] = {}  # step -> mean over this rank's samples
        self._bucket_mse, self._bucket_count = (zeros(NUM_TIMESTEP_BUCKETS) for _ in range(2))
        # Flat per block, expert by expert, so that one scatter counts both.
        self._expert_count = zeros(self.depth, self.num_experts * NUM_TIMESTEP_BUCKETS)
        self._exchanged = self.exchange and ExchangeSums(self.depth, self.exchange)
        self._wait_sec = 0.0
        self._clock_started = time.monotonic()

    def restart_clock(self) -> None:
        """Start timing an interval that holds no step yet: what came before was not training."""
        assert self._num_samples == 0, "the interval has begun; reduce it first"
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
        self._num_samples += N
        values = torch.stack([term.detach() for term in terms]).double()
        is_finite = torch.isfinite(values).all()
        self._num_finite += N * is_finite
        self._terms += N * torch.where(is_finite, values, 0.0)
        total = values[LossTerms._fields.index("total")]
        self._step_loss[step] = self._step_loss.get(step, 0.0) + total / num_micro_steps
        bucket = t * NUM_TIMESTEP_BUCKETS // self.num_timesteps  # (N,)
        ones = is_finite.double().expand(N)
        self._bucket_mse.index_add_(0, bucket, torch.where(is_finite, mse.double(), 0.0))
        self._bucket_count.index_add_(0, bucket, ones)
        if plan is not None:
            place = plan.expert_index * NUM_TIMESTEP_BUCKETS + bucket[:, None]  # (L, N, K)
            place = place.flatten(1)
            self._expert_count.scatter_add_(1, place, is_finite.double().expand(place.shape))
        if self._exchanged is not None:
            self._exchanged.add(plan)
        self._wait_sec += wait_sec

    def reduce(self) -> Interval:
        """Sum over ranks, name the results and start a new interval. All ranks must call this."""
        elapsed = time.monotonic() - self._clock_started
        host = torch.tensor(
            [self._num_samples, self._wait_sec / elapsed, elapsed], dtype=torch.float64
        )
        exchanged = torch.zeros(0) if self._exchanged is None else self._exchanged.flat()
        parts = [
            host.to(self.device),
            exchanged.to(self.device),
            self._num_finite,
            self._terms,
            torch.stack(list(self._step_loss.values())),
            self._bucket_mse,
            self._bucket_count,
            self._expert_count.flatten(),
        ]
        sums = torch.cat(parts)
        torch.distributed.all_reduce(sums)
        parts = sums.cpu().split([len(part) for part in parts])
        (num_samples, wait, elapsed), exchanged, num_finite, terms, steps, *buckets, count = parts
        world_size = torch.distributed.get_world_size()
        num_finite = float(num_finite)
        metrics, expert_count = {}, None
        if num_finite > 0:
            metrics |= {
                f"loss/{name}": float(value) / num_finite
                for name, value in zip(LossTerms._fields, terms, strict=True)
            }
            metrics |= _bucket_metrics(*buckets, self.num_timesteps)
            if self.num_experts:
                expert_count = count.view(self.depth, self.num_experts, NUM_TIMESTEP_BUCKETS)
                metrics |= load_metrics(expert_count.sum(dim=2), num_finite)
                metrics |= entropy_by_timestep(expert_count, _ranges(self.num_timesteps))
        if self._exchanged is not None:
            metrics |= self._exchanged.metrics(
                exchanged, float(num_samples), len(self._step_loss), world_size
            )
        metrics["speed/samples_per_sec"] = float(num_samples) / (float(elapsed) / world_size)
        metrics["speed/data_wait_pct"] = 100.0 * float(wait) / world_size
        metrics |= _memory_metrics(self.device)
        step_losses = (steps / world_size).tolist()
        interval = Interval(
            metrics, dict(zip(self._step_loss, step_losses, strict=True)), expert_count
        )
        self._clear()
        return interval


def _ranges(num_timesteps: int) -> list[str]:
    """Name the B ranges of timesteps."""
    width = num_timesteps / NUM_TIMESTEP_BUCKETS
    return [
        f"{round(b * width):03d}-{round((b + 1) * width) - 1:03d}"
        for b in range(NUM_TIMESTEP_BUCKETS)
    ]


def _bucket_metrics(mse: Tensor, count: Tensor, num_timesteps: int) -> dict[str, float]:
    """Mean mse per range of timesteps; a range that drew no sample is left out."""
    return {
        f"mse_by_timestep/{name}": float(mse[b] / count[b])
        for b, name in enumerate(_ranges(num_timesteps))
        if count[b] > 0
    }


def _memory_metrics(device: torch.device) -> dict[str, float]:
    """Peak memory of this process in GiB: reserved on the GPU, and resident on the host."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    metrics = {"memory/max_rss_gib": peak / (2**30 if sys.platform == "darwin" else 2**20)}
    if device.type == "cuda":
        metrics["memory/max_reserved_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
    return metrics
