"""One job per run directory: two would prune and overwrite each other's checkpoints."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_FILE = "lock"
WAIT_SEC = 15.0  # the processes of a job that was just ended need a moment to leave
RESTARTS_VARIABLE = "SLURM_RESTART_COUNT"


def is_started_again() -> bool:
    """Tell whether Slurm has started this job before.

    Then its own earlier ranks, on a node that is cut off or whose locks have not expired, may still
    hold the run directory; they leave it by themselves.
    """
    return os.environ.get(RESTARTS_VARIABLE, "0") not in ("", "0")


@contextmanager
def hold_run_directory(run_dir: Path, wait_sec: float = WAIT_SEC) -> Iterator[str | None]:
    """Keep other jobs out of a run directory. Only rank 0 calls this.

    The system gives the lock back when this process ends, however it ends. On a file system
    without locks nobody is kept out.

    Yields:
        None, or why this job must not write there.
    """
    path = run_dir / LOCK_FILE
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as err:
        yield f"--run-dir {run_dir}: cannot write ({err.strerror}); choose another."
        return
    try:
        if _is_locked_by_another(descriptor, wait_sec):
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
            yield (
                f"--run-dir {run_dir} is in use by another job ({holder or 'just started'}); wait "
                "for it, end it, or choose another --run-dir."
            )
        else:
            yield None
    finally:
        os.close(descriptor)


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
