"""Checkpoints survive: kill -9 at any moment, damage, a second job, and changes after the copy."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import pickle
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from data_tools.errors import ConfigError
from tests.support.launch import run
from training.checkpoints import background_write
from training.checkpoints.background_write import GIVEN_UP, BackgroundWrite, WritePlan
from training.checkpoints.host_copy import HostCopies
from training.checkpoints.manifest import (
    MANIFEST_FILE,
    CheckpointManifest,
    IncompleteCheckpointError,
    Layout,
    TrainState,
    latest_checkpoint,
    manifest_text,
    read_manifest,
    record_of,
)
from training.checkpoints.publishing import is_taken_over, name_latest, prune, publish
from training.checkpoints.resume_point import (
    ResumeError,
    ResumePoint,
    choose_together,
    newest_point,
    verify_together,
)
from training.checkpoints.unpickling import unpickle
from training.monitoring.event_files import read_metrics
from training.run.lock import hold_run_directory, take_over

KILLS = 20
STEPS = 64
CLOCK_STEPS = 16
TINY = [
    *("--num-experts", 2, "--global-batch-size", 4, "--warmup-steps", 2, "--patch-size", 16),
    *("--log-every", 1, "--sample-every", 0, "--loss-weight", "uncertainty"),
    *("--prior-matching-every", 4),
]


@pytest.fixture(scope="module")
def fp32(tmp_path_factory):
    path = tmp_path_factory.mktemp("ds") / "zero2.json"
    path.write_text('{"zero_optimization": {"stage": 2}}')
    return path


def steps(count):
    return "--max-steps", count


@pytest.fixture(scope="module")
def whole(tmp_path_factory, demo_latents, fp32, train_forked):
    """A run of two ranks that nobody disturbed; one that saves by the clock."""
    folder = tmp_path_factory.mktemp("runs")
    common = ["--deepspeed", fp32, "--data", demo_latents, *TINY]
    common += ["--save-every", CLOCK_STEPS]
    clock = ["--save-every-minutes", "1e-5", "--keep-last", 3, "--keep-every", 4]
    train_forked(
        *(*common, "--run-dir", folder / "whole", *steps(STEPS), "--keep-every", CLOCK_STEPS)
    )
    train_forked(*common, "--run-dir", folder / "clock", *steps(CLOCK_STEPS), *clock)
    return folder / "whole"


def exact(run_dir):
    return [
        {k: v for k, v in record.items() if not k.startswith(("speed/", "memory/"))}
        for record in read_metrics(run_dir)
    ]


def assert_same_weights(one, other):
    """Compare the weights of a run's newest checkpoint with another's of that step, bit by bit."""
    folder = latest_checkpoint(other)
    for file in ("weights.safetensors", "ema.safetensors"):
        expected = load_file(one / "checkpoints" / folder.name / file)
        got = load_file(folder / file)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], value) for key, value in expected.items())


@pytest.mark.processes
def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(
    whole, demo_latents, fp32, tmp_path
):
    argv = ["--deepspeed", fp32, "--data", demo_latents, "--run-dir", tmp_path / "run", *TINY]
    argv += ["--save-every", 1, *steps(STEPS)]
    plan = {"argv": [str(part) for part in argv], "num_ranks": 2, "kills": KILLS, "seed": 0}
    (tmp_path / "jobs.json").write_text(json.dumps(plan))

    jobs = ("--jobs", tmp_path / "jobs.json")
    output = run("python", "tests/support/killed_jobs.py", *jobs, DS_ACCELERATOR="cpu")

    kills = [json.loads(line) for line in output.splitlines() if line.startswith('["')]
    assert len(kills) == KILLS
    assert any(was_writing for _, _, was_writing in kills), "the premise: killed during saves"
    assert all(before <= after for before, after, _ in kills), "nothing published is lost"
    assert exact(tmp_path / "run") == exact(whole)
    assert_same_weights(whole, tmp_path / "run")


@pytest.mark.processes
def test_saving_by_the_clock_changes_nothing_and_keeps_what_it_should(whole):
    run_dir = whole.parent / "clock"

    saved = sorted(int(path.name[-7:]) for path in run_dir.glob("checkpoints/step-*"))

    assert saved[-1] == CLOCK_STEPS
    assert len(saved) >= 3, "the premise: the clock has saved in between"
    assert all(step % 4 == 0 for step in saved[:-3])
    assert exact(run_dir) == exact(whole)[:CLOCK_STEPS]
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


def test_a_persons_copy_of_a_checkpoint_is_left_alone(tmp_path):
    folders = [checkpoint_at(tmp_path, step) for step in (2, 4, 6)]
    copy = folders[0].with_name(f"{folders[0].name}-good")
    shutil.copytree(folders[0], copy)

    prune(folders[2], staging_of(tmp_path), keep_last=1, keep_every=5)

    assert [path.exists() for path in (*folders, copy)] == [False, False, True, True]
    assert newest_point(tmp_path).folder == folders[2]


@pytest.mark.usefixtures("single_process_group")
def test_a_run_continues_from_the_newest_whole_checkpoint_up_to_the_latest(tmp_path):
    assert newest_point(tmp_path) is None
    assert choose_together(tmp_path, [].append) == (None, [])
    folders = {step: checkpoint_at(tmp_path, step) for step in (2, 4, 6, 8)}
    name_latest(folders[6], staging_of(tmp_path))
    (folders[6] / MANIFEST_FILE).write_text("{")
    (folders[2] / MANIFEST_FILE).unlink()
    layout = Layout(1, 1, 2, "fp32")
    wanted = CheckpointManifest(folders[4].name, TrainState(4, 32), layout, "", 1, {})
    looked_at = []

    point, damaged = choose_together(tmp_path, looked_at.append)

    assert point == newest_point(tmp_path) == (folders[4], wanted)
    assert looked_at == [wanted]
    assert len(damaged) == 1
    assert damaged[0].startswith(f"{folders[6] / MANIFEST_FILE} is not a checkpoint manifest")

    (folders[4] / MANIFEST_FILE).unlink()
    with pytest.raises(IncompleteCheckpointError, match=f"^{folders[6] / MANIFEST_FILE} is not a"):
        newest_point(tmp_path)
    with pytest.raises(ResumeError, match="no older checkpoint in .* is whole"):
        choose_together(tmp_path, looked_at.append)


@pytest.mark.usefixtures("single_process_group")
def test_a_file_that_is_missing_cut_off_or_changed_is_noticed_before_anything_is_loaded(tmp_path):
    folder = checkpoint_at(tmp_path, 2)
    path = folder / "weights.safetensors"
    path.write_bytes(b"1234")
    manifest = read_manifest(folder)
    files = {path.name: record_of(path)}
    (folder / MANIFEST_FILE).write_text(manifest_text(dataclasses.replace(manifest, files=files)))
    assert choose_together(tmp_path, [].append)[0].folder == folder

    for content, reason in (
        (b"123", "has 3 bytes, its manifest.json says 4 bytes"),
        (b"1235", "does not match the checksum in its manifest.json"),
        (None, "is missing, its manifest.json says 4 bytes"),
    ):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(ResumeError, match=f"^{path} {reason}, and no older checkpoint"):
            choose_together(tmp_path, [].append)


@pytest.mark.usefixtures("single_process_group")
def test_a_checkpoint_that_must_not_be_continued_is_refused(tmp_path):
    checkpoint_at(tmp_path, 2)

    def refuse(_):
        raise ConfigError("--data: another one.")

    with pytest.raises(ResumeError, match="--data: another one."):
        choose_together(tmp_path, refuse)


def hold_until_killed(run_dir, pipe):
    with hold_run_directory(run_dir) as claim:
        pipe.send(claim)
        time.sleep(600)


@pytest.mark.processes
def test_a_second_job_is_kept_out_until_the_first_is_gone(tmp_path):
    receiver, sender = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")
    first = context.Process(target=hold_until_killed, args=(tmp_path, sender))
    first.start()
    try:
        first_staging, problem = receiver.recv()
        assert problem is None
        with hold_run_directory(tmp_path, wait_sec=0.0) as (staging, problem):
            assert staging is None
            assert f"--run-dir {tmp_path} is in use by another job (process {first.pid}" in problem
        assert first_staging.is_dir()
        first.kill()
        with hold_run_directory(tmp_path) as (staging, problem):
            assert problem is None
            assert list((tmp_path / "checkpoints").iterdir()) == [staging], (
                "the first one's is gone"
            )
        assert not staging.exists()
    finally:
        first.kill()
        first.join()


def test_a_manifest_that_has_changed_is_noticed(tmp_path):
    layout = Layout(2, 1, 3, "bf16")
    manifest = CheckpointManifest("step-0000004", TrainState(4, 32), layout, "abc", 1, {})
    path = tmp_path / MANIFEST_FILE
    path.write_text(manifest_text(manifest))
    assert read_manifest(tmp_path) == manifest

    path.write_text(manifest_text(manifest).replace('"step": 4', '"step": 5'))

    with pytest.raises(IncompleteCheckpointError, match="does not match the checksum in it"):
        read_manifest(tmp_path)


class Planted:
    """Runs a program when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.usefixtures("single_process_group")
def test_a_file_that_could_run_a_program_is_not_unpickled_even_if_it_is_listed(tmp_path):
    path, executed = tmp_path / "mp_rank_00_model_states.pt", tmp_path / "executed"
    torch.save({"module": {"a": torch.zeros(2)}, "more": Planted(str(executed))}, path)
    files = {path.name: record_of(path)}
    layout = Layout(1, 1, 0, "fp32")
    manifest = CheckpointManifest("step-0000004", TrainState(4), layout, "", 1, files)

    reason = verify_together(ResumePoint(tmp_path, manifest))

    assert reason == f"{path} holds posix.mkdir, which no checkpoint of this program does"
    with pytest.raises(pickle.UnpicklingError):
        unpickle(path)
    assert not executed.exists()


def visible(run_dir):
    """What another job sees of a run's checkpoints."""
    folder = run_dir / "checkpoints"
    return (folder / "latest").read_text(), sorted(folder.glob("step-*/*"))


@pytest.mark.parametrize("moves_before", range(5))
def test_a_job_that_another_one_has_taken_over_from_changes_nothing_more(
    tmp_path, monkeypatch, moves_before
):
    """Such as one on a node that Slurm has lost: its lock may not reach the other node."""
    for step in (2, 4, 6):
        checkpoint_at(tmp_path, step)
    staging, moves, seen = take_over(tmp_path), [], []

    def move(original, *args):
        moves.append(args)
        if len(moves) == moves_before + 1:
            monkeypatch.undo()
            assert take_over(tmp_path).is_dir()
            seen.append(visible(tmp_path))
        return original(*args)

    # Of step 4, which is there already: it takes part in being replaced, too.
    complete = staging / "step-0000004"
    complete.mkdir()
    final = tmp_path / "checkpoints" / complete.name
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, partial(move, getattr(os, name)))
    with contextlib.suppress(OSError):
        publish(complete, final, "manifest")
        prune(final, staging, keep_last=1, keep_every=0)

    assert len(moves) >= moves_before + 1, "the premise"
    assert is_taken_over(staging)
    assert visible(tmp_path) == seen[0]


@pytest.mark.processes
def test_a_job_that_is_taken_over_says_so_and_ends(train_forked, demo_latents, fp32, tmp_path):
    run_dir = tmp_path / "run"
    argv = ["--deepspeed", fp32, "--data", demo_latents, "--run-dir", run_dir, *TINY]
    argv += ["--save-every", 10, *steps(1_000_000)]
    with ThreadPoolExecutor() as pool:
        said = pool.submit(train_forked, *argv, expect=2)
        while not (run_dir / "checkpoints" / "latest").exists() and not said.done():
            time.sleep(0.05)
        take_over(run_dir)
        before = visible(run_dir)
        output = said.result()

    assert output.count(f"error: --run-dir {run_dir}: another job has taken it over") == 1
    assert "Traceback" not in output
    assert visible(run_dir) == before


def slow_write(tmp_path, monkeypatch, num_files=200):
    """A write that does not go on after its first file before the event that is returned is set."""
    staging, may_go_on = take_over(tmp_path), threading.Event()
    checkpoint_at(tmp_path, 2)
    final = staging.parent / "step-0000004"
    (staging / final.name).mkdir()
    fsync = os.fsync

    def wait_and_sync(descriptor):
        assert may_go_on.wait(60)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", wait_and_sync)
    plan = WritePlan(
        *(staging, final, TrainState(4), [], {}, torch.empty(0), None), keep_last=1, keep_every=0
    )
    files = [(f"{i}.pt", {"a": torch.zeros(1000)}) for i in range(num_files)]
    return BackgroundWrite(plan, files, None), may_go_on


@pytest.mark.usefixtures("single_process_group")
@pytest.mark.parametrize("whose_signal", ["own", "another rank's"])
def test_a_signal_does_not_wait_for_a_checkpoint_that_is_being_written(
    tmp_path, monkeypatch, whose_signal
):
    # Else a quick disk has all files before the other ranks are asked again.
    monkeypatch.setattr(background_write, "OTHERS_SIGNAL_POLL_SEC", 0.0)
    write, may_go_on = slow_write(tmp_path, monkeypatch)
    before = visible(tmp_path)
    if whose_signal == "another rank's":
        store = torch.distributed.distributed_c10d._get_default_store()
        store.set(f"{write._prefix}/give_up", "")

    def is_urgent():
        may_go_on.set()
        return whose_signal == "own"

    outcome = write.outcome(is_urgent)

    assert outcome.problem == GIVEN_UP
    assert outcome.warning() == f"the checkpoint of step 4 is {GIVEN_UP}"
    assert visible(tmp_path) == before
    assert not write.plan.temporary.exists()


@pytest.mark.usefixtures("single_process_group")
def test_weights_that_are_not_finite_become_no_checkpoint(tmp_path):
    checkpoint_at(tmp_path, 2)
    before, staging = visible(tmp_path), take_over(tmp_path)
    final = staging.parent / "step-0000004"
    (staging / final.name).mkdir()
    stored = {
        "fragments": [("a", 0, 0, 0, 2)],
        "masters": [torch.tensor([1.0, torch.nan])],
        "states": [{}],
        "progress": (4, 32, 0),
        "client_state": {},
    }
    plan = WritePlan(
        *(staging, final, TrainState(4), [], {"a": torch.Size([2])}, torch.empty(0), None),
        keep_last=1,
        keep_every=0,
    )

    write = BackgroundWrite(plan, [("mp_rank_00_model_states.pt", {"partitions": stored})], None)

    assert write.outcome(lambda: False).problem == (
        "a holds values that are not finite; lower --lr, raise --warmup-steps or set "
        "--gradient-clipping"
    )
    assert visible(tmp_path) == before


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
