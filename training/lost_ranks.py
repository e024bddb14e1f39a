"""A rank that dies or hangs: the others say which, in which collective, and end at once.

A collective fails where a connection breaks or its time is up. Every rank that notices says so in
the job's store, and breaks its own connections, so that ranks that waited for it notice too; who
has not said anything after a moment is lost.
"""

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from training.processes import Ranks, RunError, collective_timeout

ANSWER_SEC = 3.0  # the launcher gives the other ranks 30 s after one has died
EXIT_CODE = 1
STORE_PREFIX = "lost_ranks"


def limit_all_groups() -> None:
    """Give every process group our timeout; those that DeepSpeed makes have torch's half an hour.

    All ranks call this when all groups exist.
    """
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        torch.distributed.distributed_c10d._set_pg_timeout(collective_timeout(), group)


@contextmanager
def report_lost_ranks(ranks: Ranks) -> Iterator[None]:
    """End this process with one sentence if a collective fails because of another rank."""
    try:
        yield
    except RuntimeError as err:  # what torch raises for a failed collective, of any backend
        is_collective = isinstance(err, torch.distributed.DistError) or "gloo" in str(err)
        if isinstance(err, RunError) or not is_collective:
            raise
        sentence = _describe(err, ranks)
        if sentence is not None:
            sys.stderr.write(f"error: [rank {ranks.rank}] {sentence}\n")
            sys.stderr.flush()
        os._exit(EXIT_CODE)  # threads of broken connections would hold up an ordinary exit


def _describe(error: RuntimeError, ranks: Ranks) -> str | None:
    """Return the sentence, or None if another rank says it."""
    lost = _lost_ranks(ranks)
    if ranks.rank != next(r for r in range(ranks.world_size) if r not in lost):
        return None
    reason = str(error).splitlines()[0].split("] ", 1)[-1].split(". ")[0]
    where = f"{_collective_of(error)} ({reason})"
    what = f"{where} failed although every rank answers"
    if lost:
        numbers = ", ".join(str(rank) for rank in sorted(lost))
        what = f"lost rank {numbers} in {where}: it died or does not answer"
    return (
        f"{what}; look at its node and the output above, and run the same command again: it "
        "continues from the last checkpoint."
    )


def _collective_of(error: RuntimeError) -> str:
    """Name the collective by the innermost function of torch that was called."""
    frames = traceback.extract_tb(error.__traceback__)
    names = [f.name for f in frames if "torch/distributed/distributed_c10d" in f.filename]
    return names[-1] if names else "a collective"


def _lost_ranks(ranks: Ranks) -> set[int]:
    """Find the ranks that do not say that a collective failed. Every rank that noticed calls it."""
    store = torch.distributed.distributed_c10d._get_default_store()
    store.set_timeout(timedelta(seconds=ANSWER_SEC))
    everyone = range(ranks.world_size)
    try:
        store.set(f"{STORE_PREFIX}/{ranks.rank}", "")
        torch.distributed.destroy_process_group()
        deadline = time.monotonic() + ANSWER_SEC
        while True:
            lost = {rank for rank in everyone if not store.check([f"{STORE_PREFIX}/{rank}"])}
            if not lost or time.monotonic() > deadline:
                return lost
            time.sleep(0.1)
    except RuntimeError:  # the store is a part of rank 0
        return {0} - {ranks.rank}
