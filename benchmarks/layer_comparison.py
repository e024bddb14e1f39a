"""Compare our expert-parallel layers with DeepSpeed's: a rank's part of expert_parallel.py."""

from typing import NamedTuple

import torch

from benchmarks.layer_problem import ROUTINGS, Problem, Side, Sizes, make_problem
from benchmarks.measure import HostReads, SentBytes, cuda_waits, peak_growth
from benchmarks.start_ranks import slowest, time_together

TOLERANCE = 1e-4  # relative to the largest value, of outputs and gradients


class Measured(NamedTuple):
    """One side on one routing."""

    name: str
    best_sec: float
    sent_bytes: float
    num_exchanges: int
    num_waits: int
    peak_bytes: float


def compare(
    rank: int, world_size: int, sizes: Sizes, num_steps: int, device_type: str
) -> dict[str, list[Measured]]:
    """Compare and time both sides on every routing. All ranks must call this."""
    from benchmarks.stock_layer import our_side, stock_side  # imports DeepSpeed

    device = torch.device(device_type, rank if device_type == "cuda" else 0)
    results = {}
    for routing in ROUTINGS:
        problem = make_problem(sizes, routing, rank, world_size, device)
        sides = [side(sizes, problem, rank, world_size) for side in (stock_side, our_side)]
        check_agreement(sides, problem)
        results[routing] = measure(sides, problem, num_steps, device)
    return results


def step(side: Side, problem: Problem) -> torch.Tensor:
    """Run the layers forward and backward; return their output."""
    problem.x.grad = problem.gate_logits.grad = None
    side.clear()
    output = side.forward(problem.x)
    # As a scalar, because HostReads follows Tensor.backward.
    (output * problem.gradient).sum().backward()
    return output


def check_agreement(sides: list[Side], problem: Problem) -> None:
    """Assert that the sides have equal outputs and equal gradients of everything."""
    found = []
    for side in sides:
        output = step(side, problem).detach()
        # On our side a gate value's gradient is on the rank of the expert.
        torch.distributed.all_reduce(problem.gate_logits.grad)
        gradients = (problem.x.grad, problem.gate_logits.grad, *side.expert_gradients())
        found.append([output, *(gradient.clone() for gradient in gradients)])
        side.clear()
    for stock, ours in zip(*found, strict=True):
        error = (stock - ours).abs().max() / stock.abs().max()
        assert error < TOLERANCE, f"the sides differ by {float(error):.1e} of the largest value"


def measure(
    sides: list[Side], problem: Problem, num_steps: int, device: torch.device
) -> list[Measured]:
    """Count one step of each side, then time them in turns."""
    counted = [_count(side, problem, device) for side in sides]
    best = [float("inf")] * len(sides)
    for _ in range(num_steps):
        for k, side in enumerate(sides):
            best[k] = min(best[k], time_together(lambda s=side: step(s, problem), device))
    return [
        Measured(side.name, sec, *counts)
        for side, sec, counts in zip(sides, best, counted, strict=True)
    ]


def _count(side: Side, problem: Problem, device: torch.device) -> tuple[float, int, int, float]:
    """Return bytes sent, all-to-alls, waits and peak memory of a step."""
    sent = SentBytes()
    peak = peak_growth(lambda: step(side, problem), device)
    with sent.watching():
        if device.type == "cuda":
            num_waits = cuda_waits(lambda: step(side, problem)).total()
        else:
            with HostReads() as reads:
                step(side, problem)
            num_waits = reads.counts.total()
    total = torch.tensor([sent.num_bytes], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    world_size = torch.distributed.get_world_size()
    return float(total) / world_size, sent.num_calls, num_waits, slowest(peak, device)
