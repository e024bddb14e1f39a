"""How fast is a training step, how close to the machine's limit, and against the official way?

    python benchmarks/train_step.py                               # S/2, fp32, batch 8 and 32
    python benchmarks/train_step.py --peak-only                   # the rates of matrix products
    python benchmarks/train_step.py --device cuda --size XL --dtype bf16 --batch auto --compile

A step is forward, loss with the prior's, backward, AdamW and the average of the weights, on latents
made up beforehand. The sides take turns, and the best step of each counts: others may use the
machine too. bf16 on a CPU without bf16 instructions takes minutes a step.
"""

import argparse
import math
import sys
import time
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
    product_rate,
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
from data_tools.errors import ArgumentParser, ConfigError, exit_on_config_error
from models.flops import training_flops
from training.config import Config
from training.count import shape_of

GIGA, GIB = 1e9, 2**30
LARGEST_BATCH = 512
COLUMNS = (
    f"{'side':<24} {'ms/step':>9} {'images/s':>9} {'GFLOP':>9} {'closed':>9} {'GFLOP/s':>9} "
    f"{'peak':>6} {'GiB':>7} {'speed-up':>8}"
)


class Result(NamedTuple):
    """What was measured of one side."""

    side: Side
    best_sec: float
    flops: int  # of the step, counted by torch
    memory_bytes: int  # peak on CUDA; on the CPU what is kept for the backward pass


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
    parser.add_argument("--dtype", nargs="+", default=["fp32"], choices=DTYPES)
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
    for batch in args.batch:
        if batch == "auto" and args.device == "cpu":
            raise ConfigError("--batch auto fills the memory of a GPU; give a number on the CPU.")
        if batch != "auto" and not (batch.isdecimal() and int(batch) > 0):
            raise ConfigError(f"--batch must be a positive whole number or auto, not {batch}.")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    torch.backends.cudnn.allow_tf32 = args.tf32
    return torch.device(args.device)


def print_peaks(config: Config, device: torch.device, dtypes: list[str]) -> dict[str, float]:
    """Measure and print the rates of matrix products; return those of large ones, FLOP/s."""
    shape, peaks = shape_of(config), {}
    print("matrix products, GFLOP/s       large square    of the blocks' linear layers, 8 images")
    for name in dtypes:
        dtype = DTYPES[name]
        peaks[name] = product_rate(device, dtype)
        rows = 8 * shape.num_tokens if peaks[name] > 10 * GIGA else shape.num_tokens
        of_model = model_product_rate(device, dtype, rows, shape.hidden_size, shape.mlp_hidden)
        print(f"  {name:<28} {peaks[name] / GIGA:>12,.1f} {of_model / GIGA:>15,.1f}")
    return peaks


def make_sides(
    config: Config, batch: Latents, dtype: torch.dtype, args: argparse.Namespace
) -> list[Side]:
    """Build what is compared; the first is ours as it is by default."""
    sides = [our_side(config, batch, dtype)]
    if args.compile:
        compiled = config_of(args.size, compile_blocks=True)
        sides.append(our_side(compiled, batch, dtype))
    if args.checkpointing:
        recomputing = config_of(args.size, checkpointing=True)
        sides.append(our_side(recomputing, batch, dtype))
    if not args.no_official:
        sides.append(official_side(config, batch, dtype))
    return sides


def measure(sides: list[Side], steps: int, device: torch.device) -> list[Result]:
    """Time the sides in turn; the first step of each is counted, not timed."""
    flops, memory = [], []
    for side in sides:
        if device.type == "cpu":
            memory.append(saved_bytes(side.model, lambda side=side: side.loss(0)))
        flops.append(counted_flops(lambda side=side: side.step(0)))
    best, peak = [float("inf")] * len(sides), [0] * len(sides)
    for i in range(1, steps + 1):
        for k, side in enumerate(sides):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            synchronise(device)
            started = time.perf_counter()
            side.step(i)
            synchronise(device)
            best[k] = min(best[k], time.perf_counter() - started)
            if device.type == "cuda":
                peak[k] = max(peak[k], torch.cuda.max_memory_allocated(device))
    return [Result(*row) for row in zip(sides, best, flops, memory or peak, strict=True)]


def print_table(results: list[Result], batch_size: int, config: Config, peak: float) -> None:
    """Print a line per side."""
    official = {r.side.name: r.best_sec for r in results}.get(OFFICIAL, math.nan)
    for r in results:
        closed = training_flops(shape_of(config), batch_size, is_merged=r.side.is_merged)
        print(
            f"{r.side.name:<24} {1e3 * r.best_sec:>9.1f} {batch_size / r.best_sec:>9.2f} "
            f"{r.flops / GIGA:>9.1f} {closed / GIGA:>9.1f} {r.flops / r.best_sec / GIGA:>9.1f} "
            f"{r.flops / r.best_sec / peak:>6.0%} {r.memory_bytes / GIB:>7.2f} "
            f"{official / r.best_sec:>8.2f}"
        )


def largest_batch(args: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> int:
    """Find the largest power of two, or three quarters of one, that our step has memory for."""
    config = config_of(args.size, compile_blocks=args.compile)
    fits = 0
    for exponent in range(3, LARGEST_BATCH.bit_length()):
        for size in (3 * 2 ** (exponent - 2), 2**exponent):
            try:
                our_side(config, make_batch(config, size, device), dtype).step(0)
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                if not fits:
                    raise ConfigError(
                        f"--batch auto: {args.size} does not fit with {size} images; choose a "
                        "smaller --size."
                    ) from None
                return fits
            fits = size
    return fits


def print_waits(side: Side, device: torch.device) -> None:
    """Print where one step of a side waits for the device."""
    if device.type == "cuda":
        waits = cuda_waits(lambda: side.step(1))
    else:
        with HostReads() as reads:
            side.step(1)
        waits = reads.counts
    where = ", ".join(f"{place} x {count}" for place, count in waits.items()) or "nowhere"
    print(f"waits of {side.name}: {waits.total()}: {where}")


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    with exit_on_config_error():
        args = parse(argv)
        device = select_device(args)
        config = config_of(args.size)
        print(describe_machine(device))
        if device.type == "cuda":
            print(f"TF32 for fp32 products: {'on' if args.tf32 else 'off'}")
        dtypes = list(DTYPES) if args.peak_only else args.dtype
        peaks = print_peaks(config, device, dtypes)
        if args.peak_only:
            return
        for name in args.dtype:
            for text in args.batch:
                is_auto = text == "auto"
                size = largest_batch(args, DTYPES[name], device) if is_auto else int(text)
                sides = make_sides(config, make_batch(config, size, device), DTYPES[name], args)
                print(f"\n{args.size}/{config.model.patch_size}, {name}, batch {size}\n{COLUMNS}")
                print_table(measure(sides, args.steps, device), size, config, peaks[name])
                if args.trace_syncs:
                    for side in sides:
                        print_waits(side, device)
        memory = "peak" if device.type == "cuda" else "kept for the backward pass"
        print(
            "\nclosed: the closed form, without recomputation; peak: share of the large product's "
            f"rate; GiB: {memory}; speed-up: over the official way"
        )


if __name__ == "__main__":
    main()
