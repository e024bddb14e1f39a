"""Diagnose a hang or a failure: find the rank that holds the others up, and say what to do.

From every rank's last heartbeat, or from the exception that a rank met.
"""

import re
import traceback
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from data_tools.errors import ConfigError
from data_tools.exit_codes import CRASH_EXIT_CODE
from training.ranks.heartbeat import PHASES, STARTING, Beat

MAX_TRACEBACK_LINES = 60
AGAIN = "run the same command again: it continues from the last checkpoint"
MEMORY_ADVICE = (
    "lower --micro-batch-size, set --activation-checkpointing, take a higher ZeRO stage or more "
    "ranks, or see what else runs on its node"
)


class RankStatus(NamedTuple):
    """What is known of a rank.

    Attributes:
        beat: its last heartbeat; None if there was none.
        silent_sec: seconds since then, if they are too many; 0 = the rank answers.
    """

    beat: Beat | None
    silent_sec: float = 0.0


class Standstill(NamedTuple):
    """A job in which no rank moves.

    Attributes:
        since_sec: seconds since a rank moved last.
        warn_after, end_after: when to warn and when to end the job, in multiples of
            COLLECTIVE_TIMEOUT_SEC.
        text: which ranks wait for which.
        advice: what to do.
    """

    since_sec: float
    warn_after: float
    end_after: float
    text: str
    advice: str


class Failure(NamedTuple):
    """Why a rank cannot go on.

    Attributes:
        is_cause: False if a collective failed, most likely because of another rank.
        text: one sentence without a full stop.
        advice: what to do.
        trace: the traceback of a mistake of the program.
        exit_code: of the whole job.
    """

    is_cause: bool
    text: str
    advice: str = f"{AGAIN}."
    trace: str = ""
    exit_code: int = CRASH_EXIT_CODE


def describe_standstill(seen: Mapping[int, RankStatus]) -> Standstill | None:
    """Say which ranks wait for which; None if no rank answers."""
    living = {rank: one.beat for rank, one in seen.items() if one.beat and not one.silent_sec}
    if not living:
        return None
    silent = sorted(seen.keys() - living.keys())
    busy = {rank: beat for rank, beat in living.items() if not beat.waits_in}
    since_sec = min(beat.stuck_sec for beat in living.values())
    phases = [PHASES[beat.phase] for beat in (busy or living).values()]
    # The limits are those of a whole phase: in some, ranks meet in many short collectives.
    warn_after = max(phase.warn_after for phase in phases)
    end_after = max(phase.end_after for phase in phases)
    if silent:
        warn_after, end_after = 0.2, 1.0
        # Loading libraries and connecting to others can keep a watchdog's thread from beating.
        beats = [seen[rank].beat for rank in silent]
        if any(beat is None or beat.phase == STARTING.text for beat in beats):
            warn_after, end_after = STARTING.warn_after, STARTING.end_after
        advice = f"look at its node, and {AGAIN}."
    elif busy:
        advice = f"see to what it waits for, and {AGAIN}."
    elif len({beat.waits_in for beat in living.values()}) > 1:
        advice = (
            "the ranks do not agree on what comes next, which is a mistake of the program: "
            "TORCH_DISTRIBUTED_DEBUG=DETAIL finds where."
        )
    else:
        advice = f"look at the network between the nodes, and {AGAIN}."
    parts = [_silent(rank, seen[rank]) for rank in silent]
    parts += _grouped(busy)
    parts += _grouped({rank: beat for rank, beat in living.items() if beat.waits_in})
    return Standstill(since_sec, warn_after, end_after, "; ".join(parts), advice)


def describe_lost(seen: Mapping[int, RankStatus], lost: Iterable[int], reason: str) -> str:
    """Say that ranks died or hang, after a collective failed because of it."""
    lost = sorted(lost)
    parts = [_silent(rank, seen[rank]) for rank in lost]
    living = {rank: one.beat for rank, one in seen.items() if rank not in lost and one.beat}
    parts += _grouped(living)
    return (
        f"lost {name_ranks(lost)}, dead or hanging: {'; '.join(parts)} ({reason}); look at its "
        f"node and the output above, and {AGAIN}."
    )


def describe_failure(error: BaseException) -> Failure:
    """Sort an exception by what a person can do about it."""
    first = (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, ConfigError):
        return Failure(True, *str(error).rpartition("; ")[::2], exit_code=error.exit_code)
    is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if is_memory or "can't allocate memory" in first or "Cannot allocate memory" in first:
        found = re.search(r"tried to allocate ([\d.]+ \w+)", first, re.IGNORECASE)
        reason = f" (tried to allocate {found[1]})" if found else ""
        return Failure(True, f"out of memory{reason}", f"{MEMORY_ADVICE}; {AGAIN}.")
    if isinstance(error, torch.distributed.DistError) or "gloo" in first:
        return Failure(False, first.split("] ", 1)[-1].split(". ")[0])
    lines = "".join(traceback.format_exception(error)).splitlines()
    if len(lines) > MAX_TRACEBACK_LINES:
        lines = [*lines[:2], "  ...", *lines[-MAX_TRACEBACK_LINES:]]
    text, trace = f"{type(error).__name__}: {first}", "\n".join(lines) + "\n"
    return Failure(True, text, "a mistake of the program, or of its node; see above.", trace)


def place(beat: Beat) -> str:
    """Say where in the training a rank was."""
    return f"{beat.phase}, step {beat.step}" if beat.step else beat.phase


def _silent(rank: int, one: RankStatus) -> str:
    if one.beat is None:
        return f"rank {rank}: never heard of"
    return f"rank {rank}: last heard of {one.silent_sec:.0f} s ago, {place(one.beat)}"


def _grouped(beats: Mapping[int, Beat]) -> list[str]:
    """Say what ranks do or wait for, and the same thing of several of them once."""
    alike: dict[tuple[str, str, str], list[int]] = {}
    for rank, beat in beats.items():
        alike.setdefault((place(beat), beat.waits_in, beat.detail), []).append(rank)
    texts = []
    for (where, waits_in, detail), ranks in alike.items():
        what = f"waiting in {waits_in}, {where}" if waits_in else where
        longest = max(beats[rank].stuck_sec for rank in ranks)
        texts.append(
            f"{name_ranks(ranks)}: {what}, for {longest:.0f} s" + (f" ({detail})" if detail else "")
        )
    return texts


def name_ranks(ranks: Iterable[int]) -> str:
    """Write "rank 3" or "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    is_one = len(runs) == 1 and runs[0][0] == runs[0][1]
    return f"{'rank' if is_one else 'ranks'} {', '.join(texts)}"
