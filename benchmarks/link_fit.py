"""Fit the constants of the cost model to this machine's CPU, from short measurements.

Two processes measure the rates of products, memory and links. One process trains with two
micro-batch sizes, and under ZeRO 3, for the rest: memory-bound work, and the time that a block
takes at any batch size. No constant is fitted to steps of more processes, which the model predicts.
"""

import dataclasses
import os
from pathlib import Path

import numpy as np

from benchmarks import rank_steps
from benchmarks.cost_model import predict
from benchmarks.hardware import GIB, GIGA, MICRO, TERA, Machine
from benchmarks.layouts import layout_of, workload_of
from benchmarks.rank_steps import LINK_BYTES, LinkTimes, RankRates, StepJob
from benchmarks.routing_shares import prior_shares
from benchmarks.start_ranks import run_on_ranks
from training.config.deepspeed_config import merge_deepspeed
from training.config.precision import detect_hardware
from training.config.tree import Config

NUM_RANKS = 2
MICRO_BATCHES = (4, 16)  # what grows with the batch, and what does not
NUM_STEPS = 4


def fit_cpu(config: Config) -> Machine:
    """Measure this machine.

    Args:
        config: whose width and blocks the constants are fitted for.
    """
    work = workload_of(config)
    width, has_bf16 = work.network.hidden_size, detect_hardware().has_bf16
    dtypes = ["float32", "bfloat16"] if has_bf16 else ["float32"]
    widths = [width // 2, width, 2 * width]
    links = run_on_ranks(NUM_RANKS, rank_steps.measure_links)
    rates = run_on_ranks(NUM_RANKS, rank_steps.measure_rates, widths, dtypes)
    cores = len(os.sched_getaffinity(0))
    machine = _from_rates(rates, _from_links(links), has_bf16, cores)
    return _with_steps(config, machine)


def _from_links(times: LinkTimes) -> dict[str, float]:
    """Turn times of two processes into a link's latency and rates."""
    latency_sec, reduce_rate = fit_line(LINK_BYTES, times.all_reduce)
    # Two processes: an all-reduce sends all bytes once, the others half of them.
    halves = [num_bytes / 2 for num_bytes in LINK_BYTES]
    _, gather_rate = fit_line(halves, times.all_gather)
    _, exchange_rate = fit_line(halves, times.all_to_all)
    best = max(reduce_rate, gather_rate, exchange_rate)
    return {
        "node_link_gb_per_sec": best / GIGA,
        "node_latency_us": latency_sec / 2 / MICRO,  # there and back
        "all_reduce_share": reduce_rate / best,
        "all_gather_share": gather_rate / best,
        "all_to_all_share": exchange_rate / best,
    }


def fit_line(num_bytes: list[float], seconds: list[float]) -> tuple[float, float]:
    """Fit seconds = latency + bytes / rate, with equal weight on every point.

    Returns:
        The latency, s, and the rate, bytes/s; both positive.
    """
    x, y = np.asarray(num_bytes, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    columns = np.stack([np.ones_like(x), x], axis=1) / y[:, None]  # relative errors
    latency, slope = np.linalg.lstsq(columns, np.ones_like(y), rcond=None)[0]
    return max(float(latency), 0.0), 1.0 / max(float(slope), (y[-1] / x[-1]) / 10)


def _from_rates(rates: RankRates, links: dict[str, float], has_bf16: bool, cores: int) -> Machine:
    peaks, half_width = {}, 0.0
    for name in ("bfloat16", "float32"):
        points = {w: rate for (dtype, w), rate in rates.products_per_sec.items() if dtype == name}
        if points:
            # rate = peak * w / (w + half): seconds per FLOP are a line in 1 / w.
            inverse = [1 / w for w in points]
            intercept, _ = fit_line(inverse, [1 / rate for rate in points.values()])
            peaks[name] = 1 / intercept if intercept else max(points.values())
            middle = sorted(points)[len(points) // 2]
            peaks[name] = max(peaks[name], points[middle])
            half_width = middle * (peaks[name] / points[middle] - 1)
    shared = min(rates.shared_bytes_per_sec, rates.memory_bytes_per_sec)
    return Machine(
        name="cpu",
        source=f"measured here and now: {cores} cores, {NUM_RANKS} processes of one thread, gloo",
        has_bf16=has_bf16,
        is_synchronous=True,
        ranks_per_node=1024,  # all of them
        cores_per_node=cores,
        bf16_tflops=peaks.get("bfloat16", peaks["float32"]) / TERA,
        fp32_tflops=peaks["float32"] / TERA,
        half_width=half_width,
        memory_gb_per_sec=rates.memory_bytes_per_sec / GIGA,
        node_memory_gb_per_sec=NUM_RANKS * shared / GIGA,
        pointwise_passes=0.0,
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB,
        **links,
    )


def _with_steps(config: Config, machine: Machine) -> Machine:
    """Fit what a step of one process takes beside its products and the optimizer."""
    files = [Path("ds_configs/zero0.json")] * len(MICRO_BATCHES) + [Path("ds_configs/zero3.json")]
    jobs = [
        StepJob(_one_process(config, micro), path)
        for micro, path in zip((*MICRO_BATCHES, MICRO_BATCHES[-1]), files, strict=True)
    ]
    seconds = run_on_ranks(1, rank_steps.measure_steps, jobs, NUM_STEPS)
    left = [sec - _predicted(job, machine) for job, sec in zip(jobs, seconds, strict=True)]
    unit = dataclasses.replace(machine, pointwise_passes=1.0)  # what one pass adds
    passes = [_predicted(job, unit) - _predicted(job, machine) for job in jobs[:2]]
    slope = max(0.0, (left[1] - left[0]) / (passes[1] - passes[0]))
    block_sec = max(0.0, left[0] - slope * passes[0]) / workload_of(config).network.depth
    machine = dataclasses.replace(
        machine, pointwise_passes=slope, block_overhead_us=block_sec / MICRO
    )
    gather_sec = max(0.0, seconds[2] - _predicted(jobs[2], machine))
    gather_us = gather_sec / workload_of(config).network.depth / MICRO
    return dataclasses.replace(machine, gather_overhead_us=gather_us)


def _one_process(config: Config, micro_batch_size: int) -> Config:
    optim = dataclasses.replace(
        config.optim, global_batch_size=micro_batch_size, micro_batch_size=None
    )
    run = dataclasses.replace(config.run, expert_parallel_size=1)
    return dataclasses.replace(config, optim=optim, run=run)


def _predicted(job: StepJob, machine: Machine) -> float:
    layout = layout_of(job.config, merge_deepspeed(job.deepspeed, job.config, 1), 1)
    return predict(workload_of(job.config), layout, machine, prior_shares(job.config, 1)).sec
