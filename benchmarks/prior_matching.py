"""Measure what matching experts to the prior costs: a matrix product, or the (S, U, U) array.

    python benchmarks/prior_matching.py                      # 84 (the paper's XL), 448, 1792 units

Both compute the cost sum_t |uses - prior| of giving prior unit v to network unit u, then solve the
same linear assignment. Each runs in a separate process, which shows its peak memory. Where the
array does not fit, the cost is computed in slices of timesteps. The time is then still that of the
formulation, but the memory is not: what the whole array would need is printed.

L blocks, E experts, K experts per sample, S diffusion timesteps, U = L * E units.
"""

import argparse
import multiprocessing
import resource
import sys
import time
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from benchmarks.measure import best_seconds, describe_machine
from data_tools.errors import ArgumentParser
from data_tools.process.entry_point import enter
from models.prior import diffusion_prior
from models.unit_matching import matching_cost

DEPTH = 28  # blocks of XL
TOP_K = 2
NUM_TIMESTEPS = 1000
MIB = 2**20
WAYS = ("product", "differences")


class Cost(NamedTuple):
    """Time and memory that one way took."""

    cost_sec: float
    assignment_sec: float
    peak_bytes: int  # above what the process held before
    num_slices: int  # that the timesteps were cut into
    best: float  # the cost of the assignment found


def uses_of_random_gates(num_experts: int) -> Tensor:
    """Return which unit each timestep uses, (S, U), for gates that drift smoothly with t."""
    generator = torch.Generator().manual_seed(0)
    t = torch.linspace(0.0, 1.0, NUM_TIMESTEPS)
    basis = torch.stack((torch.ones_like(t), t, torch.cos(3 * t), torch.sin(6 * t)))  # (4, S)
    logits = torch.randn(DEPTH, num_experts, 4, generator=generator) @ basis  # (L, E, S)
    chosen = logits.topk(TOP_K, dim=1).indices
    return torch.zeros_like(logits).scatter(1, chosen, 1.0).flatten(0, 1).T.contiguous()


def cost_by_differences(uses: Tensor, prior: Tensor, num_slices: int) -> Tensor:
    """Return the cost through the (S, U, U) array of differences, in slices of timesteps."""
    parts = zip(uses.chunk(num_slices), prior.chunk(num_slices), strict=True)
    return sum((a[:, :, None] - b[:, None, :]).abs().sum(0) for a, b in parts)


def array_bytes(num_units: int) -> int:
    """Bytes that the formulation holds at once: the differences and their absolute values."""
    return 2 * 4 * NUM_TIMESTEPS * num_units**2


def measure(way: str, num_experts: int, memory_limit: int, threads: int) -> Cost:
    """Run one way, in the process that calls this."""
    torch.set_num_threads(threads)
    num_units = DEPTH * num_experts
    uses, prior = uses_of_random_gates(num_experts), prior_of(num_experts)
    num_slices = 1 if way == "product" else -(-array_bytes(num_units) // memory_limit)

    def find_cost() -> Tensor:
        if way == "product":
            return matching_cost(uses, prior)
        return cost_by_differences(uses, prior, num_slices)

    small = torch.zeros(2, 2)
    matching_cost(small, small)  # the libraries' own memory is not the way's
    before = _peak_bytes()
    cost = find_cost()
    peak = _peak_bytes() - before
    cost_sec = best_seconds(find_cost, uses.device, repeats=1 if num_slices > 1 else 3)
    array = cost.numpy()
    started = time.perf_counter()
    rows, columns = linear_sum_assignment(array)
    return Cost(
        cost_sec, time.perf_counter() - started, peak, num_slices, float(array[rows, columns].sum())
    )


def prior_of(num_experts: int) -> Tensor:
    """Return the prior of the benchmark's network."""
    return diffusion_prior(NUM_TIMESTEPS, DEPTH, num_experts, TOP_K)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(argv: list[str] | None = None) -> None:
    """Measure every number of units both ways and print a table."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--experts", nargs="+", type=int, default=[3, 16, 64], metavar="E", help="per block"
    )
    parser.add_argument("--memory-gib", type=float, default=4.0, help="the array may take")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(describe_machine(torch.device("cpu")))
    print(f"{DEPTH} blocks, {NUM_TIMESTEPS} timesteps, k = {TOP_K}")
    print(
        f"{'units':>6} {'way':<12} {'cost ms':>10} {'assign ms':>10} {'peak MiB':>10}  cost found"
    )
    # A fresh interpreter each: the peak of a process never falls.
    context = multiprocessing.get_context("spawn")
    for num_experts in args.experts:
        for way in WAYS:
            with context.Pool(1) as pool:
                limit = int(args.memory_gib * 2**30)
                cost = pool.apply(measure, (way, num_experts, limit, args.threads))
            print(_line(way, DEPTH * num_experts, cost))


def _line(way: str, num_units: int, cost: Cost) -> str:
    line = (
        f"{num_units:>6} {way:<12} {1e3 * cost.cost_sec:>10.1f} "
        f"{1e3 * cost.assignment_sec:>10.1f} {cost.peak_bytes / MIB:>10.1f}  {cost.best:.0f}"
    )
    if cost.num_slices > 1:
        need = array_bytes(num_units) / MIB
        line += f" (in {cost.num_slices} slices; at once it would take {need:,.0f} MiB)"
    return line


if __name__ == "__main__":
    enter(main)
