"""Nodes that cannot train, on a real Slurm: the look at them names them, in one sentence each."""

import re

import pytest
import torch

from tests.support.local_slurm import LocalSlurm
from tests.support.slurm_jobs import LATENT_SIZE, VENV, TrainingJob
from tests.support.synthetic import make_dataset, random_moments

pytestmark = pytest.mark.cluster

SHAPE = (8, LATENT_SIZE, LATENT_SIZE)


@pytest.fixture(scope="module")
def cluster():
    with LocalSlurm(2) as slurm:
        yield slurm


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents") / "set"
    make_dataset(folder, [32, 32], shape=SHAPE, moments=random_moments(SHAPE), num_classes=10)
    return folder


def error_lines(job):
    assert job.end() == "FAILED", job.explain()
    assert job.field("Restarts") == "0"
    assert not job.run_dir.exists()
    return [line for line in job.output().splitlines() if line.startswith("error: ")]


def test_a_mistake_of_the_users_is_one_sentence_and_not_tried_again(cluster, latents, tmp_path):
    job = TrainingJob(cluster, tmp_path, latents, "--top-k", 9, check_nodes="yes")

    lines = error_lines(job)

    assert len(lines) == 1 and "--top-k" in lines[0], job.output()
    assert job.field("ExitCode") == "2:0"


def test_nodes_without_space_or_data_are_named(cluster, latents, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    cluster.run("mount", "-t", "tmpfs", "-o", "size=1m", "none", scratch, machine="node1")
    cluster.run("mount", "-t", "tmpfs", "none", latents, machine="node2")
    try:
        job = TrainingJob(cluster, tmp_path, latents, check_nodes="yes", TMPDIR=str(scratch))
        lines = error_lines(job)
    finally:
        cluster.run("umount", scratch, machine="node1")
        cluster.run("umount", latents, machine="node2")

    assert len(lines) == 2, job.output()
    assert re.match(rf"error: node node1: {scratch}: [01] MiB are free, 256 are needed;", lines[0])
    assert lines[1].startswith(f"error: node node2: --data {latents}: is empty; encode")


def test_a_node_with_another_version_is_named(cluster, latents, tmp_path):
    metadata = next(VENV.glob("lib/python3*/site-packages/torch-*.dist-info/METADATA"))
    other = tmp_path / "METADATA"
    other.write_text(re.sub(r"(?m)^Version: .*", "Version: 1.2.3", metadata.read_text(), count=1))
    cluster.run("mount", "--bind", other, metadata, machine="node2")
    try:
        job = TrainingJob(cluster, tmp_path, latents, check_nodes="yes")
        lines = error_lines(job)
    finally:
        cluster.run("umount", metadata, machine="node2")

    assert lines == [
        "error: node node2: packages differ from the other nodes': torch 1.2.3 instead of "
        f"{torch.__version__}; make VENV the same everywhere."
    ]


def test_a_node_that_hangs_is_named_in_bounded_time(cluster, latents, tmp_path):
    env = {"COLLECTIVE_TIMEOUT_SEC": "20", "MAX_RESTARTS": "0"}
    job = TrainingJob(cluster, tmp_path, latents, check_nodes="yes", **env)
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


def test_a_first_node_that_hangs_is_named_by_the_others(cluster, latents, tmp_path):
    env = {"COLLECTIVE_TIMEOUT_SEC": "20", "MAX_RESTARTS": "0"}
    job = TrainingJob(cluster, tmp_path, latents, check_nodes="yes", **env)
    port = 10000 + int(job.number) % 20000
    knock = ["bash", "-c", f"exec 3<>/dev/tcp/node1/{port} && echo open"]

    job.wait(lambda: cluster.run(*knock, machine="node1", check=False), "rank 0's store")
    # Not srun, which runs on the first node and has the same words among its arguments.
    cluster.run("pkill", "-STOP", "-f", r"^\S*python -u training/preflight.py", machine="node1")
    lines = error_lines(job)

    sentence = (
        "error: node node1 (rank 0) gave node2 no answer: it hangs, for example in its "
        "storage, or the network to it broke; look at it, or leave it out with sbatch --exclude."
    )
    assert sentence in lines
    # Slurm lets stopped processes go on before it ends them: they may then say that they are late.
    late = ("node node1 (rank 0) gave node1 no answer", "node node1 does not get on with: ")
    assert all(line == sentence or any(text in line for text in late) for line in lines), lines


def test_a_slow_node_is_named(cluster, latents, tmp_path):
    cluster.slow_down("node2", "80mbit")
    try:
        job = TrainingJob(cluster, tmp_path, latents, check_nodes="yes", MIN_NODE_GBPS="0.02")
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
    job = TrainingJob(cluster, tmp_path, latents, check_nodes="yes", DS_ACCELERATOR="")

    lines = error_lines(job)

    assert len(lines) == 1, job.output()
    assert lines[0].startswith("error: torch sees 0 GPU(s) and Slurm gave 2; ")
