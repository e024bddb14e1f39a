"""Whether a training command that ended should be started again: the job scripts ask this.

    python training/retry.py EXIT_CODE [the flags of training/main.py]

Exit code 0 = yes. What was stopped by a signal and saved is started again, a user's mistake is not,
anything else is a crash. No more than MAX_RESTARTS times in a row without a new checkpoint.
It runs between a crash and the next try, so it does without torch, whose import takes seconds.
"""

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import yaml

from data_tools.errors import (
    CONFIG_ERROR_EXIT_CODE,
    ArgumentParser,
    ConfigError,
    exit_on_config_error,
)
from data_tools.files import FIRST, MalformedError
from data_tools.formats import Format
from data_tools.process.entry_point import enter
from data_tools.process.launcher import batch_job
from data_tools.user_files.paths import expand
from data_tools.user_files.user_text import read_text
from training.config import location
from training.config.location import preset_file
from training.ranks.exit_codes import SAVED_EXIT_CODE

RESTARTS_FILE = "restarts.json"  # in the run directory
LIMIT_VARIABLE = "MAX_RESTARTS"
DEFAULT_LIMIT = 3
NO_EXIT_CODE = 1


@dataclass(frozen=True)
class Restarts:
    """How often a job was started again from where it is."""

    job: str = field(default="", metadata=FIRST)  # of the batch system; a new one counts afresh
    checkpoint: str = field(default="", metadata=FIRST)
    count: int = field(default=0, metadata=FIRST)


RESTARTS = Format(newest=1, kind=Restarts)


def decide(
    exit_code: int, job: str, checkpoint: str, before: Restarts, limit: int
) -> tuple[Restarts | None, str]:
    """Return the new count, None if the job should not be started again, and why.

    Args:
        exit_code: of the training command.
        job: that ran it.
        checkpoint: the newest one; empty if there is none.
        before: the count after the last restart.
        limit: restarts from one checkpoint.
    """
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


def read_restarts(path: Path) -> Restarts:
    """Read the last count; a missing or damaged file is none."""
    try:
        return RESTARTS.loads(path.read_bytes(), str(path))
    except (OSError, ValueError, MalformedError):
        return Restarts()


def run_dir_of(flags: list[str]) -> Path:
    """Return the run directory of flags that training/main.py has accepted."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--run-dir")
    parser.add_argument("--preset", default="demo")
    given, _ = parser.parse_known_args(flags)
    if given.run_dir is not None:
        return Path(expand(given.run_dir, "--run-dir"))
    path = preset_file(given.preset)
    try:
        said = yaml.safe_load(read_text(path))["run"]["run_dir"]
        return Path(expand(location.run_dir_of(path, said), given.preset))
    except (OSError, ValueError, TypeError, KeyError, RecursionError, yaml.YAMLError) as err:
        raise ConfigError(
            f"--preset {given.preset}: no run_dir can be read from it; give the flags that "
            "training/main.py was given."
        ) from err


def newest_checkpoint(run_dir: Path) -> str:
    """Return the name of the newest checkpoint; empty if there is none."""
    pointer = run_dir / "checkpoints" / "latest"
    return pointer.read_text("ascii", "replace").strip() if pointer.exists() else ""


def main(argv: list[str] | None = None) -> None:
    """Print the decision; exit with code 0 if the job should be started again."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: training/retry.py EXIT_CODE [FLAG ...]  (--help: this)\n\n" + __doc__)
        sys.exit(0 if argv else CONFIG_ERROR_EXIT_CODE)
    with exit_on_config_error():
        limit = os.environ.get(LIMIT_VARIABLE, str(DEFAULT_LIMIT))
        if not (_is_number(argv[0]) and _is_number(limit)):
            raise ConfigError(f"EXIT_CODE {argv[0]} and {LIMIT_VARIABLE}={limit}: use numbers.")
        exit_code = int(argv[0])
        if exit_code in (0, CONFIG_ERROR_EXIT_CODE):  # then the flags need not be right
            print(decide(exit_code, "", "", Restarts(), int(limit))[1], flush=True)
            sys.exit(NO_EXIT_CODE)
        run_dir = run_dir_of(argv[1:])
        try:
            restarts, why = _decide_for(run_dir, exit_code, int(limit))
        except OSError as err:
            raise ConfigError(
                f"--run-dir {run_dir}: cannot be read or written ({err.strerror}); the job is not "
                "started again."
            ) from err
    print(f"{run_dir}: {why}.", flush=True)
    if restarts is None:
        sys.exit(NO_EXIT_CODE)


def _decide_for(run_dir: Path, exit_code: int, limit: int) -> tuple[Restarts | None, str]:
    """Decide by what the run has kept, and keep the new count there."""
    path = run_dir / RESTARTS_FILE
    job, checkpoint = batch_job(), newest_checkpoint(run_dir)
    restarts, why = decide(exit_code, job, checkpoint, read_restarts(path), limit)
    if restarts is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        RESTARTS.write(path, restarts)
    return restarts, why


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


if __name__ == "__main__":
    enter(main)
