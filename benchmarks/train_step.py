"""Measure a training step, against the machine's limit and against the official code's way.

    python benchmarks/train_step.py                               # S/2, batch 8 and 32
    python benchmarks/train_step.py --peak-only                   # the rates of matrix products
    python benchmarks/train_step.py --device cuda --size XL --dtype bf16 --batch auto --compile

A step is forward pass, loss with the prior's, backward pass, AdamW and the average of the weights,
on random latents made beforehand. The best step of each side counts, because other programs may use
the machine too. On a CPU without bf16 instructions a step in bf16 takes minutes; it is measured
only if asked for.
"""

import argparse
import gc
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.measure import (
    HostReads,
    counted_flops,
    cuda_waits,
    describe_machine,
    model_product_rate,
    product_rates,
    saved_bytes,
    synchronise,
)
from benchmarks.sides import (
    DTYPES,
    OFFICIAL,
    Latents,
    Side,
    config_of,
    make_batch,
    official_side,
    our_side,
)
from data_tools.errors import ArgumentParser, ConfigError, exit_on_config_error, refuse_below_one
from data_tools.process.entry_point import enter
from models.flops import training_flops
from training.config.network import network_options
from training.config.precision import detect_hardware
from training.config.tree import Config

GIGA, GIB = 1e9, 2**30
LARGEST_BATCH = 1024
COLUMNS = (
    f"{'side':<18} {'ms/step':>9} {'images/s':>9} {'GFLOP':>9} {'counted':>9} {'GFLOP/s':>9} "
    f"{'peak':>5} {'GiB':>7} {'speed-up':>8}"
)
LEGEND = """
GFLOP: of the closed form, without recomputation; counted: by torch; peak: share of the large
product's rate; GiB: {memory}; speed-up: over the official way"""

SideMaker = Callable[[], Side]


class Result(NamedTuple):
    """What was measured of one side."""

    side_name: str
    is_merged: bool
    best_sec: float
    flops: int  # of a step, counted by torch
    memory_bytes: float  # peak on CUDA; on the CPU what is kept for the backward pass; nan unknown
    waits: Counter[str]  # where the host waits for the device in a step; empty if not traced


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="S", choices=("demo", "S", "B", "L", "XL"))
    parser.add_argument(
        "--batch",
        nargs="+",
        default=["8", "32"],
        metavar="N|auto",
        help="micro-batches; CUDA: auto",
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        default=None,
        choices=DTYPES,
        help="default: fp32, and bf16 where the hardware multiplies it",
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=None, help="of the CPU; default: torch's")
    parser.add_argument("--tf32", action="store_true", help="CUDA: fp32 products in TF32")
    parser.add_argument("--compile", action="store_true", help="add our side with compiled blocks")
    parser.add_argument(
        "--checkpointing", action="store_true", help="add our side with recomputed activations"
    )
    parser.add_argument("--no-official", action="store_true", help="leave the official way out")
    parser.add_argument("--peak-only", action="store_true", help="only the matrix products")
    parser.add_argument(
        "--trace-syncs", action="store_true", help="show where the host waits for the device"
    )
    return parser.parse_args(argv)


def select_device(args: argparse.Namespace) -> torch.device:
    """Return the device, set up as asked."""
    if args.device not in ("cpu", "cuda"):
        raise ConfigError(f"--device must be cpu or cuda, not {args.device}.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device here; use --device cpu.")
    refuse_below_one(args, "steps", "threads")
    for batch in args.batch:
        if batch == "auto" and args.device == "cpu":
            raise ConfigError("--batch auto fills the memory of a GPU; give a number on the CPU.")
        if batch != "auto" and not (batch.isdecimal() and int(batch) > 0):
            raise ConfigError(f"--batch must be a positive whole number or auto, not {batch}.")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    return torch.device(args.device)


def print_peaks(config: Config, device: torch.device, dtypes: list[str]) -> dict[str, float]:
    """Measure and print the rates of matrix products; return the best, FLOP/s, by dtype."""
    network, peaks = network_options(config), {}
    num_images = 64 if device.type == "cuda" else 8
    print(f"matrix products, GFLOP/s: large ones by layout; {config.model.size}'s linear layers")
    print(f"{'':<6} {'A B':>10} {'A B^T':>10} {'A^T B':>10} {f'{num_images} images':>12}")
    for name in dtypes:
        rates = product_rates(device, DTYPES[name])
        peaks[name] = max(rates)
        rows = num_images * network.num_tokens
        of_model = model_product_rate(
            device, DTYPES[name], rows, network.hidden_size, network.mlp_hidden_size
        )
        columns = " ".join(f"{rate / GIGA:>10,.1f}" for rate in rates)
        print(f"{name:<6} {columns} {of_model / GIGA:>12,.1f}", flush=True)
    return peaks


def side_makers(
    args: argparse.Namespace, config: Config, batch: Latents, dtype: torch.dtype
) -> list[SideMaker]:
    """Say how to build what is compared; the first is ours as it is by default."""
    configs = [config]
    if args.compile:
        configs.append(config_of(args.size, compile_blocks=True))
    if args.checkpointing:
        configs.append(config_of(args.size, checkpointing=True))
    makers: list[SideMaker] = [partial(our_side, c, batch, dtype) for c in configs]
    if not args.no_official:
        makers.append(partial(official_side, config, batch, dtype))
    return makers


def measure(
    makers: list[SideMaker], args: argparse.Namespace, device: torch.device
) -> list[Result]:
    """Time the sides.

    On a CPU they take turns, so that other load meets all alike; on a GPU they follow one another,
    so that each has the memory for itself.
    """
    if device.type == "cpu":
        return measure_in_turns([make() for make in makers], args, device)
    results = []
    for make in makers:
        try:
            results += measure_in_turns([make()], args, device)
        except torch.cuda.OutOfMemoryError as err:
            print(f"left out, no memory: {str(err).split('.')[0]}")
        gc.collect()
        torch.cuda.empty_cache()
    return results


def measure_in_turns(
    sides: list[Side], args: argparse.Namespace, device: torch.device
) -> list[Result]:
    """Count the first step of each side and time the next ones; the best counts."""
    flops, memory = zip(*(_count(side, device) for side in sides), strict=True)
    best, peak = [math.inf] * len(sides), 0
    for i in range(1, args.steps + 1):
        for k, side in enumerate(sides):
            synchronise(device)
            started = time.perf_counter()
            side.step(i)
            synchronise(device)
            best[k] = min(best[k], time.perf_counter() - started)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    return [
        Result(
            side.name,
            side.is_merged,
            best[k],
            flops[k],
            peak or memory[k],
            _waits(side, device) if args.trace_syncs else Counter(),
        )
        for k, side in enumerate(sides)
    ]


def _count(side: Side, device: torch.device) -> tuple[int, float]:
    """Take the first step; return its FLOPs and, on a CPU, the bytes it keeps for backward."""
    if side.is_compiled:  # torch counts no compiled operations, nor shows what they keep
        torch.compiler.reset()  # else another batch size would be compiled as a variable one
        side.step(0)
        flops, memory = 0, math.nan
    else:
        flops = counted_flops(lambda: side.step(0))
        is_on_cpu = device.type == "cpu"
        memory = saved_bytes(side.model, lambda: side.loss(0)) if is_on_cpu else math.nan
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return flops, memory


def _waits(side: Side, device: torch.device) -> Counter[str]:
    if device.type == "cuda":
        return cuda_waits(lambda: side.step(1))
    with HostReads() as reads:  # without the optimizer, whose step counts live on the host
        side.loss(1).backward()
    return reads.counts


def print_results(results: list[Result], batch_size: int, config: Config, peak: float) -> None:
    """Print a line per side."""
    official = {r.side_name: r.best_sec for r in results}.get(OFFICIAL, math.nan)
    network = network_options(config)
    for r in results:
        way = "merged" if r.is_merged else "dispatched"
        flops = training_flops(replace(network, expert_dispatch=way), batch_size)
        counted = f"{r.flops / GIGA:.1f}" if r.flops else "-"
        print(
            f"{r.side_name:<18} {1e3 * r.best_sec:>9.1f} {batch_size / r.best_sec:>9.2f} "
            f"{flops / GIGA:>9.1f} {counted:>9} {flops / r.best_sec / GIGA:>9.1f} "
            f"{flops / r.best_sec / peak:>5.0%} {r.memory_bytes / GIB:>7.2f} "
            f"{official / r.best_sec:>8.2f}"
        )
    for r in results:
        if r.waits:
            where = ", ".join(f"{place} x {count}" for place, count in r.waits.items())
            print(f"{r.side_name} waits for the device {r.waits.total()} times a step: {where}")


def largest_batch(args: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> int:
    """Find the largest power of two, or three quarters of one, that our step has memory for."""
    config, fits = config_of(args.size), 0
    for exponent in range(2, LARGEST_BATCH.bit_length()):
        for size in (3 * 2 ** (exponent - 2), 2**exponent):
            if not _fits(config, size, dtype, device):
                if not fits:
                    raise ConfigError(
                        f"--batch auto: {args.size} does not fit with {size} images; choose a "
                        "smaller --size."
                    )
                return fits
            fits = size
    return fits


def _fits(config: Config, batch_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    try:
        our_side(config, make_batch(config, batch_size, device), dtype).step(0)
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return True


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    with exit_on_config_error():
        args = parse(argv)
        device = select_device(args)
        config = config_of(args.size)
        print(describe_machine(device))
        if device.type == "cuda":
            print(f"TF32 for fp32 products: {'on' if args.tf32 else 'off'}")
        dtypes = args.dtype or (list(DTYPES) if detect_hardware().has_bf16 else ["fp32"])
        peaks = print_peaks(config, device, list(DTYPES) if args.peak_only else dtypes)
        if args.peak_only:
            return
        for name in dtypes:
            for text in args.batch:
                is_auto = text == "auto"
                size = largest_batch(args, DTYPES[name], device) if is_auto else int(text)
                batch = make_batch(config, size, device)
                results = measure(side_makers(args, config, batch, DTYPES[name]), args, device)
                # Once more: beside other load one measurement may miss the peak.
                peaks[name] = max(peaks[name], *product_rates(device, DTYPES[name]))
                print(f"\n{args.size}/{config.model.patch_size}, {name}, batch {size}\n{COLUMNS}")
                print_results(results, size, config, peaks[name])
        memory = "peak" if device.type == "cuda" else "kept for the backward pass"
        print(LEGEND.format(memory=memory))


if __name__ == "__main__":
    enter(main)
