"""Measure when merging affine experts is cheaper than dispatching samples to them.

    python benchmarks/experts.py
    python benchmarks/experts.py --device cuda --dtype bf16 --max-gflop 2000

For a grid of sizes the table shows the time of dispatching over the time of merging, for forward
and backward pass of one block's mixture; above 1, merging is faster. `*` marks sizes for which
--expert-dispatch auto chooses the slower way by more than a tenth, and they are listed at the end.
Its rule for CPUs was fitted to this table, that for GPUs to a count of FLOP and bytes
(models/experts.py: merging_is_cheaper). The plan, made once for all blocks, is not timed.

N batch, T tokens, D width, E experts, K experts per sample.
"""

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from benchmarks.measure import best_seconds, describe_machine, saved_bytes
from benchmarks.sides import DTYPES
from data_tools.errors import ArgumentParser, ConfigError, exit_on_config_error
from data_tools.process.entry_point import enter
from models.experts import AffineExperts
from models.gate import ExpertProduct, build_plan

WIDTHS = (128, 384, 768, 1152)
TOKENS = (16, 64, 256, 1024)
BATCHES = (1, 8, 64)
EXPERTS = ((3, 1), (3, 2), (8, 1), (8, 2), (16, 2))  # E, K
TIE = 1.1  # times that differ by less than a tenth are equal


class Cell(NamedTuple):
    """What was measured at one size; times in seconds."""

    merged_sec: float
    dispatched_sec: float
    merged_bytes: int
    dispatched_bytes: int
    is_auto_merged: bool

    @property
    def ratio(self) -> float:
        """Dispatched over merged."""
        return self.dispatched_sec / self.merged_sec

    @property
    def auto_loss(self) -> float:
        """Time of what auto chooses, over the best time."""
        return max(1.0, 1 / self.ratio if self.is_auto_merged else self.ratio)


def main() -> None:
    """Measure the grid and print the table."""
    parser = ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=__doc__.split("\n", 2)[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="fp32", choices=tuple(DTYPES), help="of the weights")
    parser.add_argument(
        "--max-gflop",
        type=float,
        default=30.0,
        help="leave out sizes whose dispatched pass is more",
    )
    args = parser.parse_args()
    with exit_on_config_error():
        check(args.device, args.max_gflop)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    print(f"{describe_machine(device)}; {args.dtype}")
    heads = (f"E={E:<2} K={K}" for E, K in EXPERTS)
    print(
        "    D     T   N " + "".join(f"{head:>10}" for head in heads) + "   MiB merged/dispatched"
    )
    cells: dict[str, Cell] = {}
    for D, T, N in product(WIDTHS, TOKENS, BATCHES):
        row = [
            measure(N, T, D, E, K, device, dtype)
            if args.max_gflop >= dispatched_gflop(N, T, D, K)
            else None
            for E, K in EXPERTS
        ]
        if any(row):
            print(describe_row(D, T, N, row), flush=True)
        for (E, K), cell in zip(EXPERTS, row, strict=True):
            if cell:
                cells[f"D={D} T={T} N={N} E={E} K={K}"] = cell
    print(summary(list(cells.values())))
    print(mistakes(cells))


def dispatched_gflop(N: int, T: int, D: int, K: int) -> float:
    """Count the dispatched products, forward and backward."""
    return 6e-9 * K * N * T * D * D


def check(device: str, max_gflop: float) -> None:
    """Refuse a device that this machine has not, and an empty grid."""
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device}: unknown device; use cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device; use --device cpu.")
    smallest = dispatched_gflop(min(BATCHES), min(TOKENS), min(WIDTHS), 1)
    if max_gflop < smallest:
        raise ConfigError(
            f"--max-gflop {max_gflop:g} leaves out every size; use at least {smallest:.4f}."
        )


def measure(
    N: int, T: int, D: int, E: int, K: int, device: torch.device, dtype: torch.dtype
) -> Cell:
    """Time both ways at one size, and count what they keep for the backward pass."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(1, N, E, generator=generator).softmax(-1).to(device).requires_grad_()
    x = torch.randn(N, T, D, generator=generator).to(device, dtype).requires_grad_()
    t = torch.arange(N, device=device)
    sec, kept = {}, {}
    for dispatch in ("merged", "dispatched"):
        experts = AffineExperts(D, E, dispatch).to(device, dtype)
        for parameter in experts.parameters():
            parameter.data.normal_(std=D**-0.5)
        plan = build_plan(table, t, K, product=experts.choose_product(T, K)).blocks()[0]
        weight = plan.expert_weight.detach().requires_grad_()
        assert (plan.rows is None) == (dispatch == "merged")

        forward = partial(experts, x, weight, plan.rows)
        sec[dispatch] = best_seconds(_step(forward, [x, weight, *experts.parameters()]), device)
        kept[dispatch] = saved_bytes(experts, forward)
    is_auto_merged = AffineExperts(D, E).to(device, dtype).choose_product(T, K)
    return Cell(
        sec["merged"],
        sec["dispatched"],
        kept["merged"],
        kept["dispatched"],
        is_auto_merged is ExpertProduct.MERGED,
    )


def _step(forward: Callable[[], Tensor], tensors: list[Tensor]) -> Callable[[], None]:
    target = torch.ones_like(forward())

    def step() -> None:
        torch.autograd.grad(forward(), tensors, target)

    return step


def describe_row(D: int, T: int, N: int, row: list[Cell | None]) -> str:
    """Return one line of the table; memory is that of the last size measured."""
    text = f"{D:>5} {T:>5} {N:>3} "
    for cell in row:
        if cell is None:
            text += f"{'-':>10}"
        else:
            text += f"{cell.ratio:>9.2f}{'*' if cell.auto_loss > TIE else ' '}"
    last = next(cell for cell in reversed(row) if cell is not None)
    return f"{text}   {last.merged_bytes / 2**20:8.1f} {last.dispatched_bytes / 2**20:8.1f}"


def summary(cells: list[Cell]) -> str:
    """Say how good the automatic choice is, against always choosing the same."""

    def mean(losses: list[float]) -> str:
        worst = max(losses)
        return f"{math.exp(sum(map(math.log, losses)) / len(losses)):.2f} (worst {worst:.2f})"

    return "\n".join(
        (
            "time over the faster way's, geometric mean:",
            f"  auto              {mean([cell.auto_loss for cell in cells])}",
            f"  always merged     {mean([max(1.0, 1 / cell.ratio) for cell in cells])}",
            f"  always dispatched {mean([max(1.0, cell.ratio) for cell in cells])}",
        )
    )


def mistakes(cells: dict[str, Cell]) -> str:
    """List the sizes at which auto chooses the slower way by more than a tenth, worst first."""
    wrong = {size: cell for size, cell in cells.items() if cell.auto_loss > TIE}
    lines = [f"auto is wrong by more than a tenth at {len(wrong)} of {len(cells)} sizes:"]
    for size, cell in sorted(wrong.items(), key=lambda item: -item[1].auto_loss):
        way = "merges" if cell.is_auto_merged else "dispatches"
        lines.append(f"  {size}: {way}, and takes {cell.auto_loss:.2f} times as long")
    return "\n".join(lines)


if __name__ == "__main__":
    enter(main)
