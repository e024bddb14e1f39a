"""Run training commands one after another, each on ranks forked from this process.

A launcher's start costs twenty seconds of a core, most of it imports; here they are paid once.
Reads a line of JSON for every command, {"argv", "num_ranks", "output", "file_kib", "env"}: what
to say to training/main.py, the file that takes what the ranks say, the largest file that they may
write, and environment variables.
Answers with the exit code, as a launcher has it.
"""

import json
import multiprocessing
import os
import resource
import socket
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import deepspeed  # noqa: F401 - before the forks
import torch

import training.loop  # noqa: F401
import training.run_parts  # noqa: F401
from data_tools.process.entry_point import enter
from training import main
from training.engine.deepspeed_internals import import_muon_uncompiled


def prepare_to_fork():
    """Import what ranks would, and start no threads."""
    torch.set_num_threads(1)
    import_muon_uncompiled()


def run_rank(rank, num_ranks, port, argv, output, file_kib, env):
    os.environ |= env
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if output is not None:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    if file_kib is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_kib * 1024,) * 2)
    enter(lambda: main.main(argv))  # as the script does


def fork_ranks(num_ranks, argv, output=None, file_kib=None, env=None):
    """Start a training command; returns its processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    shared = (num_ranks, port, argv, output, file_kib, env or {})
    ranks = [context.Process(target=run_rank, args=(rank, *shared)) for rank in range(num_ranks)]
    for rank in ranks:
        rank.start()
    return ranks


def wait_for(ranks):
    """Wait as launchers do: the first rank that fails ends the others. Returns the exit code."""
    while all(rank.exitcode in (None, 0) for rank in ranks):
        if all(rank.exitcode == 0 for rank in ranks):
            return 0
        time.sleep(0.02)
    code = next(rank.exitcode for rank in ranks if rank.exitcode)
    for rank in ranks:
        rank.terminate()
    for rank in ranks:
        rank.join()
    return code


def serve():
    prepare_to_fork()
    for line in sys.stdin:
        print(wait_for(fork_ranks(**json.loads(line))), flush=True)


if __name__ == "__main__":
    serve()
