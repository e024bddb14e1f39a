"""Measure how fast the nodes of a job exchange data: each with the first one, then together."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from data_tools.errors import ConfigError
from data_tools.process.accelerator import has_gpu

FLOOR_VARIABLE = "MIN_NODE_GBPS"
MIB = 1 << 20
PAIR_MIB = 4  # what a node exchanges with the first one
TOGETHER_MIB = 16  # what every rank contributes to a collective
SLOW_RATIO = 4  # a node this much slower than the middle one is reported


@dataclass(frozen=True)
class Bandwidth:
    """Gigabytes per second that one rank sends."""

    pairs: dict[str, float]  # by node: with the first node
    all_reduce: float
    all_to_all: float

    def __str__(self) -> str:
        text = f"all-reduce {self.all_reduce:.2f} GB/s, all-to-all {self.all_to_all:.2f} GB/s"
        if self.pairs:
            node = min(self.pairs, key=lambda name: self.pairs[name])
            text += f", slowest node {node} {self.pairs[node]:.2f} GB/s"
        return text


def measure(nodes: list[str], device: torch.device, begin: Callable[[str], None]) -> Bandwidth:
    """Exchange some data. All ranks must call this.

    `nodes` has every rank's, and `begin` is called with the name of what is exchanged next, so that
    a failure can name it.
    """
    rank, world_size = dist.get_rank(), len(nodes)
    leaders = {node: nodes.index(node) for node in dict.fromkeys(nodes)}  # its first rank
    pairs = {}
    # NCCL makes a group's communicator in its first operation, in which all ranks must take part:
    # torch calls a first batch_isend_irecv of only two of them undefined, and it may hang.
    begin("a first all-reduce")
    dist.all_reduce(torch.zeros(1, device=device))
    data = torch.zeros(PAIR_MIB * MIB, dtype=torch.uint8, device=device)
    for node, leader in leaders.items():
        if leader == 0:
            continue
        begin(f"{node} with {nodes[0]}")
        seconds = torch.zeros(1, device=device)
        if rank in (0, leader):
            seconds[0] = _timed(_exchange, data, leader if rank == 0 else 0)
        dist.broadcast(seconds, 0)
        pairs[node] = data.numel() / float(seconds) / 1e9
    data = torch.zeros(TOGETHER_MIB * MIB // 4 // world_size * world_size, device=device)
    num_bytes = data.numel() * data.element_size()
    share = (world_size - 1) / world_size  # of its data that a rank sends, once or twice
    begin("all-reduce")
    all_reduce = 2 * share * num_bytes / _timed(dist.all_reduce, data) / 1e9
    begin("all-to-all")
    received = torch.empty_like(data)
    all_to_all = share * num_bytes / _timed(dist.all_to_all_single, received, data) / 1e9
    return Bandwidth(pairs, all_reduce, all_to_all)


def _exchange(data: torch.Tensor, other: int) -> None:
    received = torch.empty_like(data)
    works = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, data, other), dist.P2POp(dist.irecv, received, other)]
    )
    for work in works:
        work.wait()


def _timed(call: Callable[..., object], *args: object) -> float:
    """Return the seconds of a second call; the first one connects."""
    for _ in range(2):
        started = time.monotonic()
        call(*args)
        if has_gpu():
            torch.cuda.synchronize()
        seconds = time.monotonic() - started
    return seconds


def floor_gbps() -> float:
    """Return what a node must exchange with the first one at least, in GB/s (MIN_NODE_GBPS)."""
    text = os.environ.get(FLOOR_VARIABLE, "0")
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{FLOOR_VARIABLE}={text} is no number; use GB/s, or 0.") from None


def judge(bandwidth: Bandwidth, floor: float) -> tuple[list[str], list[str]]:
    """Return sentences on nodes that are too slow to train with, and on those to look at."""
    rates = bandwidth.pairs
    # Of three nodes at least: of two, nobody can tell which one is slow.
    middle = sorted(rates.values())[len(rates) // 2] if len(rates) > 1 else 0.0
    slow = [
        f"node {node} exchanges {rate:.3f} GB/s with the first node, {FLOOR_VARIABLE} is {floor:g};"
        " look at its network, or leave it out with sbatch --exclude."
        for node, rate in rates.items()
        if rate < floor
    ]
    odd = [
        f"node {node} exchanges {rate:.3f} GB/s, the others much more."
        for node, rate in rates.items()
        if rate * SLOW_RATIO < middle
    ]
    return slow, odd
