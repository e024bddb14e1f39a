"""Every other way to start training, for real: OpenMPI, MPICH, torchrun, a hostfile over ssh.

Two ranks each, on one machine or on two nodes with networks of their own; the same losses.
"""

import json
import sys

import pytest

from tests.support.configs import FP32
from tests.support.launch import REPOSITORY, deepspeed, environment, finish, free_port, run, start
from tests.support.local_slurm import LocalSlurm
from tests.support.synthetic import make_dataset, random_moments

pytestmark = pytest.mark.cluster

SHAPE = (8, 8, 8)
STEPS = 6
# As root, which a user is not, mpirun wants to be told so. By default it gives each rank one core.
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents") / "set"
    make_dataset(folder, [32], shape=SHAPE, moments=random_moments(SHAPE), num_classes=10)
    return folder


@pytest.fixture(scope="module")
def cluster():
    with LocalSlurm(2) as slurm:
        yield slurm


def program(latents, run_dir):
    flags = ["--preset", "tests/small.yaml", "--data", latents, "--run-dir", run_dir]
    flags += ["--latent-size", SHAPE[1], "--num-experts", 4, "--expert-parallel-size", 2]
    flags += ["--global-batch-size", 8, "--max-steps", STEPS, "--log-every", 1]
    # Not by the environment, which ssh leaves behind.
    return ["training/main.py", *flags, "--sample-every", 0, "--deepspeed", FP32]


def losses(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss/total"] for line in lines]


@pytest.fixture(scope="module")
def expected(latents, tmp_path_factory):
    """The losses under DeepSpeed's own launcher on one machine."""
    run_dir = tmp_path_factory.mktemp("deepspeed") / "run"
    run(*deepspeed(2, *program(latents, run_dir)))
    assert len(losses(run_dir)) == STEPS
    return losses(run_dir)


def test_mpirun_of_openmpi(latents, expected, tmp_path):
    command = ["mpirun", "-np", 2, "python", *program(latents, tmp_path / "run")]

    output = run(*command, MASTER_PORT=str(free_port()), **AS_ROOT)

    assert "2 rank(s), ZeRO 2" in output
    assert losses(tmp_path / "run") == expected


def test_mpirun_of_mpich(latents, expected, tmp_path):
    command = ["mpirun.mpich", "-n", 2, "python", *program(latents, tmp_path / "run")]

    output = run(*command, MASTER_PORT=str(free_port()))

    assert "2 rank(s), ZeRO 2" in output
    assert losses(tmp_path / "run") == expected


def test_torch_distributed_launch_of_older_guides(latents, expected, tmp_path):
    command = ["python", "-m", "torch.distributed.launch", "--nproc-per-node=2"]

    run(*command, f"--master-port={free_port()}", *program(latents, tmp_path / "run"))

    assert losses(tmp_path / "run") == expected


def test_torchrun(latents, expected, tmp_path):
    port = f"--master-port={free_port()}"

    run("torchrun", "--nproc-per-node=2", port, *program(latents, tmp_path / "run"))

    assert losses(tmp_path / "run") == expected


def on_node(cluster, *command, **env):
    """Run a command on the first node to its end; return its output."""
    process = start(*cluster.inside("node1", *command), cwd=REPOSITORY, **env)
    output = finish(process)
    assert process.returncode == 0, output
    return output


def test_mpirun_of_openmpi_on_two_nodes_asks_mpi4py_for_the_address(
    cluster, latents, expected, tmp_path
):
    interface = ["--mca", "btl_tcp_if_include", "eth0", "--mca", "oob_tcp_if_include", "eth0"]
    command = ["mpirun", "-np", 2, "--host", "node1,node2", *interface, "-x", "PATH"]
    command += ["-x", "OMP_NUM_THREADS", "python", *program(latents, tmp_path / "run")]

    on_node(cluster, *command, **AS_ROOT)

    assert losses(tmp_path / "run") == expected


def test_deepspeed_with_a_hostfile_reaches_both_nodes_over_ssh(
    cluster, latents, expected, tmp_path
):
    hostfile, variables = tmp_path / "hostfile", tmp_path / "variables"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    variables.write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    command = ["deepspeed", "--hostfile", hostfile, *program(latents, tmp_path / "run")]

    output = on_node(cluster, *command, DS_ENV_FILE=str(variables))

    assert "node2: " in output
    assert losses(tmp_path / "run") == expected


def test_deepspeed_without_ssh_is_started_on_every_node(cluster, latents, expected, tmp_path):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    starter = ["deepspeed", "--hostfile", hostfile, "--no_ssh", "--master_addr", "node1"]
    processes = [
        start(
            *cluster.inside(node, *starter, "--node_rank", rank),
            *program(latents, tmp_path / "run"),
        )
        for rank, node in enumerate(cluster.nodes)
    ]

    outputs = [finish(process) for process in processes]

    assert [process.returncode for process in processes] == [0, 0], outputs
    assert losses(tmp_path / "run") == expected


def test_mpirun_of_mpich_on_two_nodes_wants_an_address(cluster, latents, expected, tmp_path):
    command = ["mpirun.mpich", "-n", 2, "-hosts", "node1,node2"]
    arguments = ["python", *program(latents, tmp_path / "run")]

    refused = start(*cluster.inside("node1", *command, *arguments), cwd=REPOSITORY)
    said = finish(refused)
    on_node(cluster, *command, "-genv", "MASTER_ADDR", "node1", *arguments)

    assert refused.returncode != 0
    assert (
        said.count("error: MASTER_ADDR is not set, and mpirun (PMI) has started processes on") == 1
    )
    assert losses(tmp_path / "run") == expected


@pytest.mark.parametrize("wanted", ["-n 4", "--gpus=4"])
def test_a_command_typed_into_the_shell_of_salloc_is_a_single_process(
    cluster, latents, tmp_path, wanted
):
    flags = [*program(latents, tmp_path / "run"), "--expert-parallel-size", 1, "--max-steps", 1]
    script, typed = tmp_path / "script", tmp_path / "typed"
    command = " ".join(str(part) for part in [sys.executable, *flags])
    script.write_text(f"cd {REPOSITORY}\necho it is step $SLURM_STEP_ID\n{command}\n")
    typed.write_text(f"bash {script}\nexit\n")

    with typed.open() as keyboard:
        shell = ["script", "-qec", f"salloc {wanted}", "/dev/null"]
        said = cluster.run(
            *shell, check=False, stdin=keyboard, env=environment(DS_ACCELERATOR="cpu")
        )

    assert "it is step 4294967290" in said, said
    assert "1 rank(s), ZeRO 2" in said, said
    assert "done: 1 step," in said
