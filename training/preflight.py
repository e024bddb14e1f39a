"""Check that the nodes of a job can train together, before the expensive part.

    srun python training/preflight.py [the flags of training/main.py]

Every rank tells rank 0 what its node has, through a plain store and before any collective, so that
a node that is missing or hangs can be named. The job ends with one sentence for each node that
differs from the others, lacks data, disk or GPUs, or exchanges too little. It prints the bandwidth.

Rank 0 waits for the others COLLECTIVE_TIMEOUT_SEC, and leaves after twice that and ten seconds,
whatever it does. The others give rank 0 more time than it may take, and leave after three times
that and half a minute.
"""

import contextlib
import errno
import json
import os
import sys
import threading
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from data_tools.process.signals import end_early_on_signals

    end_early_on_signals()

import torch

from data_tools.errors import count_of, exit_on_config_error
from data_tools.exit_codes import CONFIG_ERROR_EXIT_CODE
from data_tools.process.entry_point import enter
from data_tools.process.launcher import (
    allocated_nodes,
    has_agent_store,
    own_node,
    written_meeting_point,
)
from data_tools.process.leaving import leave, skip_teardown
from data_tools.process.signals import end_on_signals_with
from training.checked_job import check, check_without_data, is_demo_missing
from training.checkpoints.resume_point import newest_point
from training.config.command_line import CommandLine, parse_command_line
from training.nodes.bandwidth import Bandwidth, floor_gbps, judge, measure
from training.nodes.facts import NodeFacts, collect, compare, exit_code_of, summary
from training.ranks import process_group
from training.ranks.process_group import Ranks
from training.ranks.rendezvous import port_problem

GRACE_SEC = 10.0  # beyond a time limit, for the rank that knows more to speak first
MAX_SENTENCES = 8
# On all ranks alike: every rank's node, what is wrong, a summary, the exit code if anything is.
Verdict = tuple[list[str], list[str], str, int]


class PreflightError(Exception):
    """A node with which training would fail or hang; one sentence that names it."""


class Stage:
    """End this rank when its time is over, with a sentence on what it was doing.

    Rank 0 has the time limit twice: for a look at its own node, and for the others' reports. The
    others have it three times and more grace, so that they do not give up a rank 0 that may still
    speak.
    """

    def __init__(self, ranks: Ranks, timeout: timedelta) -> None:
        self._ends = time.monotonic() + (2 if ranks.is_main else 3) * timeout.total_seconds()
        grace_sec = GRACE_SEC * (1 if ranks.is_main else 3)
        self.begin("start")
        self._timer = threading.Timer(self.seconds_left() + grace_sec, self._give_up)
        self._timer.daemon = True
        self._timer.start()

    def close(self) -> None:
        """Let the time limit go: this rank has come to an end by itself."""
        self._timer.cancel()
        self._timer.join()

    def begin(self, what: str, sentence: str | None = None) -> None:
        """Remember what is done next, and what to say if it does not end."""
        self.now = what
        self._sentence = sentence or f"node {own_node()} does not get on with: {what}"

    def seconds_left(self) -> float:
        """Return how long this rank may still take, without the grace."""
        return max(0.0, self._ends - time.monotonic())

    def _give_up(self) -> None:
        # The main thread may hang where no exception reaches it.
        leave(CONFIG_ERROR_EXIT_CODE, f"error: {self._sentence}\n")


def check_job(command: CommandLine, ranks: Ranks) -> tuple[str, str]:
    """Check all that training/main.py will check; return data hash and checkpoint."""
    if is_demo_missing(command.config):  # training makes it
        check_without_data(command, ranks)
        return "", ""
    job = check(replace(command, dry_run=True), ranks)  # dry: rank 0 need not load a decoder
    point = newest_point(Path(job.config.run.run_dir))
    return job.manifest.hash, "" if point is None else str(point.folder)


def no_answer() -> str:
    """Say that rank 0 hangs; torch waits without end for a store whose process is stopped."""
    return (
        f"node {written_meeting_point()[0]} (rank 0) gave {own_node()} no answer: it hangs, for "
        "example in its storage, or the network to it broke; look at it, or leave it out with "
        "sbatch --exclude."
    )


def connect(ranks: Ranks, timeout: timedelta) -> torch.distributed.TCPStore:
    """Reach rank 0's store.

    Raises:
        PreflightError: it does not answer in time, or cannot have the port.
    """
    host, port = written_meeting_point()
    is_server = ranks.is_main and not has_agent_store()
    try:
        return torch.distributed.TCPStore(
            host, port, ranks.world_size, is_server, timeout, wait_for_workers=False
        )
    except RuntimeError as err:
        if ranks.is_main and "EADDRINUSE" in str(err):
            raise PreflightError(str(port_problem(port, errno.EADDRINUSE))) from err
        raise PreflightError(
            f"node {own_node()} cannot reach {host} port {port}; look at the network between them, "
            "or state its interface in slurm/site.sh (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)."
        ) from err


def gather_facts(
    store: torch.distributed.Store, ranks: Ranks, patience_sec: float
) -> list[NodeFacts]:
    """Collect what all ranks have said. Rank 0 only.

    Raises:
        PreflightError: naming the nodes that did not report in time.
    """
    deadline = time.monotonic() + patience_sec
    everyone = range(ranks.world_size)
    missing = list(everyone)
    while missing:
        missing = [rank for rank in missing if not store.check([f"facts/{rank}"])]
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    found = [
        NodeFacts(**json.loads(store.get(f"facts/{rank}")))
        for rank in everyone
        if rank not in missing
    ]
    if not missing:
        return found
    heard = {facts.node for facts in found}
    silent = ", ".join(node for node in allocated_nodes() if node not in heard)
    numbers = ", ".join(map(str, missing))
    who = f"node {silent} (rank {numbers})" if silent else f"rank {numbers}"
    raise PreflightError(
        f"{who} did not report within {patience_sec:.0f} s: it cannot reach {own_node()}, or "
        "hangs, for example in its storage; look at it, or leave it out with sbatch --exclude."
    )


def agree(
    store: torch.distributed.Store, facts: NodeFacts, ranks: Ranks, timeout: timedelta, stage: Stage
) -> Verdict:
    """Compare the nodes.

    Raises:
        PreflightError: naming rank 0's node, which did not do its part.
    """
    if not ranks.is_main:
        return _hear_verdict(store, facts, timeout, stage)
    store.set(f"facts/{ranks.rank}", json.dumps(asdict(facts)))
    stage.begin("the other nodes' reports")
    # A slow look at its own files leaves less time, or this rank would end before it says who.
    patience_sec = min(timeout.total_seconds(), stage.seconds_left())
    try:
        everyone = gather_facts(store, ranks, patience_sec)
        nodes, code = [facts.node for facts in everyone], exit_code_of(everyone)
        verdict = nodes, compare(everyone), summary(everyone), code
    except PreflightError as err:
        verdict = [], [str(err)], "", CONFIG_ERROR_EXIT_CODE
    store.set("verdict", json.dumps(verdict))
    return verdict


def _hear_verdict(
    store: torch.distributed.Store, facts: NodeFacts, timeout: timedelta, stage: Stage
) -> Verdict:
    """Report to rank 0, whose time had begun when its store answered, and wait for its verdict."""
    patience = 2 * timeout + timedelta(seconds=2 * GRACE_SEC)
    stage.begin("the first node's answer", no_answer())
    started = time.monotonic()
    try:
        store.set(f"facts/{facts.rank}", json.dumps(asdict(facts)))
        store.set_timeout(patience)
        verdict = json.loads(store.get("verdict"))
        store.set_timeout(timeout)
    except RuntimeError as err:  # torch's DistStoreError and DistNetworkError
        if time.monotonic() - started < patience.total_seconds():
            # Rank 0 has left, and its exit code is what counts: the launcher ends this one.
            time.sleep(process_group.FOLLOWER_WAIT_SEC)
        raise PreflightError(no_answer()) from err
    return tuple(verdict)


def exchange(
    store: torch.distributed.Store, ranks: Ranks, nodes: list[str], timeout: timedelta, stage: Stage
) -> Bandwidth:
    """Measure the bandwidth. All ranks must call this.

    Raises:
        PreflightError: an exchange failed or did not end.
    """
    device = process_group.select_accelerator(ranks)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # an exception instead of an abort
    try:
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=torch.distributed.PrefixStore("exchange", store),
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
        if ranks.world_size > 1:
            skip_teardown()
        bandwidth = measure(nodes, device, stage.begin)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except RuntimeError as err:  # what torch raises for a failed collective, of any backend
        reason = str(err).splitlines()[0].split("] ", 1)[-1]
        raise PreflightError(
            f"node {own_node()} failed to exchange data: {stage.now} ({reason}); look at the "
            "network between the nodes, or leave one out with sbatch --exclude."
        ) from err
    return bandwidth


def report(
    problems: list[str],
    ranks: Ranks,
    store: torch.distributed.Store,
    exit_code: int = CONFIG_ERROR_EXIT_CODE,
) -> None:
    """Print what is wrong and leave, rank 0 first: the launcher ends all when one leaves.

    Rank 0 has the store, and waits a moment for the others to have read it.
    """
    if ranks.is_main:
        deadline = time.monotonic() + GRACE_SEC / 2
        while store.add("read", 0) < ranks.world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        for sentence in problems[:MAX_SENTENCES]:
            sys.stderr.write(f"error: {sentence}\n")
        if len(problems) > MAX_SENTENCES:
            sys.stderr.write(
                f"error: and {count_of(len(problems) - MAX_SENTENCES, 'node')} more.\n"
            )
    else:
        end_on_signals_with(exit_code)
        with contextlib.suppress(RuntimeError):  # rank 0 no longer waits
            store.add("read", 1)
        process_group.wait_to_be_ended(exit_code)
    sys.exit(exit_code)


def main(argv: list[str] | None = None) -> None:
    """Check the nodes of this job; exit with code 2 if training on them would fail.

    With 1, another try, if the only reason is a server that fails for now.
    """
    started = time.monotonic()
    with exit_on_config_error():
        ranks = process_group.enter_job()
        timeout, floor = process_group.collective_timeout(), floor_gbps()
    with contextlib.closing(Stage(ranks, timeout)) as stage:
        with process_group.one_sentence(ranks):
            command = parse_command_line(argv)
        try:
            stage.begin("a connection to the first node", None if ranks.is_main else no_answer())
            store = connect(ranks, timeout)
            stage.begin("a look at its own files")
            facts = collect(ranks, lambda: check_job(command, ranks))
            nodes, problems, text, exit_code = agree(store, facts, ranks, timeout, stage)
            if problems:
                report(problems, ranks, store, exit_code)
            bandwidth = exchange(store, ranks, nodes, timeout, stage)
        except PreflightError as err:
            # The threads of broken connections would hold up an exit.
            leave(CONFIG_ERROR_EXIT_CODE, f"error: [rank {ranks.rank}] {err}\n")
        slow, odd = judge(bandwidth, floor)
        if slow:
            report(slow, ranks, store)
        if ranks.is_main:
            for sentence in odd:
                sys.stderr.write(f"warning: {sentence}\n")
            print(f"nodes: {text}; {bandwidth}; checked in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    enter(main)
