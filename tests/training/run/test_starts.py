"""A run that is started again and again from the same step is recognised, whatever starts it."""

import json

import pytest

from tests.support.launch import run
from training.config.command_line import parse_command_line
from training.run.directory import CONFIG_FILE
from training.run.starts import STARTS_FILE, count_vain_starts, describe_crash_loop

BY_TORCHRUN = {"TORCHELASTIC_RESTART_COUNT": "4"}


def write_starts(run_dir, *steps):
    lines = [json.dumps({"time": "2026-01-01T00:00:00+00:00", "step": step}) for step in steps]
    (run_dir / STARTS_FILE).write_text("".join(f"{line}\n" for line in lines))


def test_starts_count_from_the_newest_back_to_the_last_progress(tmp_path):
    assert count_vain_starts(tmp_path, 0) == 0
    write_starts(tmp_path, 0, 0, 8, 8, 8)

    assert [count_vain_starts(tmp_path, step) for step in (0, 8, 16)] == [0, 3, 0]
    with (tmp_path / STARTS_FILE).open("a") as file:
        file.write('{"time": "2026')
    assert count_vain_starts(tmp_path, 8) == 0


@pytest.mark.parametrize(
    ("num_before", "env", "is_said", "is_over"),
    [
        (3, {}, False, False),
        (4, {}, True, False),
        (3, BY_TORCHRUN, False, False),
        (4, BY_TORCHRUN, True, True),
        (1, BY_TORCHRUN | {"MAX_RESTARTS": "0"}, True, True),
    ],
)
def test_a_person_is_told_and_a_launcher_is_stopped(tmp_path, num_before, env, is_said, is_over):
    write_starts(tmp_path, *[8] * num_before)

    text, over = describe_crash_loop(tmp_path, 8, env)

    assert (bool(text), over) == (is_said, is_over)
    assert not text or f"the last {num_before} starts went on from step 8 and left no later" in text


@pytest.mark.processes
def test_the_same_command_ends_under_torchrun_and_goes_on_by_hand(demo_latents, tmp_path):
    flags = ["--data", demo_latents, "--run-dir", tmp_path]
    flags += ["--global-batch-size", 4, "--max-steps", 1, "--sample-every", 0]
    config = parse_command_line([str(flag) for flag in flags]).config
    (tmp_path / CONFIG_FILE).write_text(config.to_yaml())
    command = ["python", "training/main.py", *flags]
    write_starts(tmp_path, 0, 0, 0, 0)

    by_torchrun = run(*command, expect=2, **BY_TORCHRUN)
    by_hand = run(*command)

    sentence = f"{tmp_path} comes no further: the last 4 starts went on from step 0 and left no "
    assert f"error: {sentence}" in by_torchrun and "Traceback" not in by_torchrun
    assert f"warning: {sentence}" in by_hand and "done: 1 step," in by_hand
