"""Every launcher's variables lead to the same five that DeepSpeed reads."""

import os
import signal

import pytest
import torch

from data_tools.entry_point import STOP_SIGNALS
from training.processes import Ranks, StopSignal, discover_ranks, share_cores

LAUNCHERS = {
    "deepspeed": {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a"},
    "torchrun": {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a"},
    "mpirun": {
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "MASTER_ADDR": "a",
    },
    "srun": {
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "4",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_NODELIST": "a,b",
        "MASTER_ADDR": "a",
    },
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_is_mapped_to_the_same_variables(launcher):
    env = dict(LAUNCHERS[launcher])

    assert discover_ranks(env) == Ranks(3, 4, 1)
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"]) == ("3", "4", "1")
    assert env["MASTER_ADDR"] == "a"
    assert env["MASTER_PORT"]


def test_mpirun_without_an_address_leaves_discovery_to_mpi4py():
    env = dict(LAUNCHERS["mpirun"])
    del env["MASTER_ADDR"]

    assert discover_ranks(env) == Ranks(3, 4, 1)
    assert "RANK" not in env
    assert (env["LOCAL_RANK"], env["LOCAL_SIZE"]) == ("1", "2")


def test_without_a_launcher_there_is_one_process():
    env = {}

    assert discover_ranks(env) == Ranks(0, 1, 0)
    assert env["MASTER_ADDR"] == "127.0.0.1"


def test_a_batch_script_outside_srun_is_one_process():
    # sbatch sets SLURM_PROCID and SLURM_NTASKS for the script itself, which is no job step.
    env = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}

    assert discover_ranks(env) == Ranks(0, 1, 0)


def test_cores_are_shared_unless_the_user_said():
    before = torch.get_num_threads()
    try:
        share_cores({"WORLD_SIZE": "1000000"})
        assert torch.get_num_threads() == 1
        torch.set_num_threads(2)
        share_cores({"WORLD_SIZE": "1000000", "OMP_NUM_THREADS": "2"})
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def no_signal_is_ignored():
    """Whatever the tests were started by."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("no_signal_is_ignored")
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_kept_until_a_step_boundary_asks(single_process_group, number):
    handler = signal.getsignal(number)
    stop = StopSignal(torch.device("cpu"))
    try:
        stop.post()
        os.kill(os.getpid(), number)
        assert stop.read() == 0, "what was posted before the signal"
        stop.post()
        assert stop.read() == number
    finally:
        stop.restore()
    assert signal.getsignal(number) is handler


@pytest.mark.usefixtures("no_signal_is_ignored")
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_that_was_ignored_from_the_start_stays_ignored(single_process_group, number):
    signal.signal(number, signal.SIG_IGN)  # as nohup does with SIGHUP
    stop = StopSignal(torch.device("cpu"))
    try:
        os.kill(os.getpid(), number)
        stop.post()
        assert stop.read() == 0
    finally:
        stop.restore()
