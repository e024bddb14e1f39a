"""Write a checkpoint from host memory to the disk beside training: complete or not at all.

A thread of every rank writes its files and says so in the job's store; no collective is involved,
so training does not wait. When all have written theirs, rank 0's thread makes the
consolidated weights out of them, then writes the manifest, gives the folder its name, and names it
in `latest`, in this order. Every rank learns how it ended.
"""

import contextlib
import errno
import io
import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from training.checkpoints.host_copy import FileContents
from training.checkpoints.manifest import (
    RAW_FILE,
    CheckpointManifest,
    FileRecord,
    TrainState,
    manifest_text,
    record_of,
)
from training.checkpoints.other_layout import StoredPartitions
from training.checkpoints.publishing import (
    CheckpointError,
    TakenOverError,
    is_taken_over,
    prune,
    publish,
)
from training.checkpoints.weight_files import (
    NonFiniteWeightsError,
    average_file,
    describe_disk_error,
    write_weights,
)
from training.ranks.agreement import RunError
from training.ranks.heartbeat import LONGEST_END_AFTER
from training.ranks.process_group import collective_timeout

STORE_PREFIX = "checkpoint"
SHORTEST_POLL_SEC, LONGEST_POLL_SEC = 0.01, 0.5
OWN_SIGNAL_POLL_SEC = 0.05  # how soon a write notices that it should be given up
OTHERS_SIGNAL_POLL_SEC = 0.25  # of that on another rank: to ask costs a round trip
BLOCK_BYTES = 16 << 20  # written between two looks at whether to give up
THREAD_FAILED = "the thread that writes failed; see the error above"
GIVEN_UP = "given up for the later one that a signal asks for"
_numbers = itertools.count()  # of the checkpoints of this process; equal on all ranks

# Of writing weights; torch's zip writer reports ENOSPC as RuntimeError.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError, NonFiniteWeightsError)


@dataclass(frozen=True)
class WritePlan:
    """Where a checkpoint goes and what is in it beside files of the ranks."""

    staging: Path  # of this job
    final: Path
    state: TrainState
    averages: list[str]  # keys of the optimizer's state
    shapes: dict[str, torch.Size]  # of whole parameters
    slot_of_expert: Tensor  # (L, E) on the host
    manifest_of: Callable[[dict[str, FileRecord]], CheckpointManifest]
    keep_last: int
    keep_every: int

    @property
    def temporary(self) -> Path:
        """Where the checkpoint is written."""
        return self.staging / self.final.name


class Outcome(NamedTuple):
    """How writing a checkpoint ended; the same on all ranks but for the time."""

    state: TrainState
    problem: str | None  # None = it is published
    write_sec: float
    is_taken_over: bool = False  # nothing can be published any more

    def error(self) -> RunError:
        """Say why a run ends whose last checkpoint this is."""
        if self.is_taken_over:
            return TakenOverError(self.problem)
        return CheckpointError(
            f"{self._sentence()}, and run the same command again: it continues from the "
            "checkpoint before."
        )

    def warning(self) -> str:
        """Say what it means for a run that goes on."""
        if self.problem == GIVEN_UP:
            return f"the checkpoint of step {self.state.step} is {GIVEN_UP}"
        return (
            f"{self._sentence()}; training goes on, the one before it is intact, the next save "
            "tries again"
        )

    def _sentence(self) -> str:
        return f"checkpoint of step {self.state.step} could not be written: {self.problem}"


class BackgroundWrite:
    """One checkpoint being written. All ranks start it, in the same order, by the same plan.

    Args:
        files: of this rank, in host memory; they are freed one by one.
        error: why the folder could not be made, on rank 0.
    """

    def __init__(self, plan: WritePlan, files: FileContents, error: OSError | None) -> None:
        self.plan, self._files, self._error = plan, files, error
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        self._store = torch.distributed.distributed_c10d._get_default_store()
        self._prefix = f"{STORE_PREFIX}/{next(_numbers)}"
        self._problem: str | None = THREAD_FAILED
        self.doing = ""  # for whoever waits for the thread
        self._is_taken_over = False
        self._is_given_up, self._asked_others = False, 0.0
        self._started = self._stopped = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="checkpoint writer", daemon=True)
        self._thread.start()

    def is_done(self) -> bool:
        """Tell whether `outcome` returns at once."""
        return not self._thread.is_alive()

    def outcome(self, is_urgent: Callable[[], bool]) -> Outcome:
        """Wait until the checkpoint is published, or cannot be.

        Args:
            is_urgent: tells that a later one cannot wait for it; it is then given up on all ranks,
                unless it is as good as published.
        """
        while self._thread.is_alive():
            if not self._is_given_up and is_urgent():
                self._is_given_up = True
                self._store.set(f"{self._prefix}/give_up", "")
            self._thread.join(OWN_SIGNAL_POLL_SEC)
        elapsed = self._stopped - self._started
        return Outcome(self.plan.state, self._problem, elapsed, self._is_taken_over)

    def _should_give_up(self) -> bool:
        """Tell whether any rank gives the write up; the other ranks learn it a little later."""
        now = time.monotonic()
        if not self._is_given_up and now - self._asked_others > OTHERS_SIGNAL_POLL_SEC:
            self._asked_others = now
            self._is_given_up = self._store.check([f"{self._prefix}/give_up"])
        return self._is_given_up

    def _run(self) -> None:
        try:
            self._problem, self._is_taken_over = self._write()
        except RuntimeError as err:  # the store: it goes down with its rank, as does the job
            self._problem = f"the ranks have lost each other ({str(err).splitlines()[0]})"
        self._stopped = time.monotonic()

    def _write(self) -> tuple[str | None, bool]:
        done = f"{self._prefix}/done"
        # Whatever happens in a thread, the others wait for what it says.
        if self.rank > 0:
            own: dict[str, Any] = {"problem": THREAD_FAILED, "files": {}}
            try:
                own = self._write_own_files()
            finally:
                self._store.set(f"{self._prefix}/{self.rank}", json.dumps(own))
            self._wait(done, None)
            return tuple(json.loads(self._store.get(done)))
        outcome: tuple[str | None, bool] = (THREAD_FAILED, False)
        try:
            problem, files = self._collect(self._write_own_files())
            problem = self._complete(files) if problem is None else problem
            outcome = (problem, False)
            if problem is not None and is_taken_over(self.plan.staging):
                run_dir = self.plan.final.parents[1]
                outcome = (
                    f"--run-dir {run_dir}: another job has taken it over, so this one ends; let "
                    "one job at a time use it.",
                    True,
                )
        finally:
            if outcome[0] is not None:
                shutil.rmtree(self.plan.temporary, ignore_errors=True)
            self._store.set(done, json.dumps(outcome))
        return outcome

    def _complete(self, files: dict[str, FileRecord]) -> str | None:
        plan = self.plan
        try:
            self._consolidate(files)
            self.doing = f"publishing {plan.final}"
            publish(plan.temporary, plan.final, manifest_text(plan.manifest_of(files)))
        except WRITE_ERRORS as err:
            return self._describe(err)
        with contextlib.suppress(OSError):  # what is published is; it is tried again next time
            prune(plan.final, plan.staging, plan.keep_last, plan.keep_every)
        return None

    def _describe(self, error: Exception) -> str:
        """Say what went wrong and what to do."""
        if self._is_given_up:
            return GIVEN_UP
        if isinstance(error, NonFiniteWeightsError):
            return f"{error}; lower --lr, raise --warmup-steps or set --gradient-clipping"
        return f"{describe_disk_error(error)}; free some space or choose another --run-dir"

    def _write_own_files(self) -> dict[str, Any]:
        """Write this rank's files; return its problem and their records, ready for JSON."""
        records: dict[str, FileRecord] = {}
        error: Exception | None = self._error
        while self._files:
            name, content = self._files.pop()
            if error is not None:
                continue
            path = self.plan.temporary / name
            self.doing = f"writing {path}"
            try:
                with io.BufferedWriter(_StoppableFile(path, self._should_give_up)) as file:
                    torch.save(content, file)
                    file.flush()
                    os.fsync(file.fileno())
                records[name] = record_of(path)
            except (OSError, RuntimeError) as err:  # torch's zip writer reports ENOSPC as Runtime
                error = err
            del content
        return {
            "problem": None if error is None else self._describe(error),
            "files": {name: asdict(record) for name, record in records.items()},
        }

    def _collect(self, own: dict[str, Any]) -> tuple[str | None, dict[str, FileRecord]]:
        """Wait for what every rank wrote: a listing may lag behind on a network file system."""
        # As long as the main thread may wait for it; that a rank lives, others see to.
        parts, limit = [own], LONGEST_END_AFTER * collective_timeout().total_seconds()
        for rank in range(1, self.world_size):
            key = f"{self._prefix}/{rank}"
            if not self._wait(key, limit):
                if self._is_given_up:
                    return GIVEN_UP, {}
                return f"rank {rank} has not written its part {limit:.0f} s after rank 0", {}
            parts.append(json.loads(self._store.get(key)))
            self._store.delete_key(key)
        problem = next((part["problem"] for part in parts if part["problem"] is not None), None)
        files = {name: FileRecord(**r) for part in parts for name, r in part["files"].items()}
        return problem, dict(sorted(files.items()))

    def _wait(self, key: str, limit_sec: float | None) -> bool:
        self.doing = f"waiting for {'rank 0' if self.rank else 'other ranks'} to write"
        started, pause = time.monotonic(), SHORTEST_POLL_SEC
        while not self._store.check([key]):
            is_late = limit_sec is not None and time.monotonic() - started > limit_sec
            if limit_sec is not None and (is_late or self._should_give_up()):
                return False
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_POLL_SEC)
        return True

    def _consolidate(self, files: dict[str, FileRecord]) -> None:
        """Write raw and averaged weights, one file after the other, from those of all ranks."""
        plan = self.plan
        stored = StoredPartitions(plan.temporary, list(files))
        for key in (*plan.averages, None):
            # The average of no steps is the start.
            source = key if stored.has_states else None
            weights = {}
            for name, shape in plan.shapes.items():
                if self._should_give_up():
                    raise OSError(errno.ECANCELED, GIVEN_UP)
                weights[name] = stored.whole(name, source, shape, plan.slot_of_expert)
            path = plan.temporary / (RAW_FILE if key is None else average_file(key))
            self.doing = f"writing {path}"
            write_weights(path, weights)
            files[path.name] = record_of(path)


class _StoppableFile(io.FileIO):
    """A file that refuses to be written to when its checkpoint is given up."""

    def __init__(self, path: Path, should_stop: Callable[[], bool]) -> None:
        super().__init__(path, "wb")
        self._should_stop = should_stop

    def write(self, data: Any) -> int:
        """Write a part; the buffer around this file calls again for the rest."""
        if self._should_stop():
            raise OSError(errno.ECANCELED, GIVEN_UP)
        return super().write(memoryview(data)[:BLOCK_BYTES])
