"""Measure training steps of real engines, links, products and memory on this machine's CPU.

Every rank is a process with one thread; gloo connects them. The best of several timings counts,
because other programs may use the machine too.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.start_ranks import slowest
from data_tools.stream.loader import Batch
from training.config.tree import Config

CPU = torch.device("cpu")
REPEATS = 5
LINK_BYTES = (4_096, 262_144, 2_097_152, 8_388_608)
MEMORY_BYTES = 64 * 2**20  # beyond the caches
PRODUCT_ROWS = 512


class StepJob(NamedTuple):
    """A layout to train for a few steps.

    Attributes:
        config: with its batch, micro-batch and expert-parallel size.
        deepspeed: the JSON file.
    """

    config: Config
    deepspeed: Path


class LinkTimes(NamedTuple):
    """Seconds of every size in LINK_BYTES."""

    all_reduce: list[float]
    all_gather: list[float]
    all_to_all: list[float]


class RankRates(NamedTuple):
    """What a process reaches.

    Attributes:
        products_per_sec: FLOP/s of fp32 (and bf16) products by width: (dtype name, width) -> rate.
        memory_bytes_per_sec: with the other processes idle.
        shared_bytes_per_sec: with all of them busy.
    """

    products_per_sec: dict[tuple[str, int], float]
    memory_bytes_per_sec: float
    shared_bytes_per_sec: float


def measure_links(_rank: int, world_size: int) -> LinkTimes:
    """Time the collectives, which exchange as many bytes in every call."""
    times = LinkTimes([], [], [])
    for num_bytes in LINK_BYTES:
        data = torch.zeros(num_bytes // 4)
        received = torch.empty_like(data)
        part = data[: len(data) // world_size].clone()
        calls = (
            lambda data=data: torch.distributed.all_reduce(data),
            lambda r=received, p=part: torch.distributed.all_gather_into_tensor(r, p),
            lambda r=received, d=data: torch.distributed.all_to_all_single(r, d),
        )
        inner = 20 if num_bytes < 2**20 else 3
        for kept, call in zip(times, calls, strict=True):
            kept.append(_best_together(call, inner))
    return times


def measure_rates(rank: int, world_size: int, widths: list[int], dtypes: list[str]) -> RankRates:
    """Time products, with all processes busy, and memory, with one and with all of them."""
    products = {}
    for name in dtypes:
        for width in widths:
            x = torch.randn(PRODUCT_ROWS, width).to(getattr(torch, name))
            weight = torch.randn(4 * width, width).to(x.dtype)
            flops = 2 * PRODUCT_ROWS * width * 4 * width
            sec = _best_together(lambda x=x, w=weight: F.linear(x, w), max(1, int(2e9 // flops)))
            products[name, width] = flops / sec
    a, b = torch.zeros(MEMORY_BYTES // 4), torch.zeros(MEMORY_BYTES // 4)
    alone = _best_together(lambda: a.add_(b) if rank == 0 else None, 2)
    shared = _best_together(lambda: a.add_(b), 2)
    crossing = 3 * MEMORY_BYTES  # two are read, one is written
    return RankRates(products, crossing / alone, crossing / shared)


def _best_together(call: Callable[[], Any], inner: int) -> float:
    """Return the seconds of a call: best of several, each the slowest rank's."""
    best = float("inf")
    call()
    for _ in range(REPEATS):
        torch.distributed.barrier()
        started = time.perf_counter()
        for _ in range(inner):
            call()
        elapsed_sec = (time.perf_counter() - started) / inner
        best = min(best, slowest(elapsed_sec, CPU))
    return best


def measure_steps(rank: int, world_size: int, jobs: list[StepJob], num_steps: int) -> list[float]:
    """Train every job for some steps after a first one; return the best step's seconds.

    Jobs of ZeRO 3 should come last: it replaces torch's linear layer for the process.
    """
    return [_measure_job(rank, world_size, job, num_steps) for job in jobs]


def _measure_job(rank: int, world_size: int, job: StepJob, num_steps: int) -> float:
    from training.config.deepspeed_config import merge_deepspeed
    from training.engine.build import build_engine
    from training.engine.objective import Objective

    merged = merge_deepspeed(job.deepspeed, job.config, world_size)
    with redirect_stdout(StringIO()):  # DeepSpeed prints that it makes groups of ranks
        engine = build_engine(job.config, merged)
    objective = Objective(job.config, rank, 1.0, 0.0, CPU, world_size=world_size)
    best = float("inf")
    for step in range(num_steps + 1):
        batches = list(_batches(job.config, engine, rank, world_size, step))
        torch.distributed.barrier()
        started = time.perf_counter()
        for batch in batches:
            micro_batch = objective.micro_batch(batch)
            output = engine(micro_batch.x_t, micro_batch.t, micro_batch.y, micro_batch.group_t)
            terms, _ = objective.loss(output, micro_batch, step)
            engine.backward(terms.total)
            engine.step()
        elapsed_sec = slowest(time.perf_counter() - started, CPU)
        if step > 0:  # the first one allocates
            best = min(best, elapsed_sec)
    engine.destroy()
    del engine, objective, output, terms
    gc.collect()
    return best


def _batches(config: Config, engine: Any, rank: int, world_size: int, step: int) -> Iterator[Batch]:
    """Make up this rank's micro-batches of a step."""
    N, count = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    C, H, W = config.model.latent_shape
    for i in range(count):
        first = (
            step * world_size + rank
        ) * count * N + i * N  # as data_tools.stream.loader deals them
        raw = torch.randn(N, 2 * C, H, W, generator=torch.Generator().manual_seed(first))
        labels = torch.zeros(N, dtype=torch.int64)
        yield Batch(raw.half(), labels, torch.arange(first, first + N))
