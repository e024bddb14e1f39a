"""Start the product's commands as a user does, and clean up after them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
TIMEOUT_SEC = 600


def environment(**extra):
    """The user's environment with this interpreter's commands first and one thread a process."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = f"{BIN}{os.pathsep}{env['PATH']}"
    return env | {"PATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | extra


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(*command, cwd=REPOSITORY, **env):
    """Start a command in a process group of its own; use as a context manager with `finish`."""
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process, timeout=TIMEOUT_SEC):
    """Wait for a command and its children; return its output. Nothing of it stays behind."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return output


def run(*command, expect=0, **kwargs):
    """Run a command to its end and check its exit code."""
    process = start(*command, **kwargs)
    output = finish(process)
    assert process.returncode == expect, f"exit {process.returncode}, wanted {expect}:\n{output}"
    return output


def deepspeed(num_ranks, script, *args):
    """The launcher's command line."""
    port = free_port()
    return ("deepspeed", "--num_gpus", num_ranks, "--master_port", port, script, *args)


def run_jobs(num_ranks, jobs, folder):
    """Train several argument lists in one process group of `num_ranks`."""
    path = folder / f"jobs-{num_ranks}.json"
    path.write_text(json.dumps([[str(part) for part in job] for job in jobs]))
    return run(*deepspeed(num_ranks, "tests/support/train_jobs.py", "--jobs", path))


def wait_until(condition) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)
