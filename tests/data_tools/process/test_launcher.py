"""Every launcher's variables lead to the same five that DeepSpeed reads, or to one sentence."""

import os
import re
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch

from data_tools.errors import ConfigError, OutageError
from data_tools.process.launcher import (
    ALONE,
    BY_TORCH,
    Place,
    first_of_node_list,
    is_started_again,
    read_place,
    read_place_on_node,
    said_port,
)
from tests.support.launch import REPOSITORY, environment, free_port
from training.ranks.process_group import Ranks, device_index, discover_ranks, start_drawing_group
from training.ranks.rendezvous import explained, meeting_point

# Those of torchrun, MPICH and OpenMPI are recorded, the others are as their documents say; 3 is on
# the second of two nodes.
LAUNCHERS = {
    "torchrun": {
        **{"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
        **{"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"},
        **{"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "GROUP_RANK": "1"},
    },
    "deepspeed": {
        **{"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"},
        **{"CROSS_RANK": "1", "CROSS_SIZE": "2", "MASTER_ADDR": "localhost"},
    },
    "mpirun of OpenMPI": {
        **{"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "PMIX_RANK": "3"},
        **{"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
    },
    "mpirun of MPICH and Intel MPI": {
        **{"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_FD": "11"},
        **{"MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
    },
    "mpirun of MVAPICH": {
        **{"MV2_COMM_WORLD_RANK": "3", "MV2_COMM_WORLD_SIZE": "4"},
        **{"MV2_COMM_WORLD_LOCAL_RANK": "1", "MV2_COMM_WORLD_LOCAL_SIZE": "2"},
    },
    "mpiexec of Cray PALS": {
        **{"PMI_RANK": "3", "PMI_SIZE": "4", "PALS_RANKID": "3"},
        **{"PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "2", "PALS_LOCAL_RANKID": "1"},
    },
    "jsrun": {
        **{"JSM_NAMESPACE_RANK": "3", "JSM_NAMESPACE_SIZE": "4", "PMIX_RANK": "3"},
        **{"JSM_NAMESPACE_LOCAL_RANK": "1", "JSM_NAMESPACE_LOCAL_SIZE": "2"},
    },
    "flux run": {
        **{"FLUX_TASK_RANK": "3", "FLUX_JOB_SIZE": "4", "FLUX_TASK_LOCAL_ID": "1"},
        **{"PMI_RANK": "3", "PMI_SIZE": "4"},
    },
    "srun": {
        **{"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"},
        **{"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NODEID": "1"},
        **{"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "localhost,node2"},
    },
    "srun --mpi=pmi2": {
        **{"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"},
        **{"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "PMI_RANK": "3", "PMI_SIZE": "4"},
        **{"SLURM_STEP_NODELIST": "localhost"},
    },
    "mpirun of MPICH, whose helpers srun has started": {
        **{"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"},
        **{"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
    },
    "torchrun as the only task of srun on each node": {
        **{"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"},
        **{"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"},
    },
    "RANK and others, exported by hand from srun's": {
        **{"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"},
        **{"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"},
    },
}
IN_SRUN = LAUNCHERS["srun"]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_is_mapped_to_the_same_variables(launcher):
    env = {"MASTER_ADDR": "localhost"} | LAUNCHERS[launcher]

    ranks = discover_ranks(env)

    assert ranks == Ranks(3, 4, 1)
    assert ranks.local_size in (2, None)
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"]) == ("3", "4", "1")
    assert env["MASTER_ADDR"] == "localhost"
    assert env["MASTER_PORT"]


def test_a_shell_of_salloc_and_a_batch_script_are_single_processes():
    interactive = {
        **{"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        **{"SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "node[1-2]"},
    }
    with_pmix = interactive | {"PMIX_RANK": "0"}
    without_tasks = {k: v for k, v in interactive.items() if k != "SLURM_NTASKS"}
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}

    for env in ({}, interactive, with_pmix, without_tasks, batch):
        assert read_place(env) == ALONE


def test_a_single_process_minds_no_address_that_an_older_job_has_left():
    stale = {"MASTER_ADDR": "node17", "MASTER_PORT": "a port"}
    started = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}
    by_hand = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}

    for env in (stale, stale | started, stale | by_hand):
        with socket.socket() as usual:
            usual.bind(("127.0.0.1", 0))
            assert discover_ranks(env) == Ranks(0, 1, 0)
            assert env["MASTER_ADDR"] == "127.0.0.1"
            assert int(env["MASTER_PORT"]) != usual.getsockname()[1]


WRONG = {
    "RANK without WORLD_SIZE": ({"RANK": "0"}, "RANK=0 is set and WORLD_SIZE is not, so"),
    "WORLD_SIZE without RANK": ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set and RANK is not, so"),
    "no number": (
        {"RANK": "zero", "WORLD_SIZE": "4"},
        "RANK=zero is no number from 0 on; unset it, or start with torchrun",
    ),
    "rank beyond the end": (
        {"RANK": "4", "WORLD_SIZE": "4", "LOCAL_RANK": "0"},
        "RANK=4 is not below WORLD_SIZE=4, and ranks count from 0; unset both",
    ),
    "no ranks at all": ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 is not below WORLD_SIZE=0"),
    "no number on the node": (
        {"RANK": "9", "WORLD_SIZE": "16"},
        "LOCAL_RANK is not set beside RANK=9 and WORLD_SIZE=16, so this process does not know",
    ),
    "number beyond the node": (
        {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "9", "LOCAL_WORLD_SIZE": "8"},
        "LOCAL_RANK=9 is not below the 8 process(es) of this node",
    ),
    "stale in a step of srun": (
        IN_SRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        "RANK=0 and WORLD_SIZE=1 are set, and srun has started this process as number 3 of 4",
    ),
    "stale under mpirun": (
        LAUNCHERS["mpirun of OpenMPI"] | {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"},
        "RANK=0 and WORLD_SIZE=4 are set, and OpenMPI's mpirun has started this process as number",
    ),
    "PMIx alone": (
        {"PMIX_RANK": "1"},
        "PMIX_RANK=1 is set, so a launcher has started this process",
    ),
    "Cray's aprun": ({"ALPS_APP_PE": "1"}, "ALPS_APP_PE=1 is set, so a launcher has started"),
    "horovodrun": ({"HOROVOD_RANK": "1"}, "HOROVOD_RANK=1 is set, so a launcher has started"),
    "PALS without PMI": ({"PALS_RANKID": "1"}, "PALS_RANKID=1 is set, so a launcher"),
    "MPI of another kind": ({"PMI_RANK": "1"}, "PMI_RANK=1 is set and PMI_SIZE is not, so"),
    "PMI without a number on the node": (
        {"PMI_RANK": "1", "PMI_SIZE": "2"},
        "MPI_LOCALRANKID is not set beside PMI_RANK=1 and PMI_SIZE=2, so this process",
    ),
    "srun without the number of tasks": (
        {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        "SLURM_PROCID=0 is set and SLURM_NTASKS is not, so the number of processes is unknown",
    ),
    "no port": (
        IN_SRUN | {"MASTER_PORT": "abc"},
        "MASTER_PORT=abc is no port; set the same number from 1 to 65535 in every process",
    ),
    "port 0": (IN_SRUN | {"MASTER_PORT": "0"}, "MASTER_PORT=0 is no port"),
    "port too high": (IN_SRUN | {"MASTER_PORT": "65536"}, "MASTER_PORT=65536 is no port"),
    "no such host": (
        IN_SRUN | {"MASTER_ADDR": "no such host"},
        "MASTER_ADDR=no such host: ",
    ),
    "a name that no host can have": (
        IN_SRUN | {"MASTER_ADDR": "node1..local"},
        "cannot find such a host (no host's name); set it to the name or address of rank 0's node",
    ),
    "second node, nobody says which is the first": (
        {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"},
        "MASTER_ADDR is not set, and this is rank 9 of 16 on several nodes; set it to",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_variables_are_one_sentence(case):
    env, sentence = WRONG[case]

    with pytest.raises(ConfigError, match=re.escape(sentence)) as error:
        discover_ranks(dict(env))

    assert error.value.exit_code == 2
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def test_srun_needs_no_scontrol_to_find_the_first_node():
    lists = {
        "node1": "node1",
        "node[1-2]": "node1",
        "node[001-128,200],gpu7": "node001",
        "gpu7,node[1-2]": "gpu7",
        "rack[2-3]-n[05-06].example": "rack2-n05.example",
    }

    assert {text: first_of_node_list(text) for text in lists} == lists


def test_two_jobs_of_slurm_on_one_node_have_ports_of_their_own():
    first, second = (Place("srun", 0, 2, 0, 2) for _ in range(2))

    assert said_port(first, {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}) != said_port(
        second, {"SLURM_JOB_ID": "8", "SLURM_STEP_ID": "0"}
    )
    assert said_port(first, {"SLURM_JOB_ID": "7", "MASTER_PORT": "5"}) == 5


def test_processes_of_one_node_need_no_address():
    mpich = LAUNCHERS["mpirun of MPICH and Intel MPI"]
    env = mpich | {"PMI_RANK": "1", "PMI_SIZE": "2"}

    assert meeting_point(read_place(env), env) == ("127.0.0.1", 29500)
    by_hand = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    assert meeting_point(read_place(by_hand), by_hand) == ("127.0.0.1", 29500)


def test_rank_0_is_the_first_of_its_node_too():
    assert read_place({"RANK": "0", "WORLD_SIZE": "16"}) == Place(BY_TORCH, 0, 16, 0, None)


def test_the_tasks_of_this_node_are_counted_where_nodes_differ():
    env = IN_SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3,1(x2)", "SLURM_NODEID": "2"}

    assert read_place(env | {"SLURM_LOCALID": "0"}).local_size == 1


def test_a_program_whose_processes_need_not_meet_takes_a_lone_local_rank():
    assert read_place_on_node({"LOCAL_RANK": "3"}).local_rank == 3
    with pytest.raises(ConfigError, match=r"^LOCAL_RANK=3 is set, so .* unset LOCAL_RANK"):
        read_place({"LOCAL_RANK": "3"})


def test_a_job_that_slurm_starts_again_knows_it():
    assert is_started_again({"SLURM_RESTART_COUNT": "1"})
    assert not is_started_again({"SLURM_RESTART_COUNT": "0"})
    assert not is_started_again({})


def test_a_process_that_is_shown_one_gpu_uses_it_whatever_its_number():
    assert device_index(3, 8, {}) == 3
    for shown in ("SLURM_GPUS_PER_TASK", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        assert device_index(3, 1, {shown: "1"}) == 0
    assert device_index(3, 1, {"CUDA_VISIBLE_DEVICES": "GPU-8932f937-d72c"}) == 0

    for env, num_gpus in (({}, 1), ({"CUDA_VISIBLE_DEVICES": "0,1"}, 2), ({}, 2)):
        sentence = rf"^local rank 3 finds {num_gpus} GPU\(s\) on node .*; start at most one process"
        with pytest.raises(ConfigError, match=sentence):
            device_index(3, num_gpus, env)


def test_a_port_that_another_program_has_is_named_before_the_ranks_meet():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": str(port)}

        with pytest.raises(ConfigError, match=rf"^MASTER_PORT={port}: this port of .* is taken by"):
            discover_ranks(dict(env))
        # torchrun itself listens there.
        agents = env | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        assert discover_ranks(agents) == Ranks(0, 2, 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_never_come_are_one_sentence(rank, monkeypatch):
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    store = {"host_name": "127.0.0.1", "port": port, "world_size": 3, "is_master": rank == 0}

    with pytest.raises(OutageError) as error, explained(rank, 3, 1):
        torch.distributed.TCPStore(**store, timeout=timedelta(seconds=1))

    sentence = str(error.value)
    said = {
        0: f"1 of 3 ranks came to 127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT) within 1 s (COLL",
        1: f"rank 1 of 3 on {socket.gethostname()} found nobody at 127.0.0.1:{port} (MASTER_ADDR",
    }
    assert sentence.startswith(said[rank])
    assert "\n" not in sentence
    assert error.value.exit_code == 1


def test_sampling_and_evaluation_say_how_many_ranks_came(monkeypatch):
    port = free_port()
    values = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "COLLECTIVE_TIMEOUT_SEC": 1}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))

    with pytest.raises(OutageError, match=rf"^1 of 3 ranks came to 127.0.0.1:{port} .* within 1 s"):
        start_drawing_group(Ranks(0, 3, 0), timedelta(days=1))


@pytest.mark.processes
def test_training_says_how_many_ranks_came(demo_latents, tmp_path):
    waits = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "COLLECTIVE_TIMEOUT_SEC": "1"}
    port = free_port()

    process = subprocess.run(
        [
            *(sys.executable, "training/main.py", "--preset", "tests/small.yaml"),
            *("--data", demo_latents, "--run-dir", tmp_path / "run", "--max-steps", "1"),
        ],
        cwd=REPOSITORY,
        env=environment(DS_ACCELERATOR="cpu", MASTER_PORT=str(port), **waits),
        capture_output=True,
        text=True,
        check=False,
    )

    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, process.stderr
    assert (
        f"1 of 4 ranks came to 127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT) within 1 s" in lines[0]
    )
    assert "Traceback" not in process.stderr
    assert process.returncode == 1
    assert not os.path.exists(tmp_path / "run")
