"""Processes: a rank's place in the job, the process group, stopping together.

data_tools/process/launcher.py reads that place from the launcher's variables,
training/ranks/rendezvous.py knows where the ranks meet.
"""

import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any

import torch

from data_tools.errors import ConfigError
from data_tools.process import launcher
from data_tools.process.entry_point import minded_signals
from training.ranks import rendezvous
from training.ranks.exit_codes import end_on_signals_with, ignore_signals

TIMEOUT_VARIABLE = "COLLECTIVE_TIMEOUT_SEC"
DEFAULT_TIMEOUT_SEC = 300  # longer than rank 0 alone writes files while the others wait
RANK_FAILED = 1000  # as a stop signal: a rank cannot go on; above every signal number
FOLLOWER_WAIT_SEC = 30.0  # longer than a launcher needs to notice that rank 0 has left


class RunError(RuntimeError):
    """What ends a run after its start, raised on all ranks alike; one sentence for the user."""

    exit_code = 1


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
    """Do what `discover_ranks` does, for an entry point: what all ranks find is said once.

    Args:
        is_dry: nobody will meet, so it need not be possible.

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


def collective_timeout(env: MutableMapping[str, str] = os.environ) -> timedelta:
    """Return how long a rank waits for the others before it takes them for lost."""
    text = env.get(TIMEOUT_VARIABLE, str(DEFAULT_TIMEOUT_SEC))
    if not text.isdecimal() or int(text) == 0:
        raise ConfigError(f"{TIMEOUT_VARIABLE}={text} is no number of seconds; use 1 or more.")
    return timedelta(seconds=int(text))


@contextmanager
def one_sentence(ranks: Ranks) -> Iterator[None]:
    """Report a mistake that every rank finds by itself once, and exit with its code.

    The launcher ends all ranks when one leaves, so rank 0 must come first. A rank that is still
    there after that met a mistake of its own, such as a folder that is missing on its node.
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


def agreed_message(error: Exception | str | None) -> str | None:
    """Tell all ranks the first error among them. All ranks must call this."""
    messages: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(messages, None if error is None else str(error))
    return next((message for message in messages if message is not None), None)


def from_main(value: Any) -> Any:
    """Return the main rank's value on all ranks; others' is ignored. All ranks must call this."""
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def check_agreement(decisions: dict[str, Any]) -> None:
    """Compare what the ranks decided before they could talk. All ranks must call this.

    Args:
        decisions: what was decided, by the name a user knows it by.

    Raises:
        RunError: on all ranks, naming the first decision that differs from rank 0's: a node with
            an old copy of a file, other software, or other hardware.
    """
    everyone: list[dict[str, Any]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everyone, decisions)
    for rank, other in enumerate(everyone):
        for name, value in everyone[0].items():
            if other[name] != value:
                raise RunError(
                    f"rank {rank} has {name} {other[name]}, rank 0 has {value}; make the nodes "
                    "see the same files, software and hardware, and start again."
                )


def select_accelerator(ranks: Ranks, env: MutableMapping[str, str] = os.environ) -> torch.device:
    """Choose CUDA where there is one, else the CPU, before DeepSpeed is imported.

    DeepSpeed reads DS_ACCELERATOR at import; without it, it probes and warns on a machine
    that has no GPU. DS_ACCELERATOR=cpu keeps a machine's GPUs out of it.

    Raises:
        ConfigError: this node has fewer GPUs than processes.
    """
    if not torch.cuda.is_available() or env.get("DS_ACCELERATOR") == "cpu":
        env.setdefault("DS_ACCELERATOR", "cpu")
        return torch.device("cpu")
    index = device_index(ranks.local_rank, torch.cuda.device_count(), env)
    if index != ranks.local_rank:
        launcher.use_first_device(env)
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

    logger.setLevel(
        "ERROR"
    )  # its warnings are about choices that config/deepspeed_config.py has made
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
    share_cores(ranks)


def meet_to_leave() -> None:
    """Wait for all ranks, deaf to launchers' signals from now on. All ranks must call this.

    The first rank that leaves with an error makes the launcher end the others, whose own exit code
    must not become a signal's.
    """
    ignore_signals()
    torch.distributed.barrier()


def stop_process_group() -> None:
    """Leave together: without this a gloo thread can abort the interpreter at exit."""
    meet_to_leave()
    torch.distributed.destroy_process_group()


class StopSignal:
    """A signal to stop on any rank becomes one decision of all ranks at a step boundary.

    SIGINT and SIGTERM always do; SIGHUP, SIGUSR1 and SIGUSR2 unless they are ignored already, as
    nohup has it.

    What is posted before a step is read before the next one, when the device has long computed it:
    reading what was posted just now would wait for everything queued before.
    """

    def __init__(self, device: torch.device) -> None:
        # The stop signal, and whether a checkpoint is due.
        self._flag = torch.zeros(2, dtype=torch.int32, device=device)
        self._on_host = torch.zeros(2, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._copied: torch.cuda.Event | None = None
        self._received = 0
        numbers = {signal.SIGINT, signal.SIGTERM, *minded_signals()}
        self._previous = {number: signal.signal(number, self._on_signal) for number in numbers}

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        # A launcher often repeats the signal while the checkpoint is being written.
        self._received = number

    def is_received(self) -> bool:
        """Tell whether this rank has received a signal; others may not know it yet."""
        return self._received != 0

    def post(self, has_failed: bool = False, is_save_due: bool = False) -> None:
        """Send what this rank received to all ranks. All ranks must call this.

        Args:
            has_failed: this rank cannot go on; then all ranks read RANK_FAILED.
            is_save_due: by this rank's clock a checkpoint is due; then it is for all ranks.
        """
        self._flag[0] = RANK_FAILED if has_failed else self._received
        self._flag[1] = int(is_save_due)
        torch.distributed.all_reduce(self._flag, op=torch.distributed.ReduceOp.MAX)
        self._on_host.copy_(self._flag, non_blocking=True)
        if self._flag.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> int:
        """Return what any rank had received at the last `post`, 0 if nothing; all get the same."""
        self._wait()
        return int(self._on_host[0])

    def is_save_due(self) -> bool:
        """Tell whether by any rank's clock a checkpoint was due at the last `post`."""
        self._wait()
        return bool(self._on_host[1])

    def _wait(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()

    def restore(self) -> None:
        """Give the signals back to the handlers that had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
