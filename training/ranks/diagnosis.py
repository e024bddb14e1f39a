"""Who waits for whom: sentences about ranks, from what they last said of themselves."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from training.ranks.heartbeat import PHASES, STARTING, Beat

AGAIN = "run the same command again: it continues from the last checkpoint"


class Seen(NamedTuple):
    """What is known of a rank.

    Attributes:
        beat: its last one; None if it never said anything.
        silent_sec: since then, if that is too long; 0 = it answers.
    """

    beat: Beat | None
    silent_sec: float = 0.0


class Standstill(NamedTuple):
    """A job in which nobody moves.

    Attributes:
        since_sec: how long, by the rank that moved last.
        warn_after, end_after: in multiples of COLLECTIVE_TIMEOUT_SEC.
        text: who waits for whom.
        advice: what to do.
    """

    since_sec: float
    warn_after: float
    end_after: float
    text: str
    advice: str


def describe_standstill(seen: Mapping[int, Seen]) -> Standstill | None:
    """Judge what is known of all ranks; None if none of them answers."""
    living = {rank: one.beat for rank, one in seen.items() if one.beat and not one.silent_sec}
    if not living:
        return None
    silent = sorted(seen.keys() - living.keys())
    busy = {rank: beat for rank, beat in living.items() if not beat.waits_in}
    since_sec = min(beat.stuck_sec for beat in living.values())
    phases = [PHASES[beat.phase] for beat in (busy or living).values()]
    # Of a phase as a whole: in some, ranks meet in many short collectives.
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


def describe_lost(seen: Mapping[int, Seen], lost: Iterable[int], reason: str) -> str:
    """Say that ranks died or hang, after a collective failed because of it."""
    lost = sorted(lost)
    parts = [_silent(rank, seen[rank]) for rank in lost]
    living = {rank: one.beat for rank, one in seen.items() if rank not in lost and one.beat}
    parts += _grouped(living)
    return (
        f"lost {name_ranks(lost)}, dead or hanging: {'; '.join(parts)} ({reason}); look at its "
        f"node and the output above, and {AGAIN}."
    )


def place(beat: Beat) -> str:
    """Say where in the training a rank was."""
    return f"{beat.phase}, step {beat.step}" if beat.step else beat.phase


def _silent(rank: int, one: Seen) -> str:
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
