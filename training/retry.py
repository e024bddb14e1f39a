"""Tell a job script whether a training command that ended should be started again.

    python training/retry.py EXIT_CODE [the flags of training/main.py]

Exit code 0 = yes. What was stopped by a signal and saved is started again, a user's mistake is not,
anything else is a crash. No more than MAX_RESTARTS times in a row without a new checkpoint.
It runs between a crash and the next try, so it does without torch, whose import takes seconds.
"""

import os
import sys
from pathlib import Path

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import yaml

from data_tools.errors import ArgumentParser, ConfigError, exit_on_config_error, os_errors_as
from data_tools.exit_codes import CONFIG_ERROR_EXIT_CODE, CRASH_EXIT_CODE
from data_tools.process.entry_point import enter
from data_tools.user_files.paths import expand
from data_tools.user_files.user_text import read_text
from training.config import location
from training.run.starts import LIMIT_VARIABLE, Restarts, decide, grant_restart, restart_limit


def run_dir_of(flags: list[str]) -> Path:
    """Return the run directory of flags that training/main.py has accepted."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--run-dir")
    parser.add_argument("--preset", default="demo")
    given, _ = parser.parse_known_args(flags)
    if given.run_dir is not None:
        return Path(expand(given.run_dir, "--run-dir"))
    path = location.preset_file(given.preset)
    try:
        said = yaml.safe_load(read_text(path))["run"]["run_dir"]
        return Path(expand(location.run_dir_of(path, said), given.preset))
    except (OSError, ValueError, TypeError, KeyError, RecursionError, yaml.YAMLError) as err:
        raise ConfigError(
            f"--preset {given.preset}: no run_dir can be read from it; give the flags that "
            "training/main.py was given."
        ) from err


def main(argv: list[str] | None = None) -> None:
    """Print the decision; exit with code 0 if the job should be started again."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: training/retry.py EXIT_CODE [FLAG ...]  (--help: this)\n\n" + __doc__)
        sys.exit(0 if argv else CONFIG_ERROR_EXIT_CODE)
    with exit_on_config_error():
        code, limit = argv[0], restart_limit()
        if not (code.isascii() and code.isdecimal() and len(code) < 10) or limit is None:
            text = os.environ.get(LIMIT_VARIABLE, limit)
            raise ConfigError(f"EXIT_CODE {code} and {LIMIT_VARIABLE}={text}: use numbers.")
        exit_code = int(code)
        if exit_code in (0, CONFIG_ERROR_EXIT_CODE):  # then the flags need not be right
            print(decide(exit_code, "", "", Restarts(), limit)[1], flush=True)
            sys.exit(CRASH_EXIT_CODE)
        run_dir = run_dir_of(argv[1:])
        problem = f"--run-dir {run_dir}: cannot be read or written"
        with os_errors_as(problem, "the job is not started again"):
            is_granted, why = grant_restart(run_dir, exit_code, limit)
    print(f"{run_dir}: {why}.", flush=True)
    if not is_granted:
        sys.exit(CRASH_EXIT_CODE)


if __name__ == "__main__":
    enter(main)
