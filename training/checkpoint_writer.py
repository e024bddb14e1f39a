"""A checkpoint on its way from memory to the disk, beside training: complete or invisible.

Every rank writes its files by a thread of its own and says so in the job's store; no collective is
involved, so training does not wait. When all have written theirs, rank 0's thread makes the
consolidated weights out of them, then writes the manifest, gives the folder its name, and names it
in `latest`, in this order. Every rank learns how it ended.
"""

import contextlib
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

from data_tools.files import replace_file
from training.checkpoint_manifest import (
    LATEST_FILE,
    MANIFEST_FILE,
    RAW_FILE,
    CheckpointManifest,
    FileRecord,
    TrainState,
    record_of,
    step_of,
)
from training.checkpoint_snapshot import FileContents
from training.processes import collective_timeout
from training.reshard import StoredPartitions
from training.weight_files import NonFiniteWeightsError, average_file, write_weights

STORE_PREFIX = "checkpoint"
SHORTEST_POLL_SEC, LONGEST_POLL_SEC = 0.01, 0.5
THREAD_FAILED = "the thread that writes failed; see the error above"
_numbers = itertools.count()  # of the checkpoints of this process; equal on all ranks

WriteError = OSError | RuntimeError | SafetensorError | NonFiniteWeightsError


@dataclass(frozen=True)
class WritePlan:
    """Where a checkpoint goes and what is in it beside files of the ranks."""

    temporary: Path
    final: Path
    state: TrainState
    averages: list[str]  # keys of the optimizer's state
    shapes: dict[str, torch.Size]  # of whole parameters
    slot_of_expert: Tensor  # (L, E) on the host
    manifest_of: Callable[[dict[str, FileRecord]], CheckpointManifest]
    keep_last: int
    keep_every: int


class Outcome(NamedTuple):
    """How writing a checkpoint ended; the same on all ranks but for the time."""

    state: TrainState
    problem: str | None  # None = it is published
    write_sec: float


class BackgroundWrite:
    """One checkpoint being written. All ranks start it, in the same order.

    Args:
        plan: the same on all ranks.
        files: of this rank, in host memory; they are freed one by one.
        error: why the folder could not be made, on rank 0.

    Attributes:
        doing: what the thread is at.
    """

    def __init__(self, plan: WritePlan, files: FileContents, error: OSError | None) -> None:
        self.plan, self._files, self._error = plan, files, error
        self.rank, self.world_size = (
            torch.distributed.get_rank(),
            torch.distributed.get_world_size(),
        )
        self._store = torch.distributed.distributed_c10d._get_default_store()
        self._prefix = f"{STORE_PREFIX}/{next(_numbers)}"
        self._problem: str | None = THREAD_FAILED
        self.doing = ""
        self._started = self._stopped = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="checkpoint writer", daemon=True)
        self._thread.start()

    def is_done(self) -> bool:
        """Tell whether `outcome` returns at once."""
        return not self._thread.is_alive()

    def outcome(self) -> Outcome:
        """Wait until the checkpoint is published, or cannot be."""
        self._thread.join()
        return Outcome(self.plan.state, self._problem, self._stopped - self._started)

    def _run(self) -> None:
        try:
            self._problem = self._write()
        except RuntimeError as err:  # the store: it goes down with its rank, as does the job
            self._problem = f"the ranks have lost each other ({str(err).splitlines()[0]})"
        self._stopped = time.monotonic()

    def _write(self) -> str | None:
        done = f"{self._prefix}/done"
        # Whatever happens in a thread, the others wait for what it says.
        if self.rank > 0:
            own: dict[str, Any] = {"problem": THREAD_FAILED, "files": {}}
            try:
                own = self._write_own_files()
            finally:
                self._store.set(f"{self._prefix}/{self.rank}", json.dumps(own))
            self._wait(done, None)
            return json.loads(self._store.get(done))
        outcome: str | None = THREAD_FAILED
        try:
            problem, files = self._collect(self._write_own_files())
            outcome = self._complete(files) if problem is None else problem
        finally:
            if outcome is not None:
                shutil.rmtree(self.plan.temporary, ignore_errors=True)
            self._store.set(done, json.dumps(outcome))
        return outcome

    def _complete(self, files: dict[str, FileRecord]) -> str | None:
        try:
            self._consolidate(files)
            self._publish(files)
        except WriteError as err:
            return describe_write_error(err)
        return None

    def _write_own_files(self) -> dict[str, Any]:
        """Write this rank's files; return its problem and their records, ready for JSON."""
        records: dict[str, FileRecord] = {}
        error: WriteError | None = self._error
        while self._files:
            name, content = self._files.pop()
            if error is not None:
                continue
            path = self.plan.temporary / name
            self.doing = f"writing {path}"
            try:
                with path.open("wb") as file:
                    torch.save(content, file)
                    file.flush()
                    os.fsync(file.fileno())
                records[name] = record_of(path)
            except (OSError, RuntimeError) as err:  # torch's zip writer reports ENOSPC as Runtime
                error = err
            del content
        return {
            "problem": None if error is None else describe_write_error(error),
            "files": {name: asdict(record) for name, record in records.items()},
        }

    def _collect(self, own: dict[str, Any]) -> tuple[str | None, dict[str, FileRecord]]:
        """Wait for what every rank wrote: a listing may lag behind on a network file system."""
        parts, limit = [own], collective_timeout().total_seconds()
        for rank in range(1, self.world_size):
            key = f"{self._prefix}/{rank}"
            if not self._wait(key, limit):
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
            if limit_sec is not None and time.monotonic() - started > limit_sec:
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
            source = key if key in stored.keys() else None  # noqa: SIM118
            weights = {
                name: stored.whole(name, source, shape, plan.slot_of_expert)
                for name, shape in plan.shapes.items()
            }
            path = plan.temporary / (RAW_FILE if key is None else average_file(key))
            self.doing = f"writing {path}"
            write_weights(path, weights)
            files[path.name] = record_of(path)

    def _publish(self, files: dict[str, FileRecord]) -> None:
        plan = self.plan
        self.doing = f"publishing {plan.final}"
        text = json.dumps(asdict(plan.manifest_of(files)), indent=1)
        _write_durably(plan.temporary / MANIFEST_FILE, text)
        _sync(plan.temporary)
        if plan.final.exists():  # of a line that was left, or damaged
            shutil.rmtree(plan.final)
        os.rename(plan.temporary, plan.final)
        _sync(plan.final.parent)
        name_latest(plan.final)
        prune(plan.final, plan.keep_last, plan.keep_every)


def prune(newest: Path, keep_last: int, keep_every: int) -> None:
    """Delete the checkpoints that are not to be kept.

    Later ones are of a line that was left by resuming from an older one: they do not push out this
    line's, and are overwritten when their step is reached.

    Args:
        newest: the checkpoint that `latest` names.
        keep_last: newest ones to keep.
        keep_every: keep those of multiples of this number of steps, too; 0 = none.
    """
    complete = sorted(path for path in newest.parent.glob("step-*") if path.name <= newest.name)
    for old in complete[:-keep_last]:
        if not (keep_every and step_of(old.name) % keep_every == 0):
            shutil.rmtree(old, ignore_errors=True)  # what is left is tried again next time


def name_latest(folder: Path) -> None:
    """Make a complete checkpoint the one that everybody finds."""
    _write_durably(folder.parent / LATEST_FILE, folder.name + "\n")
    _sync(folder.parent)


def describe_write_error(error: Exception) -> str:
    """Say what went wrong and what to do."""
    if isinstance(error, NonFiniteWeightsError):
        return f"{error}; lower --lr, raise --warmup-steps or set --gradient-clipping"
    return f"{describe_disk_error(error)}; free some space or choose another --run-dir"


def describe_disk_error(error: Exception) -> str:
    """Return one line; what the system said, where torch's zip writer hides it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror + (f" ({cause.filename})" if cause.filename else "")
        cause = cause.__context__
    return (str(error) or type(error).__name__).splitlines()[0]


def _sync(path: Path) -> None:
    """Make a folder's entries survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_durably(path: Path, text: str) -> None:
    """Replace a small file so that a reader sees the old one or the new one."""
    replace_file(path, lambda file: file.write(text.encode("ascii")))
