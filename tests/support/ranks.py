"""Run a function in several processes that form a DeepSpeed (gloo) world.

The ranks are forked from a process that has imported torch and DeepSpeed once for all tests.
"""

import atexit
import contextlib
import functools
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

MASTER_ADDR = "127.0.0.1"


def run_ranks(fn, world_size, *args, timeout_sec=300):
    """Call fn(rank, world_size, *args) in every rank; raise the first rank's error.

    `fn` and `args` are pickled: fn must be a module-level function.
    """
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        call = pickle.dumps((fn, args))
        pickle.dump((call, world_size, folder, timeout_sec, dict(os.environ)), server.stdin)
        server.stdin.flush()
        problem = pickle.load(server.stdout)
    if problem is not None:
        raise problem


@functools.cache
def _server():
    """The process that forks; it ends with this one, which closes its input."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.support.ranks"],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    atexit.register(server.communicate)
    return server


def _serve():
    from tests.support.forked_jobs import prepare_to_fork

    prepare_to_fork()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what ranks print
    with contextlib.suppress(EOFError):
        while True:
            problem = _fork_ranks(*pickle.load(sys.stdin.buffer))
            pickle.dump(problem, answers)
            answers.flush()


def _fork_ranks(call, world_size, folder, timeout_sec, environment):
    """Return what run_ranks raises, or None."""
    with socket.socket() as probe:
        probe.bind((MASTER_ADDR, 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    shared = (call, world_size, port, folder, environment)
    processes = [
        context.Process(target=_rank_main, args=(rank, *shared)) for rank in range(world_size)
    ]
    try:
        for process in processes:
            process.start()
        return _wait(processes, Path(folder), time.monotonic() + timeout_sec)
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
            return TimeoutError("the ranks did not finish in time; some wait for one another")
        time.sleep(0.05)
    errors = sorted(folder.glob("rank*.txt"), key=lambda path: path.stat().st_mtime_ns)
    if errors:
        return AssertionError(f"{errors[0].stem} failed:\n{errors[0].read_text()}")
    codes = [process.exitcode for process in processes]
    if any(codes):
        return AssertionError(f"a rank died without a traceback; exit codes {codes}")
    return None


def _rank_main(rank, call, world_size, port, folder, environment):
    os.environ.clear()
    os.environ.update(
        environment,
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

    # As in training/ranks/process_group.py: no compiler, nothing left in /dev/shm.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        fn, args = pickle.loads(call)
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        fn(rank, world_size, *args)
        torch.distributed.barrier()
        # Without it gloo's threads sometimes abort while the interpreter exits.
        torch.distributed.destroy_process_group()
    except BaseException:
        Path(folder, f"rank{rank}.txt").write_text(traceback.format_exc())
        raise


if __name__ == "__main__":
    from tests.support import ranks

    ranks._serve()
