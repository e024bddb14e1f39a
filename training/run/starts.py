"""Count the starts of a run that lead nowhere, and decide whether to start it again.

    restarts.json   what training/retry.py has granted to one job of the batch system; it counts
                    crashes before the first step, too
    starts.jsonl    one line for each start that got as far as training, whatever launched it;
                    torchrun with --max-restarts, or a loop around a command, asks nobody before

MAX_RESTARTS limits both: so many restarts from one checkpoint. Imports nothing that takes time.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from data_tools.exit_codes import CONFIG_ERROR_EXIT_CODE, SAVED_EXIT_CODE
from data_tools.files import FIRST, MalformedError, parse_json
from data_tools.formats import Format
from data_tools.process.launcher import batch_job, is_restarted_by_torchrun
from training.checkpoints.manifest import CHECKPOINT_DIR, LATEST_FILE

STARTS_FILE, RESTARTS_FILE = "starts.jsonl", "restarts.json"  # in the run directory
LIMIT_VARIABLE = "MAX_RESTARTS"
DEFAULT_LIMIT = 3


@dataclass(frozen=True)
class Restarts:
    """How often a job was started again from one checkpoint."""

    job: str = field(default="", metadata=FIRST)  # its number; another one counts afresh
    checkpoint: str = field(default="", metadata=FIRST)  # its name; empty for the beginning
    count: int = field(default=0, metadata=FIRST)


RESTARTS = Format(newest=1, kind=Restarts)


def restart_limit(env: Mapping[str, str] = os.environ) -> int | None:
    """Return how many restarts one checkpoint may have; None if MAX_RESTARTS is no number."""
    text = env.get(LIMIT_VARIABLE, str(DEFAULT_LIMIT))
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else None


def decide(
    exit_code: int, job: str, checkpoint: str, before: Restarts, limit: int
) -> tuple[Restarts | None, str]:
    """Return the new count, None if the job should not be started again, and why."""
    if exit_code == 0:
        return None, "done"
    if exit_code == CONFIG_ERROR_EXIT_CODE:
        return None, "the error above needs a person; the job is not started again"
    if (before.job, before.checkpoint) != (job, checkpoint):
        before = Restarts(job, checkpoint)
    now = replace(before, count=before.count + 1)
    what = "saved" if exit_code == SAVED_EXIT_CODE else f"ended with exit code {exit_code}"
    where = checkpoint or "the beginning"
    if now.count > limit:
        return None, (
            f"{what}; no progress since {where} in {limit} restart(s), so the job is not started "
            "again: look at the errors above"
        )
    again = f" (restart {now.count} of {limit} from there)" if exit_code != SAVED_EXIT_CODE else ""
    return now, f"{what}; starting again from {where}{again}"


def grant_restart(run_dir: Path, exit_code: int, limit: int) -> tuple[bool, str]:
    """Decide by what the run has kept, and keep the new count there; return the answer and why.

    Raises:
        OSError: the run directory cannot be read or written.
    """
    path = run_dir / RESTARTS_FILE
    before = read_restarts(path)
    restarts, why = decide(exit_code, batch_job(), newest_checkpoint(run_dir), before, limit)
    if restarts is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        RESTARTS.write(path, restarts)
    return restarts is not None, why


def read_restarts(path: Path) -> Restarts:
    """Read the last count; a missing or damaged file is none."""
    try:
        return RESTARTS.loads(path.read_bytes(), str(path))
    except (OSError, ValueError, MalformedError):
        return Restarts()


def newest_checkpoint(run_dir: Path) -> str:
    """Return the name of the newest checkpoint; empty if there is none."""
    pointer = run_dir / CHECKPOINT_DIR / LATEST_FILE
    return pointer.read_text("ascii", "replace").strip() if pointer.exists() else ""


def count_vain_starts(run_dir: Path, step: int) -> int:
    """Return how many of a run's newest starts in a row went on from `step`.

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
        The sentence, empty if there is nothing to say, and whether this start should end, because
        a launcher and no person has made it.
    """
    limit = restart_limit(env)
    limit = DEFAULT_LIMIT if limit is None else limit
    num_restarts = count_vain_starts(run_dir, step)
    if num_restarts <= limit:
        return "", False
    text = (
        f"{run_dir} comes no further: the last {num_restarts} starts went on from step {step} and "
        "left no later checkpoint; look at how they ended"
    )
    if not is_restarted_by_torchrun(env):
        return f"{text}.", False
    return f"{text}, and start it yourself ({LIMIT_VARIABLE}={limit} restarts from a step).", True
