"""The training template on a real Slurm: two nodes, two tasks each, and everything that ends a job.

Every node has a network of its own, so ranks of different nodes talk through a bridge.
"""

import json
import os
import re
import time
from pathlib import Path

import pytest
import torch

from tests.launch import REPOSITORY
from tests.local_slurm import LocalSlurm, wait_for
from tests.synthetic import make_dataset, random_moments
from training.checkpoint_manifest import latest_checkpoint, read_manifest

pytestmark = pytest.mark.cluster

SHAPE = (8, 8, 8)
STEPS = 120
WAIT_SEC = 900  # for whatever a loaded machine may need minutes for
VENV = Path(os.sys.prefix)


@pytest.fixture(scope="module")
def cluster():
    with LocalSlurm(2) as slurm:
        yield slurm


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents") / "set"
    make_dataset(folder, [32, 32], shape=SHAPE, moments=random_moments(SHAPE), num_classes=10)
    return folder


class Job:
    """A job that a user submitted from the repository, with small numbers after the template."""

    def __init__(self, cluster, folder, latents, *flags, check_nodes="no", **env):
        self.cluster, self.run_dir, self._output = cluster, folder / "run", folder / "output"
        sbatch = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2"]
        sbatch += ["--cpus-per-task=1", "--time=60", f"--output={self._output}"]
        train = ["slurm/train_xl.sh", "--preset", "tests/small.yaml", "--data", latents]
        train += ["--run-dir", self.run_dir, "--latent-size", SHAPE[1], "--num-experts", 4]
        train += ["--expert-parallel-size", 2, "--global-batch-size", 8, "--max-steps", STEPS]
        train += ["--log-every", 1, "--save-every", 10, "--sample-every", 0, *flags]
        env = {"DS_ACCELERATOR": "cpu", "VENV": str(VENV), "CHECK_NODES": check_nodes} | env
        self.number = cluster.run(*sbatch, *train, env=env, cwd=REPOSITORY).strip()

    def output(self):
        return self._output.read_text() if self._output.exists() else ""

    def field(self, name):
        """What Slurm says of the job now."""
        text = self.cluster.run("scontrol", "show", "job", self.number)
        return re.search(rf"\b{name}=(\S*)", text)[1]

    def step(self):
        """The newest checkpoint's step."""
        folder = latest_checkpoint(self.run_dir)
        return 0 if folder is None else read_manifest(folder).state.step

    def wait(self, condition, what):
        wait_for(condition, WAIT_SEC, lambda: f"waited for {what}\n{self.explain()}")

    def wait_for_progress(self, steps=10):
        """Wait until the job has trained on by some steps; it has not ended by then."""
        target = self.step() + steps
        self.wait(lambda: self.step() >= target, f"step {target}")
        assert self.field("JobState") == "RUNNING", self.explain()

    def restarts(self):
        return int(self.field("Restarts"))

    def wait_for_restart(self, before):
        self.wait(lambda: self.restarts() > before, f"more than {before} restarts")

    def end(self):
        """Wait until the job has ended for good; return its state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
        self.wait(lambda: self.field("JobState") in over, "the end")
        return self.field("JobState")

    def explain(self):
        show = self.cluster.run("scontrol", "show", "job", self.number, check=False)
        return f"{show}\n{self.output()[-5000:]}\n{self.cluster.logs()}"

    def losses(self):
        lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        return {line["step"]: line["loss/total"] for line in map(json.loads, lines)}


@pytest.fixture(scope="module")
def uninterrupted(cluster, latents, tmp_path_factory):
    """The template's job, as a user submits it; nothing happens to it."""
    job = Job(cluster, tmp_path_factory.mktemp("quiet"), latents, check_nodes="yes")
    assert job.end() == "COMPLETED", job.explain()
    return job


def test_sbatch_trains_on_two_nodes_after_a_look_at_them(uninterrupted):
    output = uninterrupted.output()

    assert re.search(
        r"^nodes: 4 rank\(s\) on 2 node\(s\) \(node1, node2\), CPU, commit \w+, torch \S+, "
        r"deepspeed \S+; all-reduce \d+\.\d\d GB/s, all-to-all \d+\.\d\d GB/s, slowest node node2 ",
        output,
        re.MULTILINE,
    ), output
    assert "4 rank(s), ZeRO 2" in output
    assert f"done: {STEPS} steps" in output
    assert uninterrupted.field("ExitCode") == "0:0"
    assert uninterrupted.field("Restarts") == "0"
    assert sorted(uninterrupted.losses()) == list(range(1, STEPS + 1))


def test_whatever_ends_a_job_it_comes_back_and_ends_as_if_nothing_had_happened(
    cluster, latents, uninterrupted, tmp_path
):
    job = Job(cluster, tmp_path, latents, COLLECTIVE_TIMEOUT_SEC="60")

    # Told to stop: every rank saves at the next step.
    job.wait_for_progress()
    before = job.restarts()
    cluster.run("scancel", "--signal=TERM", job.number)
    job.wait_for_restart(before)
    assert "stopped by a signal after step" in job.output()
    stopped_at = int(re.search(r"stopped by a signal after step (\d+)", job.output())[1])
    assert job.step() == stopped_at
    assert "srun: error: node2: task" in job.output() and "exit code 75" in job.output()

    # The time limit: the template asks for a signal five minutes before it. Slurm looks every half
    # minute, so a thin cable makes the steps last.
    job.wait_for_progress()
    before = job.restarts()
    cluster.slow_down("node2", "150mbit")
    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=5")
    job.wait_for_restart(before)
    cluster.slow_down("node2")
    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    assert f"job {job.number} is near its time limit" in job.output()
    assert job.output().count("stopped by a signal after step") == 2

    # An administrator, or a job of higher priority.
    job.wait_for_progress()
    before = job.restarts()
    cluster.run("scontrol", "requeue", job.number)
    job.wait_for_restart(before)
    job.wait(lambda: job.output().count("stopped by a signal after step") == 3, "the ranks to save")

    # The power of a node fails.
    job.wait_for_progress()
    before = job.restarts()
    cluster.power_off("node2")
    job.wait_for_restart(before)
    cluster.boot("node2")

    # Slurm loses the first node, whose tasks go on.
    job.wait_for_progress()
    before = job.restarts()
    cluster.kill_slurmd("node1")
    job.wait_for_restart(before)
    cluster.start_slurmd("node1")

    assert job.end() == "COMPLETED", job.explain()
    assert job.losses() == uninterrupted.losses()


def test_a_cancelled_job_saves_and_does_not_come_back(cluster, latents, tmp_path):
    job = Job(cluster, tmp_path, latents)
    job.wait_for_progress()

    cluster.run("scancel", job.number)

    assert job.end() == "CANCELLED"
    time.sleep(2)
    assert job.field("JobState") == "CANCELLED"
    saved = re.search(r"stopped by a signal after step (\d+)", job.output())
    assert saved and job.step() == int(saved[1]), job.output()


def error_lines(job):
    assert job.end() == "FAILED", job.explain()
    assert job.field("Restarts") == "0"
    assert not job.run_dir.exists()
    return [line for line in job.output().splitlines() if line.startswith("error: ")]


def test_a_mistake_of_the_users_is_one_sentence_and_not_tried_again(cluster, latents, tmp_path):
    job = Job(cluster, tmp_path, latents, "--top-k", 9, check_nodes="yes")

    lines = error_lines(job)

    assert len(lines) == 1 and "--top-k" in lines[0], job.output()
    assert job.field("ExitCode") == "2:0"


def test_a_node_without_the_data_is_named(cluster, latents, tmp_path):
    cluster.run("mount", "-t", "tmpfs", "none", latents, machine="node2")
    try:
        job = Job(cluster, tmp_path, latents, check_nodes="yes")
        lines = error_lines(job)
    finally:
        cluster.run("umount", latents, machine="node2")

    assert len(lines) == 1, job.output()
    assert lines[0].startswith(f"error: node node2: --data {latents}: no dataset.json")


def test_a_node_with_another_version_is_named(cluster, latents, tmp_path):
    metadata = next(VENV.glob("lib/python3*/site-packages/torch-*.dist-info/METADATA"))
    other = tmp_path / "METADATA"
    other.write_text(re.sub(r"(?m)^Version: .*", "Version: 1.2.3", metadata.read_text(), count=1))
    cluster.run("mount", "--bind", other, metadata, machine="node2")
    try:
        job = Job(cluster, tmp_path, latents, check_nodes="yes")
        lines = error_lines(job)
    finally:
        cluster.run("umount", metadata, machine="node2")

    assert lines == [
        "error: node node2: packages differ from the other nodes': torch 1.2.3 instead of "
        f"{torch.__version__}; make VENV the same everywhere."
    ]


def test_a_node_that_hangs_is_named_in_bounded_time(cluster, latents, tmp_path):
    env = {"COLLECTIVE_TIMEOUT_SEC": "20", "MAX_RESTARTS": "0"}
    job = Job(cluster, tmp_path, latents, check_nodes="yes", **env)
    ranks = ["-f", "python -u training/preflight.py"]

    job.wait(lambda: cluster.run("pgrep", *ranks, machine="node2", check=False), "its start")
    cluster.run("pkill", "-STOP", *ranks, machine="node2")
    lines = error_lines(job)

    assert lines == [
        "error: node node2 (rank 2, 3) did not report within 20 s: it cannot reach node1, or "
        "hangs, for example in its storage; look at it, or leave it out with sbatch --exclude."
    ]
    # A stopped process dies of a signal, so this is no mistake of the user's: within the bound, the
    # job would be tried again.
    assert "no progress since the beginning in 0 restart(s)" in job.output()


def test_a_slow_node_is_named(cluster, latents, tmp_path):
    cluster.slow_down("node2", "80mbit")
    try:
        job = Job(cluster, tmp_path, latents, check_nodes="yes", MIN_NODE_GBPS="0.02")
        lines = error_lines(job)
    finally:
        cluster.slow_down("node2")

    assert len(lines) == 1, job.output()
    assert re.match(
        r"error: node node2 exchanges 0\.0[01]\d GB/s with the first node, MIN_NODE_GBPS is 0\.02;",
        lines[0],
    ), lines


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine's GPUs are real")
def test_gpus_that_slurm_gave_and_torch_does_not_see_are_reported(cluster, latents, tmp_path):
    job = Job(cluster, tmp_path, latents, check_nodes="yes", DS_ACCELERATOR="")

    lines = error_lines(job)

    assert len(lines) == 1, job.output()
    assert lines[0].startswith("error: torch sees 0 GPU(s) and Slurm gave 2; ")
