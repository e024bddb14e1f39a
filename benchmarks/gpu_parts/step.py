"""Measure a training step of XL/2 on the real engine: time, memory, kernels."""

import math
import time
from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_parts.engines import Trainer
from benchmarks.gpu_parts.record import Record, Setting
from benchmarks.measure import synchronise
from models.flops import training_flops
from training.config.network import network_options
from training.cost.gpu_peaks import peak_tflops

GIB, TERA, MILLI, MICRO = 2**30, 1e12, 1e-3, 1e-6
WARM_UP, TIMED = 3, 8
LONGEST_KERNELS = 25
# Words in the names of kernels, first match first; anything else is "other".
KINDS = {
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "cublas"),
    "compiled": ("triton",),
    "many tensors at once": ("multi_tensor",),
}


def measure_step(setting: Setting, record: Record) -> None:
    """XL/2, 32 images, bf16: ZeRO 1 and 2, eager and compiled blocks."""
    preset, size = setting.preset("xl"), setting.pick(32, 2)
    trainer = Trainer(setting, preset, "zero1", size)
    _measure(setting, record, trainer, "ZeRO 1, eager")
    trainer.close()
    trainer = Trainer(setting, preset, "zero2", size)
    eager_sec = _measure(setting, record, trainer, "ZeRO 2, eager")
    if setting.is_gpu:  # a CPU would need a C++ compiler, and tell nothing of a GPU
        torch.compiler.reset()
        for block in trainer.engine.module.blocks:
            block.compile()
        compiled_sec = _measure(setting, record, trainer, "ZeRO 2, compiled")
        record.number("speed-up by compiled blocks, times", eager_sec / compiled_sec)
    trainer.close()


def _measure(setting: Setting, record: Record, trainer: Trainer, name: str) -> float:
    """Time steps; return the seconds of the best one."""
    device = setting.device
    if setting.is_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    trainer.step(0)
    synchronise(device)
    record.number(f"{name}: first step, s", time.perf_counter() - started)
    for i in range(1, setting.pick(WARM_UP, 1)):
        trainer.step(i)
    synchronise(device)
    best_sec = host_sec = math.inf
    for i in range(setting.pick(TIMED, 1)):
        started = time.perf_counter()
        trainer.step(WARM_UP + i)
        host_sec = min(host_sec, time.perf_counter() - started)
        synchronise(device)
        best_sec = min(best_sec, time.perf_counter() - started)
    options, size = network_options(trainer.config), trainer.config.optim.global_batch_size
    flops = training_flops(options, size)
    record.number(f"{name}: step, ms", best_sec / MILLI)
    record.number(f"{name}: of it until the host is done, ms", host_sec / MILLI)
    record.number(f"{name}: speed, images/s", size / best_sec)
    record.number(f"{name}: speed, TFLOP/s", flops / best_sec / TERA)
    if setting.is_gpu:
        if peak := peak_tflops(device):
            record.number(f"{name}: MFU, %", 100 * flops / best_sec / TERA / peak)
        memory = torch.cuda.max_memory_allocated(device) / GIB
        record.number(f"{name}: peak memory, GiB", memory)
        _profile(record, trainer, name)
    return best_sec


def _profile(record: Record, trainer: Trainer, name: str) -> None:
    """Say which kernels take a step's time."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        trainer.step(1)
        torch.cuda.synchronize()
    events = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    by_kind: Counter[str] = Counter()
    for event in events:
        by_kind[_kind_of(event.key)] += event.self_device_time_total * MICRO / MILLI
    record.number(f"{name}: kernels and copies, a step", sum(event.count for event in events))
    for kind, ms in by_kind.most_common():
        record.number(f"{name}: GPU time of {kind}, ms", ms)
    longest = sorted(events, key=lambda event: -event.self_device_time_total)[:LONGEST_KERNELS]
    for event in longest:
        ms = event.self_device_time_total * MICRO / MILLI
        record.remark(f"{name}: {ms:8.2f} ms in {event.count:4} x {event.key[:90]}")


def _kind_of(kernel: str) -> str:
    lower = kernel.lower()
    found = (kind for kind, words in KINDS.items() if any(word in lower for word in words))
    return next(found, "other")
