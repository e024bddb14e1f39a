"""Train commands in which something goes wrong on one rank, and say how each of them ended.

Started as: faulty_jobs.py --jobs FILE, where FILE is a JSON list of jobs: name,
num_ranks, argv (of training/main.py), env, and fault, with the rank that has it and the step. Every
rank is forked from this process, which has imported everything: the tests pay for the imports once.
As a launcher would, it kills ranks that are left when the others have ended. Prints a line of JSON
for every job: exit codes, seconds from the fault to each rank's end, and the output.
"""

import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from itertools import islice
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as main.py, before torch is imported

import torch

import training.loop
from tests.support.forked_jobs import prepare_to_fork
from training.main import main as train
from training.ranks.watchdog import BEAT_SEC

JOBS_AT_A_TIME = 3
JOB_SEC = 300
SLOW_DISK_SEC = 20.0
LAUNCHER_SEC = 15.0  # after the first rank has failed; real launchers give half a minute


def run_out_of_memory():
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
    torch.ones(1 << 30)


def wait_for_ever():
    time.sleep(3600)


def disagree(own, others):
    def fault(is_faulty):
        (own if is_faulty else others)()

    return fault


def reduce_numbers(count):
    torch.distributed.all_reduce(torch.ones(count))


def slow_disk():
    sync = os.fsync

    def fsync(descriptor):
        os.fsync = sync  # slow once
        time.sleep(SLOW_DISK_SEC)
        sync(descriptor)

    os.fsync = fsync


def fail_an_assertion():
    raise AssertionError("two and two are four")


ON_ONE_RANK = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "out of memory": run_out_of_memory,
    "hanging": wait_for_ever,
    "mistaken": fail_an_assertion,
    "slow disk": slow_disk,
    "none": lambda: None,
}
ON_ALL_RANKS = {
    "other collective": disagree(torch.distributed.barrier, lambda: reduce_numbers(1000)),
    "other shape": disagree(lambda: reduce_numbers(500), lambda: reduce_numbers(1000)),
    "all mistaken": disagree(fail_an_assertion, fail_an_assertion),
}


def run_rank(rank, job, port, folder):
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["num_ranks"])}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | job["env"]
    train_step = training.loop.train_step

    def faulty_train_step(parts, data, step):
        if step == job["step"]:
            is_faulty = rank == job["rank"]
            if is_faulty and job["fault"] in ("killed", "stopped"):
                time.sleep(2 * BEAT_SEC)  # four steps may take less than one beat
            if is_faulty:
                (folder / "time").write_text(str(time.monotonic()))
            if job["fault"] in ON_ALL_RANKS:
                ON_ALL_RANKS[job["fault"]](is_faulty)
            elif is_faulty:
                ON_ONE_RANK[job["fault"]]()
        return train_step(parts, data, step)

    training.loop.train_step = faulty_train_step
    train(job["argv"])


def run_job(job):
    """Start a job, and yield until it has ended."""
    folder = Path(job["folder"])
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=run_rank, args=(rank, job, port, folder))
        for rank in range(job["num_ranks"])
    ]
    for rank in ranks:
        rank.start()
    ended, deadline = [0.0] * len(ranks), time.monotonic() + JOB_SEC
    while not all(ended):
        for number, rank in enumerate(ranks):
            if not ended[number] and rank.exitcode is not None:
                ended[number] = time.monotonic()
                if rank.exitcode:
                    deadline = min(deadline, time.monotonic() + LAUNCHER_SEC)
        if time.monotonic() > deadline:
            for rank in ranks:
                rank.kill()
        yield
    fault = folder / "time"
    began = float(fault.read_text()) if fault.exists() else 0.0
    result = {
        "name": job["name"],
        "codes": [rank.exitcode for rank in ranks],
        "seconds": [round(end - began, 1) for end in ended] if began else [],
        "output": (folder / "output.txt").read_text(),
    }
    print(json.dumps(result), flush=True)


def main():
    prepare_to_fork()
    jobs = json.loads(Path(sys.argv[sys.argv.index("--jobs") + 1]).read_text())
    waiting = map(run_job, jobs)
    running = list(islice(waiting, JOBS_AT_A_TIME))
    while running:
        for job in list(running):
            try:
                next(job)
            except StopIteration:
                running.remove(job)
                running += islice(waiting, 1)
        time.sleep(0.05)


if __name__ == "__main__":
    main()
