"""Watch all ranks: say why training does not move, and end the job with one report.

On every rank a thread writes a heartbeat into the job's store each second, and asks whether the job
is to end. Rank 0 reads the other ranks' heartbeats only when it has not moved for long. Then it
says which ranks wait for which, and ends all of them when COLLECTIVE_TIMEOUT_SEC is over. A rank
that fails stores its failure and waits until rank 0 ends the job, so that there is one report even
if many ranks fail. If rank 0 does not answer, the last rank does its part: with several nodes, that
one is on another node.
"""

import contextlib
import json
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Self

import torch

from data_tools.exit_codes import CRASH_EXIT_CODE
from data_tools.process.leaving import leave, say
from training.ranks.agreement import RunError
from training.ranks.diagnosis import (
    AGAIN,
    Failure,
    RankStatus,
    describe_failure,
    describe_lost,
    describe_standstill,
    name_ranks,
    place,
)
from training.ranks.heartbeat import LONGEST_END_AFTER, Beat, Heartbeat
from training.ranks.process_group import TIMEOUT_VARIABLE, Ranks, collective_timeout

BEAT_SEC = 1.0
ALARMED_BEAT_SEC = 0.2
SILENT_SEC = 5.0  # a rank that did not beat for so long does not answer
SAME_FAILURE_SEC = 1.0  # to wait for other ranks with the same failure
DEPUTY_SEC = 3.0  # that the last rank waits longer than rank 0 would
LEAVING_SEC = 3.0  # for the other ranks to read that the job ends
ORPHAN_SEC = 20.0  # after a failure, until a rank that nobody ends leaves by itself
WATCH_AFTER = 0.1  # of COLLECTIVE_TIMEOUT_SEC without a move: then all beats are read
SPARE_SEC = 60.0
PREFIX = "watchdog"
STATE, LEFT = f"{PREFIX}/state", f"{PREFIX}/left"
END = 1 << 20  # in STATE, times one more than an exit code: all ranks leave with it


def limit_all_groups() -> None:
    """Give every process group more time than the watchdog, whose report says more than torch's.

    All ranks must call this when all groups exist. DeepSpeed's groups have torch's half an hour.
    """
    longest = LONGEST_END_AFTER * collective_timeout() + timedelta(seconds=SPARE_SEC)
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        torch.distributed.distributed_c10d._set_pg_timeout(longest, group)


class Watchdog:
    """One rank's watchdog; a context manager around everything that all ranks do together.

    Before it is entered, it only has the heartbeat. `reporting` may be used inside.

    Args:
        ranks: this process's place.
        device: of the training.
    """

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self.heartbeat = Heartbeat(device)
        self._ranks, self._limit_sec = ranks, collective_timeout().total_seconds()
        self._last = ranks.world_size - 1
        self._may_judge = ranks.rank in (0, self._last)
        self._failure: Failure | None = None
        self._awake, self._is_closing = threading.Event(), False
        self._alarmed_at: float | None = None
        self._watched_since: float | None = None
        self._warned_sec = 0.0
        self._seen: dict[int, tuple[Beat, float]] = {}  # with when it was new
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        limit_all_groups()
        self._store = self._connect()
        self._store.set(self._key(self._ranks.rank), json.dumps(self.heartbeat.beat(False)))
        if self._ranks.rank == self._last > 0:
            # Rank 0 may be lost within its first beat, and the store with it.
            with contextlib.suppress(RuntimeError):
                self._store.wait([self._key(0)], timedelta(seconds=SILENT_SEC))
                self._read_beats([0])
        self._looked_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()
        if self._ranks.rank > 0:
            threading.Thread(target=self._guard_store, name="store guard", daemon=True).start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self._report(error)
        self._is_closing = True
        self._awake.set()
        self._thread.join()

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """End the job at once when this rank alone raises inside this context.

        RunError and SystemExit pass, because all ranks raise them alike.
        """
        try:
            yield
        except BaseException as err:
            self._report(err)
            raise

    def _report(self, error: BaseException | None) -> None:
        is_common = isinstance(error, (RunError, SystemExit, KeyboardInterrupt))
        if error is not None and not is_common:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Store an exception for rank 0 and wait until it ends the job; return if none watches."""
        if self._thread is None or not self._thread.is_alive():
            return
        self._failure = describe_failure(error)
        self._awake.set()
        self._thread.join()

    def _connect(self) -> torch.distributed.Store:
        """Return a connection for this thread alone: its calls may block for ever."""
        return torch.distributed.distributed_c10d._get_default_store().clone()

    def _key(self, rank: int, of_failure: bool = False) -> str:
        return f"{PREFIX}/{'failure' if of_failure else 'beat'}/{rank}"

    def _run(self) -> None:
        told = False
        while not self._is_closing:
            try:
                if self._failure is not None and not told:
                    key = self._key(self._ranks.rank, of_failure=True)
                    self._store.set(key, json.dumps(self._failure))
                    self._store.add(STATE, 1)
                    told = True
                self._look()
                self._looked_at = time.monotonic()
            except RuntimeError:  # the store is lost with rank 0 or its node
                self._awake.wait(BEAT_SEC)  # the main thread may notice, and know more
                if not self._is_closing:
                    self._end_without_store("its store has closed the connection")
            self._awake.wait(BEAT_SEC if self._alarmed_at is None else ALARMED_BEAT_SEC)
            self._awake.clear()

    def _look(self) -> None:
        """Write a heartbeat, and act if something is wrong."""
        state = self._store.add(STATE, 0)
        if state >= END:
            self._store.add(LEFT, 1)
            leave(state // END - 1)
        stuck_sec = self.heartbeat.stuck_sec()
        is_stuck = stuck_sec > WATCH_AFTER * self._limit_sec
        beat = self.heartbeat.beat(is_stuck or state > 0)
        self._store.set(self._key(self._ranks.rank), json.dumps(beat))
        now = time.monotonic()
        if state > 0 and self._alarmed_at is None:
            self._alarmed_at, self._seen = now, {}
        if self._alarmed_at is not None:
            if self._may_judge:
                self._judge_failures(now - self._alarmed_at)
            elif now - self._alarmed_at > ORPHAN_SEC:
                leave(CRASH_EXIT_CODE)
        elif self._may_judge:
            if self._ranks.rank > 0:
                self._read_beats([0])  # to know where it was, should its store go down
            self._watched_since = (self._watched_since or now) if is_stuck else None
            if self._watched_since is not None:
                self._judge_standstill(now - self._watched_since)
            elif self._warned_sec:
                self._say(f"training moves again after more than {self._warned_sec:.0f} s")
                self._warned_sec = 0.0

    def _read_beats(self, ranks: Iterable[int]) -> dict[int, RankStatus]:
        """Read the last heartbeats of ranks, and for how long each has been the last."""
        known = [rank for rank in ranks if self._store.check([self._key(rank)])]
        texts = self._store.multi_get([self._key(rank) for rank in known])
        now, seen = time.monotonic(), {rank: RankStatus(None) for rank in ranks}
        for rank, text in zip(known, texts, strict=True):
            beat = Beat(*json.loads(text))
            before = self._seen.get(rank)
            if before is None or before[0].number != beat.number:
                before = self._seen[rank] = (beat, now)
            silent_sec = now - before[1]
            seen[rank] = RankStatus(beat, silent_sec if silent_sec > SILENT_SEC else 0.0)
        return seen

    def _is_mine(self, seen: dict[int, RankStatus]) -> bool:
        """Tell whether this rank speaks for all."""
        return self._ranks.rank == 0 or seen[0].beat is None or bool(seen[0].silent_sec)

    def _judge_failures(self, alarmed_sec: float) -> None:
        seen, failures = self._read_beats(range(self._last + 1)), {}
        for rank in seen:
            if self._store.check([self._key(rank, of_failure=True)]):
                text = self._store.get(self._key(rank, of_failure=True))
                failures[rank] = Failure(*json.loads(text))
        causes = {rank: failure for rank, failure in failures.items() if failure.is_cause}
        patience = SAME_FAILURE_SEC if causes else SILENT_SEC + 2 * ALARMED_BEAT_SEC
        if self._ranks.rank > 0:
            patience = max(patience, SILENT_SEC) + DEPUTY_SEC
        if alarmed_sec < patience or not self._is_mine(seen):
            return
        if causes:
            first = min(causes)
            same = [rank for rank, failure in causes.items() if failure.text == causes[first].text]
            self._end(_report_causes(same, seen[first].beat, causes[first]), causes[first], seen)
        reason = next(iter(failures.values())).text
        lost = [rank for rank, one in seen.items() if one.silent_sec or one.beat is None]
        if lost:
            self._end(describe_lost(seen, lost, reason), Failure(False, reason), seen)
        where = describe_standstill(seen).text
        self._end(
            f"a collective failed although every rank answers ({reason}): {where}; look at the "
            f"network between the nodes, and {AGAIN}.",
            Failure(False, reason),
            seen,
        )

    def _judge_standstill(self, watched_sec: float) -> None:
        seen = self._read_beats(range(self._last + 1))
        found = describe_standstill(seen)
        if watched_sec < SILENT_SEC + 2 * BEAT_SEC or not self._is_mine(seen) or found is None:
            return
        what = f"training has not moved for {found.since_sec:.0f} s: {found.text}"
        limit_sec = found.end_after * self._limit_sec
        if found.since_sec > limit_sec:
            limit = f"{found.end_after:.0f} x {TIMEOUT_VARIABLE} = {limit_sec:.0f} s"
            self._end(f"{what}; the limit is {limit}; {found.advice}", Failure(False, what), seen)
        due_sec = 2 * self._warned_sec or found.warn_after * self._limit_sec
        if found.since_sec > due_sec:
            self._warned_sec = found.since_sec
            self._say(what)

    def _guard_store(self) -> None:
        """End this rank if the store, which is in rank 0's process, does not answer."""
        looked_at, waited_sec = 0.0, 0.0
        while not self._is_closing:
            # Counted by this thread: a job that was suspended as a whole has lost no rank.
            waited_sec = waited_sec + BEAT_SEC if looked_at == self._looked_at else 0.0
            looked_at = self._looked_at
            stuck_sec = self.heartbeat.stuck_sec()
            is_lost = self._failure is not None or stuck_sec > self.heartbeat.limit(self._limit_sec)
            if waited_sec > SILENT_SEC and is_lost:
                self._end_without_store(f"this rank has not moved for {stuck_sec:.0f} s")
            time.sleep(BEAT_SEC)

    def _end_without_store(self, reason: str) -> None:
        own = self.heartbeat.beat(True)
        if self._failure is not None:
            reason = self._failure.text
        if self._failure is not None and self._failure.is_cause:
            say(_report_causes([self._ranks.rank], own, self._failure) + "\n")
        elif self._ranks.rank == self._last:
            beat, since = self._seen.get(0, (None, 0.0))
            seen = {
                0: RankStatus(beat, time.monotonic() - since),
                self._ranks.rank: RankStatus(own),
            }
            self._say(describe_lost(seen, [0], reason), "error")
        else:
            time.sleep(LEAVING_SEC)  # the first that leaves has the launcher end the others
        leave(CRASH_EXIT_CODE)

    def _say(self, text: str, kind: str = "warning") -> None:
        say(f"{kind}: [rank {self._ranks.rank}] {text}\n")

    def _end(self, text: str, failure: Failure, seen: dict[int, RankStatus]) -> None:
        """Report, and end all ranks; do not wait for the silent ones."""
        say(f"{failure.trace}error: [rank {self._ranks.rank}] {text}\n")
        if self._store.add(STATE, 0) < END:  # else another one has spoken
            self._store.add(STATE, END * (1 + failure.exit_code))
        deadline = time.monotonic() + LEAVING_SEC
        num_others = self._last - sum(bool(one.silent_sec) for one in seen.values())
        while self._store.add(LEFT, 0) < num_others and time.monotonic() < deadline:
            time.sleep(ALARMED_BEAT_SEC / 4)
        leave(failure.exit_code)


def _report_causes(ranks: list[int], beat: Beat | None, failure: Failure) -> str:
    where = "" if beat is None else f", {place(beat)}"
    return f"{name_ranks(ranks)}{where}: {failure.text}; {failure.advice}"
