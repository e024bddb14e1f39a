"""Measure attention in bf16 on a CPU: torch's fused kernel, and batched products.

    python benchmarks/attention.py                       # the sizes of S/2 and neighbours
    python benchmarks/attention.py --tokens 256 --threads 1

Forward and backward pass of models/attention.py alone. Both kernels take turns, so that other load
meets both alike; the best of each counts. A ratio below 1 means that batched products are faster;
`*` marks what "auto" chooses.
"""

import argparse
import sys
import time
from pathlib import Path

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.measure import describe_machine
from data_tools.errors import ArgumentParser, ConfigError, exit_on_config_error, refuse_below_one
from data_tools.process.entry_point import enter
from models.attention import attend, batching_is_faster

WIDTH = 64  # of a head, as in S, B and L


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Define the flags and check their values."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 512, 1024])
    parser.add_argument("--batch", type=int, default=8, help="samples")
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=7, help="turns of each kernel")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    refuse_below_one(args, "batch", "heads", "repeats", "threads")
    if (fewest := min(args.tokens)) < 1:
        raise ConfigError(f"--tokens must be at least 1, not {fewest}.")
    return args


def seconds_of(kernel: str, shape: tuple[int, int, int, int]) -> float:
    """Time one forward and backward pass on random queries, keys and values."""
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    grad = torch.randn(shape, dtype=torch.bfloat16)
    started = time.perf_counter()
    attend(q, k, v, kernel).backward(grad)
    return time.perf_counter() - started


@exit_on_config_error()
def main() -> None:
    """Print a row per number of tokens."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    print(f"{describe_machine(torch.device('cpu'))}, {args.threads} thread(s), bf16")
    print(f"{args.batch} samples, {args.heads} heads of {WIDTH}, forward and backward pass")
    print("     T   fused ms   batched ms   batched / fused")
    for tokens in args.tokens:
        shape = (args.batch, args.heads, tokens, WIDTH)
        best = dict.fromkeys(("fused", "batched"), float("inf"))
        for _ in range(args.repeats + 1):  # the first is a warm-up, never the best
            for kernel, before in best.items():
                best[kernel] = min(before, seconds_of(kernel, shape))
        fused, batched = best["fused"], best["batched"]
        mark = "*" if batching_is_faster(tokens) else " "
        print(
            f"{tokens:>6}{fused * 1e3:>11.1f}{batched * 1e3:>12.1f}{mark}{batched / fused:>18.2f}"
        )


if __name__ == "__main__":
    enter(main)
