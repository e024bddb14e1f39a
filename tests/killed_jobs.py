"""Train one command to its end through many kill -9, each at a random moment.

Started as: python tests/killed_jobs.py --jobs FILE, where FILE is JSON: argv (of training/main.py),
num_ranks, kills and seed. Every attempt is a job of its own, forked from this process, which has
imported everything already: the tests pay for the imports once. Prints a line of JSON for every
kill: the newest checkpoint before and after, and whether one was being written.
"""

import json
import multiprocessing
import os
import random
import socket
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import deepspeed  # noqa: F401 - before the forks
import torch

import training.assemble
import training.loop  # noqa: F401
from training import engine, processes
from training.command_line import parse_command_line
from training.job import check
from training.main import train_job

PROGRESS_SEC = 120


def run_rank(rank, num_ranks, port, argv):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = processes.discover_ranks()
    device = processes.select_accelerator(ranks)
    job = check(parse_command_line(argv), ranks)
    processes.start_process_group(ranks, device)
    train_job(job, ranks, device)
    processes.stop_process_group()


def start(num_ranks, argv):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=run_rank, args=(rank, num_ranks, port, argv))
        for rank in range(num_ranks)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def newest(folder):
    pointer = folder / "latest"
    return pointer.read_text().strip() if pointer.exists() else ""


def wait_for_progress(folder, before, ranks):
    deadline = time.monotonic() + PROGRESS_SEC
    while newest(folder) == before:
        assert time.monotonic() < deadline, "no progress"
        assert all(rank.is_alive() for rank in ranks), "a rank ended by itself"
        time.sleep(0.005)


def main():
    torch.set_num_threads(1)  # no pool of threads may exist before a fork
    engine.import_muon_uncompiled()
    plan = json.loads(Path(sys.argv[sys.argv.index("--jobs") + 1]).read_text())
    argv, num_ranks, rng = plan["argv"], plan["num_ranks"], random.Random(plan["seed"])
    folder = Path(argv[argv.index("--run-dir") + 1]) / "checkpoints"
    for kill in range(plan["kills"]):
        before = newest(folder)
        ranks = start(num_ranks, argv)
        if kill % 3 == 2:  # while it starts, loads, or trains its first steps
            time.sleep(rng.uniform(0.0, 2.0))
        else:
            wait_for_progress(folder, before, ranks)
            time.sleep(rng.uniform(0.0, 0.2))
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.join()
        was_writing = any(folder.glob(".staging-*/step-*"))
        print(json.dumps([before, newest(folder), was_writing]), flush=True)
    ranks = start(num_ranks, argv)
    for rank in ranks:
        rank.join()
    sys.exit(any(rank.exitcode for rank in ranks))


if __name__ == "__main__":
    main()
