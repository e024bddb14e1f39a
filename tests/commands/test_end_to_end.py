"""The mandated commands as a user types them: encode, train, kill, resume, sample, look."""

import json
import os
import re
import signal
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image

from data_tools.exit_codes import SAVED_EXIT_CODE
from tests.support.launch import deepspeed, finish, free_port, run, start
from training.checkpoints.manifest import (
    CHECKPOINT_DIR,
    LATEST_FILE,
    latest_checkpoint,
    read_manifest,
)
from training.monitoring.event_files import read_metrics
from training.monitoring.metrics import METRICS, PICTURES

pytestmark = pytest.mark.processes

STEPS = 12
SAVE_EVERY = 4


def train_command(data, run_dir, *flags, num_ranks=1):
    return deepspeed(
        num_ranks,
        "training/main.py",
        *("--deepspeed", "ds_configs/zero2.json", "--data", data, "--run-dir", run_dir),
        *("--global-batch-size", 8, "--max-steps", STEPS, "--log-every", 1),
        *("--save-every", SAVE_EVERY, "--sample-every", 0, *flags),
    )


def wait_for(process, condition, timeout=300):
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, "waited too long:\n" + finish(process)
        time.sleep(0.05)


def losses(run_dir):
    return [(record["step"], record["loss/total"]) for record in read_metrics(run_dir)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, demo_latents):
    """An uninterrupted run with sample grids, two ranks."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    grids = ("--sample-every", 6, "--sample-count", 4, "--sample-steps", 3)
    output = run(*train_command(demo_latents, run_dir, *grids, num_ranks=2))
    return run_dir, output


def test_training_says_what_it_does_and_leaves_a_complete_run_directory(trained):
    run_dir, output = trained

    assert "starting at step 0 of 12: Switch-DiT demo/2, 2 rank(s), ZeRO 2" in output
    assert "step 12/12  loss" in output
    assert "done: 12 steps" in output
    assert [step for step, _ in losses(run_dir)] == list(range(1, STEPS + 1))
    assert read_manifest(latest_checkpoint(run_dir)).state.step == STEPS
    kept = sorted(path.name for path in (run_dir / CHECKPOINT_DIR).iterdir())
    assert kept == [LATEST_FILE, "step-0000008", "step-0000012"]
    for step in (6, 12):
        assert np.asarray(Image.open(run_dir / "samples" / f"{step:07d}.png")).std() > 0
    assert not [path for path in run_dir.rglob("*") if "tmp" in path.name]


def test_a_killed_run_continues_with_identical_losses(trained, demo_latents, tmp_path):
    run_dir = tmp_path / "killed"
    command = train_command(demo_latents, run_dir, num_ranks=2)

    process = start(*command)
    first = run_dir / CHECKPOINT_DIR / "step-0000004"
    wait_for(process, lambda: first.exists() and losses(run_dir)[-1][0] >= SAVE_EVERY + 2)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    output = run(*command)

    assert re.search(r"resuming .*step-000000[48] at step [48]", output)
    assert losses(run_dir) == losses(trained[0])


# A terminal's Ctrl-C and a batch system signal every process of the job, the launcher included.
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_saves_leaves_and_continues(trained, demo_latents, tmp_path, number):
    run_dir = tmp_path / "stopped"
    command = train_command(demo_latents, run_dir, "--save-every", 1000, num_ranks=2)

    process = start("env", "--default-signal", *command)
    metrics = run_dir / "metrics.jsonl"
    wait_for(process, lambda: metrics.exists() and len(losses(run_dir)) >= 2)
    os.killpg(process.pid, number)
    output = finish(process)
    state = read_manifest(latest_checkpoint(run_dir)).state
    run(*command)

    assert "stopped by a signal after step" in output, output
    assert 2 <= state.step < STEPS
    assert state.samples_consumed == 8 * state.step
    assert losses(run_dir) == losses(trained[0])


# SIGHUP kills deepspeed's launcher at once; torchrun's passes it on, even where it was ignored.
@pytest.mark.parametrize(
    ("launcher", "disposition", "number", "code"),
    [
        ("python", "--default-signal", signal.SIGUSR1, SAVED_EXIT_CODE),
        ("deepspeed", "--default-signal", signal.SIGHUP, -signal.SIGHUP),
        ("torchrun", "--ignore-signal=HUP", signal.SIGHUP, 1),
    ],
)
def test_a_run_whose_terminal_closes_or_whose_time_is_over_saves(
    demo_latents, tmp_path, launcher, disposition, number, code
):
    run_dir, begin = tmp_path / "run", [launcher]
    command = train_command(demo_latents, run_dir, "--save-every", 1000, num_ranks=1)
    script = command.index("training/main.py")
    if launcher == "deepspeed":
        begin = command[:script]
    elif launcher == "torchrun":
        begin += ["--standalone", "--nproc-per-node", 1]

    process = start("env", disposition, *begin, *command[script:], "--max-steps", 1000)
    metrics = run_dir / "metrics.jsonl"
    wait_for(process, lambda: metrics.exists() and len(losses(run_dir)) >= 2)
    os.killpg(process.pid, number)
    output = finish(process)

    assert "stopped by a signal after step" in output, output
    assert process.returncode == code
    assert read_manifest(latest_checkpoint(run_dir)).state.step == losses(run_dir)[-1][0]


def test_running_a_finished_run_again_changes_nothing(trained, demo_latents):
    run_dir, _ = trained
    before = {path: path.stat().st_mtime_ns for path in (run_dir / CHECKPOINT_DIR).rglob("*.pt")}

    output = run(*train_command(demo_latents, run_dir, "--max-steps", 8, num_ranks=2))

    assert "resuming" in output
    assert f"done: nothing was trained, {run_dir} is already at step 12 and" in output
    after = {path: path.stat().st_mtime_ns for path in (run_dir / CHECKPOINT_DIR).rglob("*.pt")}
    assert after == before


def test_a_dry_run_describes_and_writes_nothing(demo_latents, tmp_path):
    output = run(
        "python",
        "training/main.py",
        *("--data", demo_latents, "--run-dir", tmp_path / "run", "--dry-run"),
        *("--num-classes", 12),
    )

    assert "size: demo" in output
    assert "parameters" in output
    assert "per epoch" in output
    assert f"warning: --num-classes 12 is more than the 10 of --data {demo_latents}; " in output
    assert not (tmp_path / "run").exists()


class TestSampling:
    """training/sample.py on the finished run."""

    ARGS = ("--per-class", 2, "--steps", 4, "--classes", "0,3")

    def test_makes_a_labelled_grid_and_one_png_per_image(self, trained, tmp_path):
        output = run(
            *("python", "training/sample.py", trained[0], "--output", tmp_path / "out"),
            *self.ARGS,
        )

        names = sorted(path.name for path in (tmp_path / "out").iterdir())
        assert len(names) == 6
        assert names[-2:] == ["grid.png", "settings.json"]
        assert f"grid of samples: {tmp_path / 'out' / 'grid.png'}" in output
        assert Image.open(tmp_path / "out" / names[0]).size == (64, 64)

    def test_two_processes_draw_the_images_of_one(self, trained, tmp_path):
        sample = ("training/sample.py", trained[0], *self.ARGS, "--batch-size", 1, "--output")
        run("python", *sample, tmp_path / "one")
        torchrun = ("torchrun", "--nproc-per-node", 2, "--master-port", free_port())
        run(*torchrun, *sample, tmp_path / "two")

        for path in (tmp_path / "one").iterdir():
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name

    def test_averaged_and_raw_weights_and_samplers_differ(self, trained, tmp_path):
        grids = {}
        guided_by_earlier = (
            *("--sampler", "dpmpp-2m", "--autoguidance", f"{trained[0]}:step-0000008"),
            *("--guidance-interval", 0.1, 0.9, "--cfg-channels", "three"),
        )
        flags_of = {
            "ema": (),
            "raw": ("--raw",),
            "ddpm": ("--sampler", "ddpm"),
            "guided by an earlier checkpoint": guided_by_earlier,
        }
        for name, flags in flags_of.items():
            out = tmp_path / name
            run("python", "training/sample.py", trained[0], *self.ARGS, *flags, "--output", out)
            grids[name] = (out / "grid.png").read_bytes()

        assert len(set(grids.values())) == len(flags_of)


def test_a_real_tensorboard_serves_the_run(trained):
    port = free_port()
    process = start("tensorboard", "--logdir", trained[0].parent, "--port", port)

    def get(path):
        url = f"http://127.0.0.1:{port}/data/plugin/{path}"
        try:
            with urllib.request.urlopen(url, timeout=10) as reply:
                return json.load(reply)
        except (ConnectionError, urllib.error.URLError):
            return {}

    try:
        wait_for(process, lambda: get("images/tags"))
        name = "whole/tensorboard"
        tags = get("scalars/tags")[name]
        scalars = get(f"scalars/scalars?run={name}&tag=moe_load%2Fblock_00%2Fexpert_0")
        images = get("images/tags")[name]
        layout = get("custom_scalars/layout")
    finally:
        finish_tensorboard(process)

    wanted = {"loss/total", "loss/mse", "loss/vlb", "loss/prior", "optim/lr", "optim/grad_norm"}
    wanted |= {"moe/load_entropy", "moe/load_max_over_mean", "speed/samples_per_sec"}
    wanted |= {"speed/data_wait_pct", "memory/max_rss_gib"}
    wanted |= {f"moe_load/block_{b:02d}/expert_{e}" for b in range(6) for e in range(3)}
    assert wanted <= set(tags)
    assert [step for _, step, _ in scalars] == list(range(1, STEPS + 1))
    assert {"samples/ema", "moe/timestep_to_expert", "run/history"} <= set(images)
    empty = {
        chart["title"]
        for category in layout["category"]
        for chart in category["chart"]
        if not any(re.match(p, tag) for p in chart["multiline"]["tag"] for tag in tags)
    }
    assert len(layout["category"]) == 5
    assert not empty
    patterns = [re.sub("{.*?}", "[^/]+", metric.tag) for metric in METRICS]
    undocumented = [tag for tag in tags if not any(re.fullmatch(p, tag) for p in patterns)]
    assert not undocumented and set(images) <= set(PICTURES)


def finish_tensorboard(process):
    os.killpg(process.pid, signal.SIGTERM)
    finish(process)
