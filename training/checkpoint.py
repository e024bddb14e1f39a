"""Checkpoints: complete or invisible.

A checkpoint is DeepSpeed's own files plus consolidated weights, written under a temporary name,
then described by a manifest, renamed, and named by `latest`, in this order. DeepSpeed itself loads
a changed expert-parallel size as silent garbage, so the manifest is compared before it loads.

    checkpoints/latest                    the newest complete step, one line
    checkpoints/step-0001000/             DeepSpeed's files
                     ema.safetensors      averaged weights, fp32, experts in global order
                     weights.safetensors  raw weights, likewise
                     manifest.json        files with sizes and sha256, layout, progress
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from data_tools.errors import CONFIG_ERROR_EXIT_CODE, ConfigError
from data_tools.shards import MalformedError, from_json
from training.ema import consolidated_weights
from training.processes import RunError, agreed_message

CHECKPOINT_DIR = "checkpoints"
LATEST_FILE = "latest"
MANIFEST_FILE = "manifest.json"
EMA_FILE = "ema.safetensors"
RAW_FILE = "weights.safetensors"
TEMPORARY_PREFIX = ".tmp-"
HASH_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class TrainState:
    """What resuming needs beside tensors."""

    step: int = 0  # optimizer steps done
    samples_consumed: int = 0  # stream position of the next sample


@dataclass(frozen=True)
class Layout:
    """How a checkpoint's tensors are spread; DeepSpeed's files load into no other."""

    world_size: int
    expert_parallel_size: int
    zero_stage: int
    precision: str  # "bf16", "autocast" or "fp32"


# What a user changes to get a layout's value back.
LAYOUT_OWNERS = {
    "world_size": "the number of ranks",
    "expert_parallel_size": "--expert-parallel-size",
    "zero_stage": "zero_optimization.stage of the --deepspeed file",
    "precision": "the precision of the --deepspeed file",
}


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class CheckpointManifest:
    """What `manifest.json` says of a complete checkpoint."""

    tag: str
    state: TrainState
    layout: Layout
    data_hash: str  # of the data set's manifest
    files: dict[str, FileRecord]  # by name


class DamagedCheckpointError(RunError):
    """A file of the checkpoint to resume from does not match its checksum."""

    exit_code = CONFIG_ERROR_EXIT_CODE


def tag_of(step: int) -> str:
    """Name the checkpoint of a step so that names sort like steps."""
    return f"step-{step:07d}"


def read_manifest(folder: Path) -> CheckpointManifest:
    """Read a checkpoint's manifest and check that its files are there in their sizes."""
    path = folder / MANIFEST_FILE
    try:
        manifest: CheckpointManifest = from_json(CheckpointManifest, json.loads(path.read_bytes()))
    except FileNotFoundError as err:
        raise ConfigError(
            f"{folder}: no {MANIFEST_FILE}, so this is not a complete checkpoint; "
            f"{_use_older(folder)}"
        ) from err
    except (ValueError, MalformedError) as err:
        raise ConfigError(
            f"{path} is not a checkpoint manifest ({err}); {_use_older(folder)}"
        ) from err
    for name, record in manifest.files.items():
        file = folder / name
        size = file.stat().st_size if file.exists() else None
        if size != record.bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            raise ConfigError(
                f"{file} {found}, its {MANIFEST_FILE} says {record.bytes} bytes; "
                f"{_use_older(folder)}"
            )
    return manifest


def _use_older(folder: Path) -> str:
    return (
        f"delete {folder} and write the name of an older checkpoint into "
        f"{folder.parent / LATEST_FILE}."
    )


def verify_file(manifest: CheckpointManifest, path: Path) -> None:
    """Compare a file with the checksum in its checkpoint's manifest before it is read."""
    record = manifest.files.get(path.name)
    if record is None or _sha256(path) != record.sha256:
        raise ConfigError(
            f"{path} does not match the checksum in its {MANIFEST_FILE}; {_use_older(path.parent)}"
        )


def verify_together(manifest: CheckpointManifest, folder: Path) -> None:
    """Compare all files with their checksums, shared among the ranks. All ranks must call this.

    Raises:
        DamagedCheckpointError: on all ranks, naming the first file that differs.
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    error = None
    try:
        for name in sorted(manifest.files)[rank::world_size]:
            verify_file(manifest, folder / name)
    except ConfigError as err:
        error = err
    message = _agreed_error(error)
    if message is not None:
        raise DamagedCheckpointError(message)


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Return the folder that `latest` names, None before the first checkpoint."""
    pointer = run_dir / CHECKPOINT_DIR / LATEST_FILE
    if not pointer.exists():
        return None
    name = pointer.read_text(encoding="ascii", errors="replace").strip()
    folders = {path.name: path for path in pointer.parent.glob("step-*")}
    if name not in folders:
        raise ConfigError(
            f"{pointer} names {name!r}, which is no checkpoint in {pointer.parent}; write the name "
            "of one that exists into it, or delete it to start afresh."
        )
    return folders[name]


def check_resumable(manifest: CheckpointManifest, layout: Layout, data_hash: str) -> None:
    """Refuse to resume on another layout or another data set."""
    for name, saved in asdict(manifest.layout).items():
        current = asdict(layout)[name]
        if saved != current:
            raise ConfigError(
                f"--run-dir: its checkpoint {manifest.tag} was saved with {name} {saved}, this "
                f"command has {current}; change {LAYOUT_OWNERS[name]} back to {saved}, or start "
                "another --run-dir."
            )
    if manifest.data_hash != data_hash:
        raise ConfigError(
            f"--data: checkpoint {manifest.tag} of the --run-dir was trained on the data set whose "
            f"dataset.json has sha256 {manifest.data_hash[:12]}, this one has {data_hash[:12]}; "
            "give the original --data, or start another --run-dir."
        )


def _recording_engine() -> Any:
    """Build DeepSpeed's plain checkpoint writer, durable and without exceptions on one rank alone.

    A writer that raised on one rank would leave the others in a barrier; the error is kept and
    all ranks agree on it after DeepSpeed is done.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    class RecordingCheckpointEngine(TorchCheckpointEngine):
        def __init__(self) -> None:
            super().__init__()
            self.error: OSError | RuntimeError | None = None

        def save(self, state_dict: dict[str, Any], path: str) -> None:
            try:
                with open(path, "wb") as file:
                    torch.save(state_dict, file)
                    file.flush()
                    os.fsync(file.fileno())
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
    """

    def __init__(
        self, engine: Any, run_dir: Path, layout: Layout, data_hash: str, keep_last: int
    ) -> None:
        self.engine, self.layout, self.data_hash = engine, layout, data_hash
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
        writer = _recording_engine()
        previous, self.engine.checkpoint_engine = self.engine.checkpoint_engine, writer
        self.engine.save_checkpoint(
            str(self.folder), tag=temporary.name, client_state=asdict(state), save_latest=False
        )
        self.engine.checkpoint_engine = previous
        error = writer.error or self._save_consolidated(temporary)
        message = _agreed_error(error)
        if message is None:
            message = _agreed_error(self._publish(temporary, tag, state) if self.is_main else None)
        if message is not None and self.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        return message

    def _prepare(self, temporary: Path) -> OSError | None:
        if not self.is_main:
            return None
        try:
            for stale in self.folder.glob(f"{TEMPORARY_PREFIX}*"):
                shutil.rmtree(stale)
            temporary.mkdir(parents=True)
        except OSError as err:
            return err
        return None

    def _save_consolidated(self, temporary: Path) -> OSError | SafetensorError | None:
        error = None
        for name, ema in ((EMA_FILE, True), (RAW_FILE, False)):
            weights = consolidated_weights(self.engine, ema=ema)
            if self.is_main and error is None:
                try:
                    save_file(weights, temporary / name)
                except (OSError, SafetensorError) as err:
                    error = err
        return error

    def _publish(self, temporary: Path, tag: str, state: TrainState) -> OSError | None:
        try:
            files = {
                path.name: FileRecord(path.stat().st_size, _sha256(path))
                for path in sorted(temporary.iterdir())
            }
            manifest = CheckpointManifest(tag, state, self.layout, self.data_hash, files)
            _write_durably(temporary / MANIFEST_FILE, json.dumps(asdict(manifest), indent=1))
            final = self.folder / tag
            if final.exists():  # saved before, then trained on without publishing anything newer
                shutil.rmtree(final)
            os.rename(temporary, final)
            _write_durably(self.folder / LATEST_FILE, tag + "\n")
            self._prune(tag)
        except OSError as err:
            return err
        return None

    def _prune(self, newest: str) -> None:
        # Later ones are of a line that was left by resuming from an older one: they do not push
        # out this line's, and are overwritten when their step is reached.
        complete = sorted(p for p in self.folder.glob("step-*") if p.name <= newest)
        for old in complete[: -self.keep_last]:
            shutil.rmtree(old)

    def load(self, folder: Path) -> TrainState:
        """Load a checkpoint whose manifest was checked. All ranks must call this."""
        path, client_state = self.engine.load_checkpoint(str(folder.parent), tag=folder.name)
        assert path is not None, f"DeepSpeed loaded nothing from {folder}"
        fields = TrainState.__dataclass_fields__
        return TrainState(**{name: client_state[name] for name in fields})


def _agreed_error(error: Exception | None) -> str | None:
    return agreed_message(None if error is None else _describe(error))


def _describe(error: Exception) -> str:
    """Return one line; what the system said, where torch's zip writer hides it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror + (f" ({cause.filename})" if cause.filename else "")
        cause = cause.__context__
    return (str(error) or type(error).__name__).splitlines()[0]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _write_durably(path: Path, text: str) -> None:
    """Replace a small file so that a reader sees the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
