"""The job scripts on a real Slurm: encode, train, sample and evaluate, and all that ends a job.

Every node has a network of its own, so ranks of different nodes talk through a bridge. Two of the
three nodes train; the third stands in for one that is lost.
"""

import re
import time

import numpy as np
import pytest

from tests.support.launch import run
from tests.support.local_slurm import LocalSlurm
from tests.support.slurm_jobs import SAVE_EVERY, STEPS, STOPPED, Job, TrainingJob

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def cluster():
    with LocalSlurm(3) as slurm:
        yield slurm


def encoding_flags(images, folder):
    flags = ["--input", images, "--output", folder, "--vae", "data_tools/demo_vae"]
    return [*flags, "--size", 32, "--shard-size", 16]  # latents of 8x8


@pytest.fixture(scope="module")
def encoding(cluster, demo_images, tmp_path_factory):
    """An array of two jobs that encode together, each with a task on two nodes."""
    folder = tmp_path_factory.mktemp("encoding")
    sbatch = ["--array=0-1", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"]
    flags = encoding_flags(demo_images, folder / "set")
    job = Job(cluster, folder, sbatch, "encode_latents.sh", *flags)
    job.wait(lambda: not cluster.run("squeue", "-h", "-j", job.number), "the array's end")
    return job


@pytest.fixture(scope="module")
def latents(encoding, tmp_path_factory):
    folder = encoding.folder / "set"
    assert (folder / "dataset.json").exists(), encoding.explain()
    return folder


@pytest.fixture(scope="module")
def uninterrupted(cluster, latents, tmp_path_factory):
    """The template's job, as a user submits it; nothing happens to it."""
    job = TrainingJob(cluster, tmp_path_factory.mktemp("quiet"), latents, check_nodes="yes")
    assert job.end() == "COMPLETED", job.explain()
    return job


def test_an_array_of_jobs_writes_the_data_set_of_one_process(latents, demo_images, tmp_path):
    flags = encoding_flags(demo_images, tmp_path / "set")
    run("python", "data_tools/encode_latents.py", *flags)

    def content(folder):
        return {path.name: path.read_bytes() for path in folder.glob("*.tar")}

    assert content(latents) == content(tmp_path / "set")
    assert len(content(latents)) == 5


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
    assert uninterrupted.restarts() == 0
    assert sorted(uninterrupted.losses()) == list(range(1, STEPS + 1))


def test_a_trained_run_is_sampled_by_a_job(cluster, uninterrupted, tmp_path):
    run_dir = uninterrupted.run_dir
    sbatch = ["--gpus-per-node=1", "--cpus-per-task=1"]

    job = Job(cluster, tmp_path, sbatch, "sample.sh", run_dir, "--per-class", 1, "--steps", 2)

    assert job.end() == "COMPLETED", job.explain()
    assert len(list(run_dir.glob("samples/*/grid.png"))) == 1


def test_an_evaluation_near_its_time_limit_comes_back_and_ends(cluster, uninterrupted, tmp_path):
    run_dir = uninterrupted.run_dir
    sbatch = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]
    flags = ["--num-images", 6, "--batch-size", 2, "--steps", 2]

    job = Job(cluster, tmp_path, sbatch, "evaluate.sh", run_dir, *flags)
    rank = ["pgrep", "-f", "python -u training/evaluate.py"]
    job.wait(lambda: "node2" in job.nodes(), "its nodes")
    job.wait(lambda: cluster.run(*rank, machine="node2", check=False), "a rank")
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)  # what --signal=B:USR1 sends

    assert job.end() == "COMPLETED", job.explain()
    assert job.restarts() == 1
    assert f"job {job.number} is near its time limit" in job.output()
    (samples,) = run_dir.glob("evaluation/*/samples.npz")
    with np.load(samples) as content:
        assert content["arr_0"].shape == (6, 32, 32, 3)


def test_a_job_that_is_told_to_end_saves_and_comes_back_as_if_nothing_had_happened(
    cluster, latents, uninterrupted, tmp_path
):
    job = TrainingJob(cluster, tmp_path, latents)
    job.wait_for_first_step()

    def scontrol_update(limit):
        cluster.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={limit}")

    def near_the_limit():
        # The template asks for a signal five minutes before the limit. Slurm looks every half
        # minute, so a thin cable makes the steps last.
        cluster.slow_down("node2", "75mbit")
        scontrol_update(5)
        said = f"job {job.number} is near its time limit"
        job.wait(lambda: said in job.output(), "the time limit")
        cluster.slow_down("node2")
        scontrol_update(60)

    def preempt():
        urgent = ["--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null"]
        cluster.run("sbatch", *urgent, "--wrap=sleep 1")

    for number, (what, action) in enumerate(
        {
            "scancel --signal=TERM": lambda: cluster.run("scancel", "--signal=TERM", job.number),
            "the time limit": near_the_limit,
            "scontrol requeue": lambda: cluster.run("scontrol", "requeue", job.number),
            "preemption": preempt,
        }.items()
    ):
        reached, resumed_at = job.strike(what, action)
        stops = STOPPED.findall(job.output())
        assert len(stops) == number + 1, job.explain()
        assert resumed_at == int(stops[-1]) >= reached

    assert job.end() == "COMPLETED", job.explain()
    assert job.losses() == uninterrupted.losses()


def test_a_job_that_loses_a_node_or_a_rank_goes_on_elsewhere_as_if_nothing_had_happened(
    cluster, latents, uninterrupted, tmp_path
):
    job = TrainingJob(cluster, tmp_path, latents, COLLECTIVE_TIMEOUT_SEC="60")
    struck = []
    for node in cluster.nodes[1:]:
        cluster.slow_down(node, "150mbit")  # so that the steps last while nodes come back

    def strike(what, action, undo):
        """Hit the first node of the job: it has the job's script, rank 0 and the ranks' meeting."""

        def hit():
            struck[:] = job.nodes()
            action(struck[0])

        reached, resumed_at = job.strike(what, hit)
        assert reached - 2 * SAVE_EVERY < resumed_at  # the last one may not have been on the disk
        undo(struck[0])
        cluster.wait_until_up()

    def signal_a_rank(name):
        rank = ["pkill", name, "--newest", "-f", "python -u training/main.py"]
        cluster.run(*rank, machine=struck[1])

    strike("kill -9 of a rank", lambda _node: signal_a_rank("-KILL"), lambda _node: None)
    strike("a rank is stopped", lambda _node: signal_a_rank("-STOP"), lambda _node: None)
    assert re.search(
        r"error: \[rank 0\] training has not moved for \d+ s: rank [23]: last heard of \d+ s ago, "
        r".* COLLECTIVE_TIMEOUT_SEC = 60 s; look at its node, ",
        job.output(),
    ), job.explain()
    strike("a node's power fails", cluster.power_off, cluster.boot)
    strike("a node's slurmd dies", cluster.kill_slurmd, cluster.start_slurmd)
    strike("a cable is cut", cluster.cut_cable, lambda node: cluster.cut_cable(node, False))
    for node in cluster.nodes[1:]:
        cluster.slow_down(node)

    assert job.end() == "COMPLETED", job.explain()
    assert job.losses() == uninterrupted.losses()


def test_a_job_that_crashes_without_getting_on_is_given_up(cluster, latents, tmp_path):
    job = TrainingJob(cluster, tmp_path, latents, MAX_RESTARTS="1")
    rank = ["-f", "python -u training/main.py"]

    for restart in range(2):
        job.wait(lambda: job.restarts() == restart, "its start")  # noqa: B023
        job.wait(lambda: "node2" in job.nodes(), "its nodes")
        job.wait(lambda: cluster.run("pgrep", *rank, machine="node2", check=False), "a rank")
        cluster.run("pkill", "-KILL", "--newest", *rank, machine="node2")

    assert job.end() == "FAILED", job.explain()
    assert job.restarts() == 1
    assert "starting again from the beginning (restart 1 of 1 from there)" in job.output()
    assert "no progress since the beginning in 1 restart(s), so the job is not" in job.output()


def test_a_cancelled_job_saves_and_does_not_come_back(cluster, latents, tmp_path):
    job = TrainingJob(cluster, tmp_path, latents)
    job.wait_for_progress()

    cluster.run("scancel", job.number)

    assert job.end() == "CANCELLED"
    time.sleep(2)
    assert job.field("JobState") == "CANCELLED"
    (saved,) = STOPPED.findall(job.output())
    assert job.step() == int(saved), job.output()
