"""A rank that dies in the middle of training ends all of them, and its number is said."""

import os
import re
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest

from data_tools.errors import ConfigError
from tests.support.launch import deepspeed, finish, start
from tests.support.ranks import run_ranks
from training.checkpoints.manifest import latest_checkpoint
from training.ranks.process_group import collective_timeout
from training.ranks.watchdog import SPARE_SEC, limit_all_groups

START_SEC = 120


def children_by_rank(launcher):
    """Process ids of a job's ranks, from the environment that the launcher gave them."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_ours = os.getpgid(int(folder.name)) == launcher.pid
            variables = dict(
                item.split("=", 1)
                for item in (folder / "environ").read_text(errors="replace").split("\0")
                if "=" in item
            )
            command = (folder / "cmdline").read_text(errors="replace")
        except OSError:
            continue
        if is_ours and "RANK" in variables and "training/main.py" in command:
            found[int(variables["RANK"])] = int(folder.name)
    return found


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.processes
def test_a_killed_rank_ends_the_job_in_one_sentence(demo_latents, tmp_path):
    run_dir = tmp_path / "run"
    flags = ["--data", demo_latents, "--run-dir", run_dir, "--global-batch-size", 8]
    flags += ["--num-experts", 4, "--expert-parallel-size", 2, "--max-steps", 100_000]
    flags += ["--log-every", 1, "--save-every", 2, "--sample-every", 0]

    process = start(*deepspeed(2, "training/main.py", *flags))
    deadline = time.monotonic() + START_SEC
    while not (run_dir / "checkpoints" / "latest").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    ranks = children_by_rank(process)
    os.kill(ranks[1], signal.SIGKILL)
    output = finish(process)

    lines = [line for line in output.splitlines() if "error: [rank" in line]
    assert len(lines) == 1, output
    assert re.match(
        r"error: \[rank 0\] lost rank 1, dead or hanging: rank 1: last heard of \d+ s ago, .*; "
        r"rank 0: .*, for \d+ s \(.*\); look at its node and the output above, and run the same "
        r"command again: it continues from the last checkpoint\.$",
        lines[0],
    ), lines
    assert "Traceback" not in output
    assert process.returncode != 0
    assert not [pid for pid in ranks.values() if is_running(pid)]
    assert latest_checkpoint(run_dir) is not None


def groups_have_a_timeout(rank, world_size):
    import torch
    from deepspeed.utils import groups

    os.environ["COLLECTIVE_TIMEOUT_SEC"] = "20"
    groups._create_expert_and_data_parallel(world_size)
    limit_all_groups()
    of_experts = groups._get_expert_parallel_group(f"ep_size_{world_size}")
    for group in (torch.distributed.group.WORLD, of_experts):
        options = group._get_backend(torch.device("cpu")).options
        assert options._timeout == timedelta(seconds=6 * 20 + SPARE_SEC), options._timeout


@pytest.mark.processes
def test_no_group_ends_before_the_watchdog_has_said_why():
    """Those that DeepSpeed makes included."""
    run_ranks(groups_have_a_timeout, 2)


def test_the_timeout_is_a_number_of_seconds():
    assert collective_timeout({}) == timedelta(minutes=5)
    assert collective_timeout({"COLLECTIVE_TIMEOUT_SEC": "20"}) == timedelta(seconds=20)
    for text in ("0", "-1", "soon", "1.5"):
        with pytest.raises(ConfigError, match=f"^COLLECTIVE_TIMEOUT_SEC={text} is no number of"):
            collective_timeout({"COLLECTIVE_TIMEOUT_SEC": text})
