"""Starts that lead nowhere: the lines of starts.jsonl say from which step each start went on.

Under Slurm, retry.py decides before a job is queued again. Other launchers ask nobody: torchrun
with --max-restarts starts the ranks again by itself, as does a person's own loop around a command.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from data_tools.files import parse_json
from data_tools.process.launcher import is_restarted_by_torchrun
from training.retry import DEFAULT_LIMIT, LIMIT_VARIABLE

STARTS_FILE = "starts.jsonl"  # in the run directory


def count_vain_starts(run_dir: Path, step: int) -> int:
    """Return how many starts in a row went on from `step`, the newest ones of a run.

    A line that is torn, or of another program, ends the row.
    """
    path = run_dir / STARTS_FILE
    if not path.exists():
        return 0
    count = 0
    for line in reversed(path.read_text(encoding="utf-8", errors="replace").splitlines()):
        try:
            start = parse_json(line)
        except ValueError:
            break
        if not isinstance(start, dict) or start.get("step") != step:
            break
        count += 1
    return count


def describe_crash_loop(
    run_dir: Path, step: int, env: Mapping[str, str] = os.environ
) -> tuple[str, bool]:
    """Say that a run comes no further, before this start's own line is written.

    Returns:
        The sentence, empty if there is nothing to say, and whether this start should end: it was no
        person who made it.
    """
    limit = env.get(LIMIT_VARIABLE, "")
    allowed = int(limit) if limit.isdecimal() else DEFAULT_LIMIT
    num_restarts = count_vain_starts(run_dir, step)
    if num_restarts <= allowed:
        return "", False
    text = (
        f"{run_dir} comes no further: the last {num_restarts} starts went on from step {step} and "
        "left no later checkpoint; look at how they ended"
    )
    if not is_restarted_by_torchrun(env):
        return f"{text}.", False
    return f"{text}, and start it yourself ({LIMIT_VARIABLE}={allowed} restarts from a step).", True
