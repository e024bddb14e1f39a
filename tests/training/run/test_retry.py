"""Whether a job is started again: by its exit code, and not without end."""

import json

import pytest

from tests.support.launch import run
from training.checkpoints import manifest
from training.config.command_line import parse_command_line
from training.retry import run_dir_of
from training.run.starts import Restarts, decide, newest_checkpoint, read_restarts

CRASH, SAVED, MISTAKE, DONE = 1, 75, 2, 0


def restarts_of(exit_codes, checkpoints, limit=2, job="7"):
    """How often a job is started again that ends with these codes at these checkpoints."""
    state = Restarts()
    for number, (code, checkpoint) in enumerate(zip(exit_codes, checkpoints, strict=True)):
        state, why = decide(code, job, checkpoint, state, limit)
        if state is None:
            return number, why
    return len(exit_codes), why


def test_a_job_that_gets_on_is_started_again_for_ever():
    checkpoints = [f"step-{number}" for number in range(100)]

    assert restarts_of([CRASH] * 100, checkpoints)[0] == 100


def test_a_job_that_does_not_get_on_is_given_up():
    number, why = restarts_of([CRASH] * 9, ["step-1"] + ["step-2"] * 8)

    assert number == 3  # one from step 1, two from step 2
    assert why == (
        "ended with exit code 1; no progress since step-2 in 2 restart(s), so the job is not "
        "started again: look at the errors above"
    )


def test_signals_count_too_if_nothing_is_saved():
    assert restarts_of([SAVED] * 9, [""] * 9)[0] == 2


@pytest.mark.parametrize("code", [DONE, MISTAKE])
def test_what_is_done_or_needs_a_person_is_not_started_again(code):
    assert restarts_of([code], ["step-1"])[0] == 0


def test_another_job_counts_afresh():
    before = Restarts("7", "step-1", 2)

    assert decide(CRASH, "8", "step-1", before, 2)[0] == Restarts("8", "step-1", 1)


def test_the_command_answers_by_its_exit_code_and_remembers(tmp_path):
    run_dir = tmp_path / "run"
    command = ["python", "training/retry.py", CRASH, "--run-dir", run_dir]

    first = run(*command, MAX_RESTARTS="1", SLURM_JOB_ID="7")
    second = run(*command, MAX_RESTARTS="1", SLURM_JOB_ID="7", expect=1)

    expected = "ended with exit code 1; starting again from the beginning (restart 1 of 1 from"
    assert expected in first
    assert "no progress since the beginning in 1 restart(s)" in second
    assert read_restarts(run_dir / "restarts.json") == Restarts("7", "", 1)


def test_a_damaged_count_is_none(tmp_path):
    path = tmp_path / "restarts.json"
    for text in ("{", "[]", json.dumps({"job": 3})):
        path.write_text(text)
        assert read_restarts(path) == Restarts()
    assert read_restarts(tmp_path / "missing") == Restarts()


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--preset", "xl", "--lr", "1e-4"],
        ["--preset", "b", "--preset", "s", "--max-steps", "3"],
        ["--run-dir=runs/a", "--preset", "tests/small.yaml"],
        ["--preset", "tests/small.yaml"],
        ["--run-dir", "runs/a", "--run-dir", "runs/b", "--ema-decays", "none"],
    ],
)
def test_it_finds_the_run_directory_that_training_finds(flags):
    assert str(run_dir_of(flags)) == parse_command_line(flags).config.run.run_dir


def test_it_knows_the_names_that_training_writes(tmp_path):
    pointer = tmp_path / manifest.CHECKPOINT_DIR / manifest.LATEST_FILE
    assert newest_checkpoint(tmp_path) == ""
    pointer.parent.mkdir()
    pointer.write_text("step-0000010\n")

    assert newest_checkpoint(tmp_path) == "step-0000010"


def test_it_starts_without_torch():
    imported = "import sys, training.retry; sys.exit('torch' in sys.modules)"

    run("python", "-c", imported)
