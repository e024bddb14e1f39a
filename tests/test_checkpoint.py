"""Checkpoints survive: kill -9 at any moment, damage, a second job, and changes after the copy."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.launch import REPOSITORY, run, run_jobs
from training.checkpoint_manifest import (
    MANIFEST_FILE,
    CheckpointManifest,
    IncompleteCheckpointError,
    Layout,
    TrainState,
    latest_checkpoint,
    resume_points,
)
from training.checkpoint_publishing import name_latest, prune
from training.checkpoint_snapshot import HostCopies
from training.monitor import read_metrics
from training.run_lock import hold_run_directory

KILLS = 8
STEPS = 16
TINY = [
    *("--num-experts", 2, "--global-batch-size", 4, "--warmup-steps", 2, "--patch-size", 16),
    *("--log-every", 1, "--sample-every", 0, "--loss-weight", "uncertainty"),
    *("--prior-matching-every", 4, "--max-steps", STEPS),
]


@pytest.fixture(scope="module")
def fp32(tmp_path_factory):
    path = tmp_path_factory.mktemp("ds") / "zero2.json"
    path.write_text('{"zero_optimization": {"stage": 2}}')
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, demo_latents, fp32):
    """A run of two ranks that nobody disturbed; one that saves by the clock."""
    folder = tmp_path_factory.mktemp("runs")
    common = ["--deepspeed", fp32, "--data", demo_latents, *TINY]
    clock = ["--save-every-minutes", "1e-5", "--keep-last", 3, "--keep-every", 4]
    run_jobs(
        2,
        [
            [*common, "--run-dir", folder / "whole", "--save-every", STEPS],
            [*common, "--run-dir", folder / "clock", "--save-every", STEPS, *clock],
        ],
        folder,
    )
    return folder / "whole"


def exact(run_dir):
    return [
        {k: v for k, v in record.items() if not k.startswith(("speed/", "memory/"))}
        for record in read_metrics(run_dir)
    ]


def assert_same_weights(one, other):
    folder, files = latest_checkpoint(one), ("weights.safetensors", "ema.safetensors")
    for file in files:
        expected, got = load_file(folder / file), load_file(latest_checkpoint(other) / file)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], value) for key, value in expected.items())


@pytest.mark.ranks
def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(
    whole, demo_latents, fp32, tmp_path
):
    argv = ["--deepspeed", fp32, "--data", demo_latents, "--run-dir", tmp_path / "run", *TINY]
    argv += ["--save-every", 1, "--log-every", 1]
    plan = {"argv": [str(part) for part in argv], "num_ranks": 2, "kills": KILLS, "seed": 0}
    (tmp_path / "jobs.json").write_text(json.dumps(plan))

    jobs = ("--jobs", tmp_path / "jobs.json")
    output = run("python", "tests/killed_jobs.py", *jobs, DS_ACCELERATOR="cpu")

    kills = [json.loads(line) for line in output.splitlines() if line.startswith("[")]
    assert len(kills) == KILLS
    assert any(was_writing for _, _, was_writing in kills), "the premise: killed during saves"
    assert all(before <= after for before, after, _ in kills), "nothing published is lost"
    assert exact(tmp_path / "run") == exact(whole)
    assert_same_weights(whole, tmp_path / "run")


@pytest.mark.ranks
def test_saving_by_the_clock_changes_nothing_and_keeps_what_it_should(whole):
    run_dir = whole.parent / "clock"

    steps = sorted(int(path.name[-7:]) for path in run_dir.glob("checkpoints/step-*"))

    assert steps[-1] == STEPS
    assert len(steps) > 3
    assert all(step % 4 == 0 for step in steps[:-3])
    assert exact(run_dir) == exact(whole)
    assert_same_weights(whole, run_dir)


def checkpoint_at(folder, step):
    """An empty checkpoint of a step."""
    path = folder / "checkpoints" / f"step-{step:07d}"
    path.mkdir(parents=True)
    layout = {"world_size": 1, "expert_parallel_size": 1, "zero_stage": 2, "precision": "fp32"}
    state = {"step": step, "samples_consumed": 8 * step}
    manifest = {"tag": path.name, "state": state, "layout": layout, "data_hash": ""}
    text = json.dumps(manifest | {"order_version": 1, "files": {}})
    (path / MANIFEST_FILE).write_text(text)
    name_latest(path, staging_of(folder))
    return path


def staging_of(folder):
    path = folder / "checkpoints" / ".staging-test"
    path.mkdir(exist_ok=True)
    return path


def test_pruning_keeps_the_newest_those_of_multiples_and_what_a_left_line_had(tmp_path):
    folders = {step: checkpoint_at(tmp_path, step) for step in (2, 4, 6, 8, 10, 12)}

    prune(folders[10], staging_of(tmp_path), keep_last=2, keep_every=4)

    assert [step for step, path in folders.items() if path.exists()] == [4, 8, 10, 12]


def test_resume_points_are_the_whole_checkpoints_up_to_the_latest_newest_first(tmp_path):
    assert resume_points(tmp_path) == ([], [])
    folders = {step: checkpoint_at(tmp_path, step) for step in (2, 4, 6, 8)}
    name_latest(folders[6], staging_of(tmp_path))
    (folders[6] / MANIFEST_FILE).write_text("{")
    (folders[2] / MANIFEST_FILE).unlink()

    points, damaged = resume_points(tmp_path)

    assert points == [
        (
            folders[4],
            CheckpointManifest(
                *(folders[4].name, TrainState(4, 32), Layout(1, 1, 2, "fp32"), "", 1, {})
            ),
        )
    ]
    assert len(damaged) == 1
    assert damaged[0].startswith(f"{folders[6] / MANIFEST_FILE} is not a checkpoint manifest")

    (folders[4] / MANIFEST_FILE).unlink()
    with pytest.raises(IncompleteCheckpointError, match=f"^{folders[6] / MANIFEST_FILE} is not a"):
        resume_points(tmp_path)


HOLD = """
import sys, time
from pathlib import Path
from training.run_lock import hold_run_directory
with hold_run_directory(Path(sys.argv[1])) as claim:
    print(claim.problem, flush=True)
    time.sleep(600)
"""


def test_a_second_job_is_kept_out_until_the_first_is_gone(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    first = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "None\n"
        with hold_run_directory(tmp_path, wait_sec=0.0) as (staging, problem):
            assert staging is None
            assert f"--run-dir {tmp_path} is in use by another job (process {first.pid}" in problem
        os.kill(first.pid, signal.SIGKILL)
        with hold_run_directory(tmp_path) as (staging, problem):
            assert problem is None
            assert list((tmp_path / "checkpoints").iterdir()) == [staging], (
                "the first one's is gone"
            )
        assert not staging.exists()
    finally:
        first.kill()
        first.communicate()


def test_a_snapshot_does_not_change_any_more_and_shares_what_was_shared():
    master = torch.arange(6.0)
    view, other, empty = master[:4].view(2, 2), master[2:], torch.empty(0)
    copies = HostCopies([master, empty])

    copied = copies.of({"master": master, "view": view, "more": [other, (empty, 3)], "name": "x"})
    master.fill_(-1.0)

    assert copied["master"].tolist() == [0, 1, 2, 3, 4, 5]
    assert copied["view"].tolist() == [[0, 1], [2, 3]]
    assert copied["more"][0].tolist() == [2, 3, 4, 5]
    assert copied["more"][1][0].numel() == 0
    assert (copied["more"][1][1], copied["name"]) == (3, "x")
    assert copied["view"].data_ptr() == copied["master"].data_ptr(), "stored once"
    assert copied["more"][0].untyped_storage().nbytes() == 16, "stored without its surroundings"
