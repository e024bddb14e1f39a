"""Start processes of this machine as the ranks of a DeepSpeed world, for benchmarks."""

import os
import socket
import time
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch

from benchmarks.measure import synchronise


def run_on_ranks(
    world_size: int, fn: Callable[..., Any], *args: Any, device_type: str = "cpu"
) -> Any:
    """Run fn(rank, world_size, *args) in every process of a group; return rank 0's result.

    `fn`, `args` and the result are pickled, so they must be defined in modules, not in a script. On
    "cpu" a rank has one thread, and gloo; on "cuda" one GPU, and NCCL.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    everything = (world_size, port, device_type, results, fn, args)
    torch.multiprocessing.spawn(_rank_main, everything, nprocs=world_size)
    return results.get()


def _rank_main(
    rank: int,
    world_size: int,
    port: int,
    device_type: str,
    results: SimpleQueue,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    if device_type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported
    torch.set_num_threads(1)
    from training.ranks import process_group

    ranks = process_group.discover_ranks()
    process_group.start_process_group(ranks, process_group.select_accelerator(ranks))
    result = fn(rank, world_size, *args)
    if rank == 0:
        results.put(result)
    process_group.stop_process_group()


def time_together(call: Callable[[], Any], device: torch.device) -> float:
    """Start a call on all ranks at once; return the seconds of the slowest."""
    synchronise(device)
    torch.distributed.barrier()
    started = time.perf_counter()
    call()
    synchronise(device)
    return slowest(time.perf_counter() - started, device)


def slowest(value: float, device: torch.device) -> float:
    """Return the largest of the ranks' values. All ranks must call this."""
    largest = torch.tensor([value], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return float(largest)
