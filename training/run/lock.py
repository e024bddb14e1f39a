"""One job per run directory: two would prune and overwrite each other's checkpoints.

Two guards. A lock keeps a second job out while the first one lives, where the file system has
locks that all nodes see. And whatever a job publishes is moved out of a staging folder of its own,
which the next job removes before it looks for checkpoints: a job that a cluster has given up, but
whose processes still run on a node that nobody reaches, cannot publish any more what it had begun.

    checkpoints/.staging-TOKEN/     checkpoints that are being written, and the next `latest`
"""

import contextlib
import fcntl
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from training.checkpoints.manifest import CHECKPOINT_DIR

LOCK_FILE = "lock"
STAGING_PREFIX, REMOVED_PREFIX = ".staging-", ".removed-"
WAIT_SEC = 15.0  # the processes of a job that was just ended need a moment to leave


class Claim(NamedTuple):
    """What came of a job's wish to write to a run directory."""

    staging: Path | None  # its own; None = it must not write
    problem: str | None = None  # why not


@contextmanager
def hold_run_directory(run_dir: Path, wait_sec: float = WAIT_SEC) -> Iterator[Claim]:
    """Keep other jobs out of a run directory. Only rank 0 calls this.

    The system gives the lock back when this process ends, however it ends. On a file system
    without locks nobody is kept out, but the job before can publish nothing more.
    """
    path = run_dir / LOCK_FILE
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as err:
        yield _cannot_write(run_dir, err)
        return
    try:
        if _is_locked_by_another(descriptor, wait_sec):
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
            yield Claim(
                None,
                f"--run-dir {run_dir} is in use by another job ({holder or 'just started'}); wait "
                "for it, end it, or choose another --run-dir.",
            )
            return
        try:
            staging = take_over(run_dir)
        except OSError as err:
            yield _cannot_write(run_dir, err)
            return
        try:
            yield Claim(staging)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    finally:
        os.close(descriptor)


def take_over(run_dir: Path) -> Path:
    """Make a staging folder for this job, and remove those of all jobs before it.

    Raises:
        OSError: the disk.
    """
    folder = run_dir / CHECKPOINT_DIR
    own = folder / f"{STAGING_PREFIX}{uuid.uuid4().hex}"
    own.mkdir(parents=True)
    for other in folder.glob(f"{STAGING_PREFIX}*"):
        if other != own:
            # At once, so that nothing is moved out of it half deleted.
            with contextlib.suppress(FileNotFoundError):  # its job has just left
                other.rename(folder / f"{REMOVED_PREFIX}{uuid.uuid4().hex}")
    for removed in folder.glob(f"{REMOVED_PREFIX}*"):
        shutil.rmtree(removed, ignore_errors=True)  # what is left is tried again by the next job
    return own


def _cannot_write(run_dir: Path, error: OSError) -> Claim:
    return Claim(None, f"--run-dir {run_dir}: cannot write ({error.strerror}); choose another.")


def _is_locked_by_another(descriptor: int, wait_sec: float) -> bool:
    deadline = time.monotonic() + wait_sec
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return True
            time.sleep(0.1)
        except OSError:  # no locks on this file system
            return False
        else:
            os.ftruncate(descriptor, 0)
            text = f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}\n"
            os.pwrite(descriptor, text.encode(), 0)
            return False
