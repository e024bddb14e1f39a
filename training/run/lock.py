"""Let one job at a time write to a run directory: two would overwrite each other's checkpoints.

There are two guards. A lock keeps a second job out while the first one lives, if the file system
has locks that all nodes see. And a job moves what it publishes out of its own staging folder, which
the next job removes before it looks for checkpoints. So a job that the cluster has given up, but
whose processes still run on a node that nobody reaches, can publish nothing more.

    checkpoints/.staging-TOKEN/     checkpoints that are being written, and the next `latest`
"""

import fcntl
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from training.checkpoints.manifest import CHECKPOINT_DIR

LOCK_FILE = "lock"
STAGING_PREFIX, REMOVED_PREFIX = ".staging-", ".removed-"
WAIT_SEC = 15.0  # the processes of a job that was just ended need a moment to leave


@contextmanager
def hold_run_directory(
    run_dir: Path, wait_sec: float = WAIT_SEC
) -> Iterator[tuple[Path | None, str | None]]:
    """Keep other jobs out of a run directory. Only rank 0 calls this.

    The system gives the lock back when this process ends, however it ends. On a file system
    without locks nobody is kept out, but the job before can publish nothing more.

    Yields:
        This job's staging folder, None if it must not write, and then why, in one sentence.
    """
    staging = problem = None
    with ExitStack() as stack:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
            stack.callback(os.close, descriptor)
            if _is_locked_by_another(descriptor, wait_sec):
                holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
                problem = (
                    f"--run-dir {run_dir} is in use by another job ({holder or 'just started'}); "
                    "wait for it, end it, or choose another --run-dir."
                )
            else:
                staging = take_over(run_dir)
                stack.callback(shutil.rmtree, staging, ignore_errors=True)
        except OSError as err:
            problem = f"--run-dir {run_dir}: cannot write ({err.strerror}); choose another."
        yield staging, problem


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
            with suppress(FileNotFoundError):  # its job has just left
                other.rename(folder / f"{REMOVED_PREFIX}{uuid.uuid4().hex}")
    for removed in folder.glob(f"{REMOVED_PREFIX}*"):
        shutil.rmtree(removed, ignore_errors=True)  # what is left is tried again by the next job
    return own


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
