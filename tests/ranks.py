"""Run a function in several processes that form a DeepSpeed (gloo) world."""

import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from pathlib import Path

MASTER_ADDR = "127.0.0.1"


def run_ranks(fn, world_size, *args, timeout_sec=300):
    """Call fn(rank, world_size, *args) in every rank; raise the first rank's error.

    `fn` and `args` are pickled: fn must be a module-level function.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind((MASTER_ADDR, 0))
        port = probe.getsockname()[1]
        probe.close()
        context = multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=_rank_main, args=(fn, rank, world_size, port, folder, args))
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            _wait(processes, Path(folder), time.monotonic() + timeout_sec)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                if process.pid is not None:
                    process.join()


def _wait(processes, folder, deadline):
    while any(process.exitcode is None for process in processes):
        if any(process.exitcode for process in processes):
            break
        if time.monotonic() > deadline:
            raise TimeoutError("the ranks did not finish in time; some wait for one another")
        time.sleep(0.05)
    errors = sorted(folder.glob("rank*.txt"), key=lambda path: path.stat().st_mtime_ns)
    if errors:
        raise AssertionError(f"{errors[0].stem} failed:\n{errors[0].read_text()}")
    codes = [process.exitcode for process in processes]
    assert not any(codes), f"a rank died without a traceback; exit codes {codes}"


def _rank_main(fn, rank, world_size, port, folder, args):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR=MASTER_ADDR,
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1",
    )
    import deepspeed
    import torch

    torch.set_num_threads(1)
    # As in training/processes.py: no compiler, nothing left in /dev/shm.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        fn(rank, world_size, *args)
        torch.distributed.barrier()
        # Without it gloo's threads sometimes abort while the interpreter exits.
        torch.distributed.destroy_process_group()
    except BaseException:
        Path(folder, f"rank{rank}.txt").write_text(traceback.format_exc())
        raise
