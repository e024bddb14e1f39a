"""Find the host and port where the ranks of a job meet, and explain why they did not meet.

Rank 0 listens there, and the others connect. A process that is alone takes any free port.
"""

import errno
import os
import re
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch

from data_tools.errors import ConfigError, OutageError
from data_tools.process.launcher import (
    BY_TORCH,
    SRUN,
    Place,
    has_agent_store,
    said_host,
    said_port,
    written_meeting_point,
)

OWN_ADDRESS = "127.0.0.1"


def meeting_point(place: Place, env: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Return the host and port at which rank 0 awaits the others.

    A single process meets nobody: it takes a free port, whatever MASTER_ADDR an older job has left.

    Raises:
        ConfigError: MASTER_PORT is no port, or the host cannot be found out.
    """
    if place.world_size == 1 and not has_agent_store(env):
        return OWN_ADDRESS, _free_port()
    return said_host(place, env) or _first_host(place), said_port(place, env)


def _first_host(place: Place) -> str:
    """Find the node of rank 0 where no variable names it."""
    if place.local_size == place.world_size:
        return OWN_ADDRESS
    if place.launcher == BY_TORCH and place.local_rank == place.rank:
        return OWN_ADDRESS  # by hand; on a second node the two differ
    if place.launcher in (BY_TORCH, SRUN):
        raise ConfigError(
            f"MASTER_ADDR is not set, and this is rank {place.rank} of {place.world_size} on "
            "several nodes; set it to the name of rank 0's node in every process."
        )
    return _host_over_mpi(place)


def _host_over_mpi(place: Place) -> str:
    """Ask rank 0 for its node's name, over MPI. All ranks must call this."""
    what = f"MASTER_ADDR is not set, and {place.launcher} has started processes on several nodes"
    do = "set it to the name of rank 0's node in every process (mpirun has -x or -genv for that)"
    try:
        with warnings.catch_warnings(action="ignore"):  # that it is of another MPI is said below
            from mpi4py import MPI
    except (ImportError, RuntimeError) as err:  # not installed, or there is no MPI library
        raise ConfigError(f"{what}; mpi4py cannot ask for it ({err}); {do}.") from err
    world = MPI.COMM_WORLD
    if world.Get_size() != place.world_size:
        raise ConfigError(
            f"{what}; mpi4py is built for another MPI, which sees {world.Get_size()} of "
            f"{place.world_size} processes; {do}."
        )
    host = world.bcast(socket.gethostname(), root=0)
    # Its end is a meeting of all ranks, which a rank that has met a mistake must not wait for.
    MPI.Finalize()
    return host


def check_meeting_point(
    place: Place, host: str, port: int, env: Mapping[str, str] = os.environ
) -> None:
    """Refuse an unknown host and, on rank 0, a port that another program has.

    This comes before the ranks meet: they would otherwise talk to the other program.

    Raises:
        ConfigError: of which OutageError, where the name service does not answer.
    """
    if place.world_size == 1:
        return
    try:
        socket.getaddrinfo(host, port)
    except (OSError, UnicodeError) as err:
        is_outage = isinstance(err, socket.gaierror) and err.errno == socket.EAI_AGAIN
        reason = err.strerror if isinstance(err, OSError) else "no host's name"
        raise (OutageError if is_outage else ConfigError)(
            f"MASTER_ADDR={host}: {socket.gethostname()} cannot find such a host ({reason}); set "
            "it to the name or address of rank 0's node in every process."
        ) from err
    if place.rank > 0 or has_agent_store(env):
        return
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does
            probe.bind(("", port))
            probe.listen()
    except OSError as err:
        raise port_problem(port, err.errno or 0) from err


def port_problem(port: int, code: int) -> ConfigError:
    """Say that rank 0 cannot have its port.

    Args:
        port: of MASTER_PORT.
        code: errno of the attempt.
    """
    why = "is taken by another program" if code == errno.EADDRINUSE else os.strerror(code)
    return ConfigError(
        f"MASTER_PORT={port}: this port of {socket.gethostname()}, where rank 0 awaits the others, "
        f"{why}; set MASTER_PORT to another one in every process (deepspeed --master_port, "
        "SITE_PORT in slurm/site.sh), or end that program."
    )


def open_store(rank: int, world_size: int, timeout: timedelta) -> torch.distributed.Store:
    """Return the store at which the ranks meet, as torch would. All ranks must call this."""
    meeting = torch.distributed.rendezvous("env://", rank, world_size, timeout=timeout)
    store, _, _ = next(meeting)
    store.set_timeout(timeout)
    return torch.distributed.PrefixStore("drawing", store)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((OWN_ADDRESS, 0))
        return probe.getsockname()[1]


@contextmanager
def explained(rank: int, world_size: int, timeout_sec: float) -> Iterator[None]:
    """Turn what torch raises while the ranks of a job meet into one sentence.

    Args:
        rank: of this process.
        world_size: of how many.
        timeout_sec: that the ranks wait for each other, of COLLECTIVE_TIMEOUT_SEC.

    Raises:
        OutageError: they did not meet.
        ConfigError: rank 0 cannot have its port.
    """
    try:
        yield
    except RuntimeError as err:  # torch's DistError, and what gloo raises
        host, port = written_meeting_point()
        reason = str(err).splitlines()[0].rstrip(".")
        if "EADDRINUSE" in reason:
            raise port_problem(port, errno.EADDRINUSE) from err
        where = f"{host}:{port} (MASTER_ADDR, MASTER_PORT)"
        if joined := re.search(r"(\d+)/(\d+) clients joined", reason):
            raise OutageError(
                f"{joined[1]} of {joined[2]} ranks came to {where} within {timeout_sec:.0f} s "
                "(COLLECTIVE_TIMEOUT_SEC); look whether the launcher has started the others (a "
                "shell that it opened is one process), what they say, and whether their nodes "
                f"reach this one, {socket.gethostname()}."
            ) from err
        if rank > 0 and "while trying to connect" in reason:
            raise OutageError(
                f"rank {rank} of {world_size} on {socket.gethostname()} found nobody at {where} "
                f"within {timeout_sec:.0f} s (COLLECTIVE_TIMEOUT_SEC); look whether rank 0 runs "
                "there, what it says, and whether its node can be reached from here."
            ) from err
        raise OutageError(
            f"rank {rank} of {world_size} on {socket.gethostname()} reached {where}, and not "
            f"all of the other ranks ({reason}); look at what they say, whether another program "
            "has that port, and at the network between the nodes (GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME name the interface)."
        ) from err
