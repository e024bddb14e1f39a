"""Checkpoints: complete or invisible.

A checkpoint is DeepSpeed's own files plus consolidated weights, written under a temporary name,
then described by a manifest, renamed, and named by `latest`, in this order.
"""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from data_tools.files import replace_file
from data_tools.order import ORDER_VERSION
from training.checkpoint_manifest import (
    CHECKPOINT_DIR,
    LATEST_FILE,
    MANIFEST_FILE,
    RAW_FILE,
    CheckpointManifest,
    FileRecord,
    Layout,
    TrainState,
    record_of,
    tag_of,
)
from training.objective import Objective
from training.processes import agreed_message
from training.rebalance import ExpertPlacement
from training.reshard import (
    ENTRY,
    StoredPartitions,
    describe_partitions,
    holds_optimizer_state,
    load_resharded,
)
from training.weight_files import NonFiniteWeightsError, average_file, write_weights
from training.weights import base_optimizer, consolidated_weights

TEMPORARY_PREFIX = ".tmp-"


def _recording_engine(partitions: dict[str, Any]) -> Any:
    """Build DeepSpeed's plain checkpoint writer, durable and without exceptions on one rank alone.

    A writer that raised on one rank would leave the others in a barrier; the error is kept and
    all ranks agree on it after DeepSpeed is done.

    Args:
        partitions: what a file with optimizer state is to say beside DeepSpeed's own entries.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    class RecordingCheckpointEngine(TorchCheckpointEngine):
        def __init__(self) -> None:
            super().__init__()
            self.error: OSError | RuntimeError | None = None
            self.files: dict[str, FileRecord] = {}  # written by this rank

        def save(self, state_dict: dict[str, Any], path: str) -> None:
            if holds_optimizer_state(state_dict):
                state_dict = state_dict | {ENTRY: partitions}
            try:
                with open(path, "wb") as file:
                    torch.save(state_dict, file)
                    file.flush()
                    os.fsync(file.fileno())
                self.files[os.path.basename(path)] = record_of(Path(path))
            except (OSError, RuntimeError) as err:  # torch's zip writer reports ENOSPC as Runtime
                self.error = err

    return RecordingCheckpointEngine()


class Checkpointer:
    """Save and load the checkpoints of one run.

    Args:
        engine: the DeepSpeed engine.
        run_dir: the run's directory.
        layout: of this job.
        data_hash: of the data set's manifest.
        keep_last: newest checkpoints to keep.
        objective: has a small state of its own, equal on all ranks.
        placement: likewise.
    """

    def __init__(
        self,
        engine: Any,
        run_dir: Path,
        layout: Layout,
        data_hash: str,
        keep_last: int,
        objective: Objective,
        placement: ExpertPlacement,
    ) -> None:
        self.engine, self.layout, self.data_hash = engine, layout, data_hash
        self.objective, self.placement = objective, placement
        self.folder, self.keep_last = run_dir / CHECKPOINT_DIR, keep_last
        self.is_main = torch.distributed.get_rank() == 0
        # DeepSpeed copies two scripts beside the tags that cannot read experts.
        engine._copy_recovery_script = lambda save_path: None

    def save(self, state: TrainState) -> str | None:
        """Write and publish a checkpoint. All ranks must call this.

        Returns:
            None, or why it could not be written; then nothing of it is left and the checkpoint
            before it stays the newest.
        """
        tag = tag_of(state.step)
        temporary = self.folder / f"{TEMPORARY_PREFIX}{tag}"
        message = _agreed_error(self._prepare(temporary))
        if message is not None:
            return message
        client_state = asdict(state) | {
            "objective": self.objective.state(),
            "placement": self.placement.state(),
        }
        writer = _recording_engine(describe_partitions(self.engine, client_state))
        previous, self.engine.checkpoint_engine = self.engine.checkpoint_engine, writer
        self.engine.save_checkpoint(
            str(self.folder), tag=temporary.name, client_state=client_state, save_latest=False
        )
        self.engine.checkpoint_engine = previous
        # Gathering weights is collective: all ranks go there, or none.
        message = _agreed_error(writer.error)
        if message is None:
            message = _agreed_error(self._save_consolidated(temporary, writer.files))
        if message is None:
            files = _merged(writer.files)
            error = self._publish(temporary, tag, state, files) if self.is_main else None
            message = _agreed_error(error)
        if message is not None and self.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        return message

    def _prepare(self, temporary: Path) -> OSError | None:
        if not self.is_main:
            return None
        for stale in self.folder.glob(f"{TEMPORARY_PREFIX}*"):
            shutil.rmtree(stale, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
        except OSError as err:
            return err
        return None

    def _save_consolidated(
        self, temporary: Path, files: dict[str, FileRecord]
    ) -> OSError | SafetensorError | NonFiniteWeightsError | None:
        error = None
        for key in (*base_optimizer(self.engine).profiles, None):
            weights = consolidated_weights(self.engine, key)
            if not self.is_main or error is not None:
                continue
            path = temporary / (RAW_FILE if key is None else average_file(key))
            try:
                write_weights(path, weights)
                files[path.name] = record_of(path)
            except (OSError, SafetensorError, NonFiniteWeightsError) as err:
                error = err
        return error

    def _publish(
        self, temporary: Path, tag: str, state: TrainState, files: dict[str, FileRecord]
    ) -> OSError | None:
        manifest = CheckpointManifest(tag, state, self.layout, self.data_hash, ORDER_VERSION, files)
        try:
            _write_durably(temporary / MANIFEST_FILE, json.dumps(asdict(manifest), indent=1))
            final = self.folder / tag
            if final.exists():  # saved before, then trained on without publishing anything newer
                shutil.rmtree(final)
            os.rename(temporary, final)
            _write_durably(self.folder / LATEST_FILE, tag + "\n")
            _sync(self.folder)
        except OSError as err:
            return err
        self._prune(tag)
        return None

    def _prune(self, newest: str) -> None:
        # Later ones are of a line that was left by resuming from an older one: they do not push
        # out this line's, and are overwritten when their step is reached.
        complete = sorted(p for p in self.folder.glob("step-*") if p.name <= newest)
        for old in complete[: -self.keep_last]:
            shutil.rmtree(old, ignore_errors=True)  # published all the same; tried again next time

    def load(self, folder: Path, manifest: CheckpointManifest) -> TrainState:
        """Load a checkpoint whose files match its manifest. All ranks must call this."""
        if manifest.layout == self.layout:
            path, client_state = self.engine.load_checkpoint(str(folder.parent), tag=folder.name)
            assert path is not None, f"DeepSpeed loaded nothing from {folder}"
            # The placement first: it makes the objective forget how timesteps are dealt.
            self.placement.load_state(client_state["placement"])
        else:
            client_state = self._load_other_layout(folder, manifest)
        self.objective.load_state(client_state["objective"])
        fields = TrainState.__dataclass_fields__
        return TrainState(**{name: client_state[name] for name in fields})

    def _load_other_layout(self, folder: Path, manifest: CheckpointManifest) -> dict[str, Any]:
        stored = StoredPartitions(folder, manifest)
        client_state = stored.client_state
        source = target = self.placement.slots_of(client_state["placement"])
        if manifest.layout.expert_parallel_size == self.layout.expert_parallel_size:
            self.placement.load_state(client_state["placement"])
        else:
            # A place among other ranks means nothing here: experts start as in a new engine, and
            # timesteps are dealt anew.
            target = self.placement.slots_of({})
            client_state["objective"].pop("served_at_home", None)
        load_resharded(self.engine, stored, source, target)
        return client_state


def _merged(files: dict[str, FileRecord]) -> dict[str, FileRecord]:
    """Put together what every rank wrote: a listing may lag behind on a network file system."""
    parts: list[dict[str, FileRecord]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(parts, files)
    return {name: record for part in parts for name, record in sorted(part.items())}


def _agreed_error(error: Exception | None) -> str | None:
    if error is None:
        return agreed_message(None)
    if isinstance(error, NonFiniteWeightsError):
        advice = "lower --lr, raise --warmup-steps or set --gradient-clipping"
    else:
        advice = "free some space or choose another --run-dir"
    return agreed_message(f"{describe_disk_error(error)}; {advice}")


def describe_disk_error(error: Exception) -> str:
    """Return one line; what the system said, where torch's zip writer hides it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror + (f" ({cause.filename})" if cause.filename else "")
        cause = cause.__context__
    return (str(error) or type(error).__name__).splitlines()[0]


def _sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_durably(path: Path, text: str) -> None:
    """Replace a small file so that a reader sees the old one or the new one."""
    replace_file(path, lambda file: file.write(text.encode("ascii")))
