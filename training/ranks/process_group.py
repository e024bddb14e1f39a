"""Enter a job and leave it: a rank's place, its device, the process group.

data_tools/process/launcher.py reads the place from the launcher's variables,
training/ranks/rendezvous.py knows where the ranks meet.
"""

import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch

from data_tools.errors import ConfigError
from data_tools.process import launcher
from data_tools.process.accelerator import ACCELERATOR_VARIABLE, CPU, has_gpu
from data_tools.process.leaving import skip_teardown
from data_tools.process.signals import end_on_signals_with, ignore_signals
from training.ranks import rendezvous

TIMEOUT_VARIABLE = "COLLECTIVE_TIMEOUT_SEC"
DEFAULT_TIMEOUT_SEC = 300  # longer than rank 0 alone writes files while the others wait
FOLLOWER_WAIT_SEC = 30.0  # longer than a launcher needs to notice that rank 0 has left


@dataclass(frozen=True)
class Ranks:
    """This process's place in the job, known before any process group exists."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int | None = field(default=None, compare=False)  # of this node; None = unknown

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints, logs and writes shared files."""
        return self.rank == 0


def discover_ranks(env: MutableMapping[str, str] = os.environ) -> Ranks:
    """Read this process's place from its launcher, and write it into `env` as DeepSpeed reads it.

    Raises:
        ConfigError: the variables are wrong, the launcher is unknown, or the ranks cannot meet
            where they should.
    """
    place = launcher.read_place(env)
    _prepare_to_meet(place, env)
    return _ranks_of(place)


def enter_job(is_dry: bool = False) -> Ranks:
    """Do what `discover_ranks` does, for an entry point: say once what is wrong on all ranks.

    Args:
        is_dry: True if the ranks will not meet, so that they need not be able to.

    Raises:
        ConfigError: this process's place is unknown.
    """
    place = launcher.read_place()
    with one_sentence(_ranks_of(place)):
        _prepare_to_meet(place, os.environ, is_dry)
    return _ranks_of(place)


def _ranks_of(place: launcher.Place) -> Ranks:
    return Ranks(place.rank, place.world_size, place.local_rank, place.local_size)


def _prepare_to_meet(
    place: launcher.Place, env: MutableMapping[str, str], is_dry: bool = False
) -> None:
    host, port = rendezvous.meeting_point(place, env)
    if not is_dry:
        rendezvous.check_meeting_point(place, host, port, env)
    launcher.write_place(place, host, port, env)


def collective_timeout(env: Mapping[str, str] = os.environ) -> timedelta:
    """Return how long a rank waits for the others before it takes them for lost.

    Raises:
        ConfigError: COLLECTIVE_TIMEOUT_SEC is no number of seconds.
    """
    text = env.get(TIMEOUT_VARIABLE, str(DEFAULT_TIMEOUT_SEC))
    if not text.isdecimal() or int(text) == 0:
        raise ConfigError(f"{TIMEOUT_VARIABLE}={text} is no number of seconds; use 1 or more.")
    return timedelta(seconds=int(text))


@contextmanager
def one_sentence(ranks: Ranks) -> Iterator[None]:
    """Turn a ConfigError that every rank raises into one sentence of rank 0, and exit.

    The launcher ends all ranks when one leaves, so rank 0 must leave first. A rank that still lives
    after that has a mistake of its own, such as a folder that is missing on its node, and says it.
    """
    try:
        yield
    except ConfigError as err:
        if ranks.is_main:
            sys.stderr.write(f"error: {err}\n")
        else:
            wait_to_be_ended(err.exit_code)
            sys.stderr.write(f"error: [rank {ranks.rank}] {err}\n")
        sys.exit(err.exit_code)


def wait_to_be_ended(exit_code: int) -> None:
    """Let rank 0 leave first; the SIGTERM that follows must not hide the exit code.

    srun and others report the highest code of all ranks, and a signal's is above every other.
    """
    end_on_signals_with(exit_code)
    time.sleep(FOLLOWER_WAIT_SEC)


def select_accelerator(ranks: Ranks) -> torch.device:
    """Choose CUDA where there is one, else the CPU, before DeepSpeed is imported.

    DeepSpeed reads DS_ACCELERATOR at import; without it, it probes and warns on a machine
    that has no GPU. DS_ACCELERATOR=cpu keeps a machine's GPUs out of it.

    Raises:
        ConfigError: this node has fewer GPUs than processes.
    """
    if not has_gpu():
        os.environ.setdefault(ACCELERATOR_VARIABLE, CPU)
        return torch.device("cpu")
    index = device_index(ranks.local_rank, torch.cuda.device_count(), os.environ)
    if index != ranks.local_rank:
        launcher.use_first_device()
    return torch.device("cuda", index)


def device_index(local_rank: int, num_gpus: int, env: Mapping[str, str]) -> int:
    """Return the number of a process's GPU among those that it sees.

    Raises:
        ConfigError: this node has fewer GPUs than processes.
    """
    if local_rank < num_gpus:
        return local_rank
    if num_gpus == 1 and launcher.has_one_device_of_its_own(env):
        return 0
    raise ConfigError(
        f"local rank {local_rank} finds {num_gpus} GPU(s) on node {launcher.own_node()}; start at "
        "most one process per GPU, show each process its own one (CUDA_VISIBLE_DEVICES), or set "
        "DS_ACCELERATOR=cpu."
    )


def share_cores(ranks: Ranks, env: Mapping[str, str] = os.environ) -> None:
    """Give each process of a CPU node its share of the cores, unless OMP_NUM_THREADS says.

    torch alone would let every one of N processes use all cores.
    """
    if "OMP_NUM_THREADS" in env:
        return
    per_node = ranks.local_size or ranks.world_size
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // per_node))


def start_process_group(ranks: Ranks, device: torch.device) -> None:
    """Create the process group (NCCL on CUDA, gloo on CPU). All ranks must call this.

    Raises:
        ConfigError: the ranks did not meet.
    """
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")  # its warnings are about what config/deepspeed_config.py has chosen
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        share_cores(ranks)
        # DeepSpeed would compile a shared-memory kernel (half a minute, needs a C++ compiler) and
        # leave 69 MB per rank in /dev/shm after each run; only inference_all_reduce uses it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    timeout = collective_timeout()
    with rendezvous.explained(ranks.rank, ranks.world_size, timeout.total_seconds()):
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo",
            timeout=timeout,
            verbose=False,
        )
    got = (torch.distributed.get_rank(), torch.distributed.get_world_size())
    assert got == (ranks.rank, ranks.world_size), f"process group is {got}, launcher said {ranks}"
    if ranks.world_size > 1:
        skip_teardown()  # the threads of a gloo group can abort it


def start_drawing_group(ranks: Ranks, patience: timedelta | None = None) -> None:
    """Create a gloo group for ranks that draw images and seldom talk. All ranks must call this.

    Args:
        ranks: this process's place.
        patience: how long a rank waits for the others after they have met; None = as until then.

    Raises:
        ConfigError: the ranks did not meet.
    """
    timeout = collective_timeout()
    with rendezvous.explained(ranks.rank, ranks.world_size, timeout.total_seconds()):
        torch.distributed.init_process_group(
            "gloo",
            store=rendezvous.open_store(ranks.rank, ranks.world_size, timeout),
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=patience or timeout,
        )
    skip_teardown()
    share_cores(ranks)


def meet_to_leave() -> None:
    """Wait for all ranks, and ignore launchers' signals from now on. All ranks must call this.

    When the first rank leaves with an error, the launcher ends the others; their exit code must not
    become a signal's.
    """
    ignore_signals()
    torch.distributed.barrier()


def stop_process_group() -> None:
    """Wait for all ranks and close the connections between them. All ranks must call this."""
    meet_to_leave()
    torch.distributed.destroy_process_group()
