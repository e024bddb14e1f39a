"""Read launchers' variables; no other module of the project does.

deepspeed, torchrun, srun, mpirun, jsrun and flux each use other variables to say which of how many
processes this one is. They are read here and written as the five that torch and DeepSpeed read:
RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. A launcher that says less is refused by
name: if it were taken for none, every process would train alone.

Imports nothing that takes time: training/retry.py runs between a crash and the next start.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from data_tools.errors import ConfigError

DEFAULT_MASTER_PORT = 29500
MAX_PORT = 65535
SRUN, BY_TORCH = "srun", "deepspeed, torchrun or your own settings"
_FIRST_SLURM_PORT, _NUM_SLURM_PORTS = 10000, 20000  # below those that Linux hands out by itself
# Slurm numbers what is no step of srun (a batch script, salloc's shell) from here on.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0


class _Family(NamedTuple):
    """The variables of one kind of launcher; of several names, the first that is set counts."""

    launcher: str
    rank: str
    size: str
    local_ranks: tuple[str, ...]
    local_sizes: tuple[str, ...] = ()


def _prefixed(launcher: str, prefix: str) -> _Family:
    names = [f"{prefix}_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
    return _Family(launcher, *names[:2], (names[2],), (names[3],))


_FAMILIES = (
    _prefixed("jsrun", "JSM_NAMESPACE"),
    _prefixed("OpenMPI's mpirun", "OMPI_COMM_WORLD"),
    _prefixed("MVAPICH's mpirun", "MV2_COMM_WORLD"),
    _Family("flux", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", ("FLUX_TASK_LOCAL_ID",)),
    # MPICH and Intel MPI name the place on the node MPI_*, Cray PALS names it PMI_* and PALS_*.
    _Family(
        "mpirun (PMI)",
        "PMI_RANK",
        "PMI_SIZE",
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
    ),
)
# Set by launchers that do not say how many processes there are, or not in a way known here.
_UNKNOWN = (
    *("PMIX_RANK", "PALS_RANKID", "ALPS_APP_PE", "MVP_COMM_WORLD_RANK", "HOROVOD_RANK"),
    "LOCAL_RANK",
)
_USE = "start with torchrun, deepspeed, srun or mpirun"


@dataclass(frozen=True)
class Place:
    """Which of how many processes this one is."""

    launcher: str  # its name as users know it; empty for a process that nobody launched
    rank: int  # among all
    world_size: int
    local_rank: int  # on its node
    local_size: int | None  # processes on this node; None if the launcher does not say


ALONE = Place("", 0, 1, 0, 1)


def read_place(env: Mapping[str, str] = os.environ) -> Place:
    """Read this process's place from whatever launcher's variables are set.

    RANK and WORLD_SIZE (torchrun, deepspeed, by hand) come first, then MPI's and others', then
    srun's, whose tasks may be their helpers. salloc's shell and a batch script are one process.

    Raises:
        ConfigError: variables that are no numbers, incomplete, or of two launchers that disagree; a
            launcher that is not known.
    """
    family = next((family for family in _FAMILIES if env.get(family.rank)), None)
    inner = _of_slurm(env)
    as_srun_says = inner and [str(inner.rank), str(inner.world_size)]
    if family and [env[family.rank], env.get(family.size)] != as_srun_says:  # srun sets PMI's, too
        inner = _of_family(env, family)
    given = _of_torch(env)
    if given is not None:
        _check_same(given, inner, env)
        return given
    if inner is not None:
        return inner
    for name in _UNKNOWN:
        # A batch script and salloc's shell may have Slurm's own PMIX_RANK.
        if env.get(name) and not env.get("SLURM_PROCID"):
            raise ConfigError(
                f"{name}={env[name]} is set, so a launcher has started this process, and none that "
                f"this program knows; {_USE}, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and "
                f"MASTER_PORT in every process; for a single one unset {name}, or set RANK=0 "
                "WORLD_SIZE=1 LOCAL_RANK=0."
            )
    return ALONE


def read_place_on_node(env: Mapping[str, str] = os.environ) -> Place:
    """Read the place of a process that need not meet others: by hand, LOCAL_RANK alone says it."""
    is_by_hand = not any(env.get(name) for name in ("RANK", "WORLD_SIZE"))
    if is_by_hand and env.get("LOCAL_RANK") and not any(env.get(f.rank) for f in _FAMILIES):
        local_size = _first_number(env, ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
        return Place("", 0, 1, _number(env, "LOCAL_RANK"), local_size)
    return read_place(env)


def _of_torch(env: Mapping[str, str]) -> Place | None:
    names = ("RANK", "WORLD_SIZE")
    found = [name for name in names if env.get(name)]
    if not found:
        return None
    if len(found) < len(names):
        missing = next(name for name in names if name not in found)
        raise ConfigError(
            f"{found[0]}={env[found[0]]} is set and {missing} is not, so the number of processes "
            f"is unknown; unset {found[0]} for a single process, or {_USE}."
        )
    family = _Family(BY_TORCH, *names, ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
    return _of_family(env, family)


def _of_family(env: Mapping[str, str], family: _Family) -> Place:
    rank = _number(env, family.rank)
    if not env.get(family.size):
        raise ConfigError(
            f"{family.rank}={rank} is set and {family.size} is not, so the number of processes is "
            f"unknown; {_USE}."
        )
    size = _number(env, family.size)
    if rank >= size:
        raise ConfigError(
            f"{family.rank}={rank} is not below {family.size}={size}, and ranks count from 0; "
            f"unset both for a single process, or {_USE}."
        )
    local_size = _first_number(env, family.local_sizes)
    name = next((name for name in (*family.local_ranks, "LOCAL_RANK") if env.get(name)), None)
    if name is None:
        if rank > 0:  # the first of all is the first of its node
            raise ConfigError(
                f"{family.local_ranks[0]} is not set beside {family.rank}={rank} and {family.size}="
                f"{size}, so this process does not know its number on its node, which its GPU goes "
                "by; set LOCAL_RANK in every process (0 where a node has one), or "
                f"{_USE}."
            )
        return Place(family.launcher, rank, size, 0, local_size or (1 if size == 1 else None))
    local_rank = _number(env, name)
    if local_rank >= min(size, local_size or size):
        raise ConfigError(
            f"{name}={local_rank} is not below the {min(size, local_size or size)} process(es) of "
            f"this node, and numbers on a node count from 0; {_USE}, or correct it."
        )
    return Place(family.launcher, rank, size, local_rank, local_size)


def _of_slurm(env: Mapping[str, str]) -> Place | None:
    """Return the place in a step of srun; None outside of one."""
    if not env.get("SLURM_PROCID") or not env.get("SLURM_STEP_ID"):
        return None
    if _number(env, "SLURM_STEP_ID") >= _FIRST_SPECIAL_STEP:
        return None
    # SLURM_NTASKS is the job's in a shell that kept the variables of salloc or sbatch.
    size_name = "SLURM_STEP_NUM_TASKS" if env.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    family = _Family(SRUN, "SLURM_PROCID", size_name, ("SLURM_LOCALID",))
    place = _of_family(env, family)
    return replace(place, local_size=1 if place.world_size == 1 else _slurm_tasks_here(env))


def _slurm_tasks_here(env: Mapping[str, str]) -> int | None:
    """Return this node's number of tasks, of a list such as 2(x3),1."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    counts = [int(count) for count, times in found for _ in range(int(times or 1))]
    node = _first_number(env, ("SLURM_NODEID",))
    return counts[node] if node is not None and node < len(counts) else None


def _check_same(given: Place, other: Place | None, env: Mapping[str, str]) -> None:
    """Refuse RANK and WORLD_SIZE that an older shell or job has left behind."""
    if other is None or env.get("TORCHELASTIC_RUN_ID") or env.get("CROSS_SIZE"):
        return  # torchrun, or deepspeed's launcher, as the task of another launcher on each node
    is_larger = given.world_size > other.world_size  # one of several that each task started
    if is_larger or (given.rank, given.world_size) == (other.rank, other.world_size):
        return
    raise ConfigError(
        f"RANK={given.rank} and WORLD_SIZE={given.world_size} are set, and {other.launcher} has "
        f"started this process as number {other.rank} of {other.world_size}; unset RANK and "
        "WORLD_SIZE before you start it."
    )


def _number(env: Mapping[str, str], name: str) -> int:
    text = env[name]
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(f"{name}={text} is no number from 0 on; unset it, or {_USE}.")
    return int(text)


def _first_number(env: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    return next((_number(env, name) for name in names if env.get(name)), None)


def has_agent_store(env: Mapping[str, str] = os.environ) -> bool:
    """Tell whether torchrun itself listens where the ranks meet."""
    return env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def said_port(place: Place, env: Mapping[str, str]) -> int:
    """Return the port at which the ranks meet: MASTER_PORT, the job's own, or the usual one."""
    if text := env.get("MASTER_PORT"):
        if not (text.isascii() and text.isdecimal() and 0 < int(text) <= MAX_PORT):
            raise ConfigError(
                f"MASTER_PORT={text} is no port; set the same number from 1 to {MAX_PORT} in every "
                "process, or unset it."
            )
        return int(text)
    if place.launcher == SRUN and (job := batch_job(env)).isdecimal():
        step = _first_number(env, ("SLURM_STEP_ID",)) or 0
        return _FIRST_SLURM_PORT + (int(job) + step) % _NUM_SLURM_PORTS
    return DEFAULT_MASTER_PORT


def said_host(place: Place, env: Mapping[str, str]) -> str | None:
    """Return the node of rank 0: MASTER_ADDR, or the first of srun's step; None = nobody says."""
    lists = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    if env.get("MASTER_ADDR"):
        return env["MASTER_ADDR"]
    found = next((env[name] for name in lists if env.get(name)), None)
    return first_of_node_list(found) if found and place.launcher == SRUN else None


def first_of_node_list(text: str) -> str:
    """Return the first host of a list as Slurm writes it: node[01-17,20],gpu3."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", text)
    assert first is not None, "it matches anything"
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def write_place(place: Place, host: str, port: int, env: MutableMapping[str, str]) -> None:
    """Set the variables that torch and DeepSpeed read."""
    env["RANK"], env["WORLD_SIZE"] = str(place.rank), str(place.world_size)
    env["LOCAL_RANK"] = str(place.local_rank)
    env["MASTER_ADDR"], env["MASTER_PORT"] = host, str(port)


def written_meeting_point() -> tuple[str, int]:
    """Return the host and port that `write_place` has set."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def use_first_device() -> None:
    """Tell DeepSpeed, which takes LOCAL_RANK for a device's number, that there is but one."""
    os.environ["LOCAL_RANK"] = "0"


def has_one_device_of_its_own(env: Mapping[str, str]) -> bool:
    """Tell whether a launcher shows this process one GPU only, which then has number 0."""
    names = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
    visible = next((env[name] for name in names if env.get(name)), "")
    return bool(env.get("SLURM_GPUS_PER_TASK")) or (visible != "" and "," not in visible)


def slurm_gpus() -> int:
    """Return how many GPUs Slurm has given to this process or its node; 0 if it does not say."""
    text = os.environ.get("SLURM_GPUS_PER_TASK") or os.environ.get("SLURM_GPUS_ON_NODE", "")
    return int(text) if text.isdecimal() else 0


def batch_job(env: Mapping[str, str] = os.environ) -> str:
    """Return the number of Slurm's job; empty without one."""
    return env.get("SLURM_JOB_ID", "")


def is_started_again(env: Mapping[str, str] = os.environ) -> bool:
    """Tell whether Slurm has started this job before.

    Its own earlier ranks, on a node that is cut off, may then still hold the run directory; they
    leave it by themselves.
    """
    return env.get("SLURM_RESTART_COUNT", "0") not in ("", "0")


def is_restarted_by_torchrun(env: Mapping[str, str] = os.environ) -> bool:
    """Tell whether torchrun has started these ranks again, by itself."""
    return env.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


def own_node() -> str:
    """Return the name by which a user knows this node."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def allocated_nodes() -> list[str]:
    """Return the nodes that Slurm gave the job; none without Slurm, or where it does not answer."""
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if nodes is None or shutil.which("scontrol") is None:
        return []
    command = ["scontrol", "show", "hostnames", nodes]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
