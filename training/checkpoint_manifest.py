"""What a complete checkpoint says of itself, and whether a run may continue from it.

    checkpoints/latest                    the newest complete step, one line
    checkpoints/step-0001000/             DeepSpeed's files
                     ema.safetensors      averaged weights, fp32, experts in global order
                     ema-NAME.safetensors likewise, of the further averages
                     weights.safetensors  raw weights, likewise
                     manifest.json        files with sizes and sha256, layout, progress

DeepSpeed loads a changed expert-parallel size as silent garbage: where the manifest has another
layout than the job, training/reshard.py loads instead.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from data_tools.errors import CONFIG_ERROR_EXIT_CODE, ConfigError
from data_tools.files import MalformedError, from_json
from data_tools.order import ORDER_VERSION
from training.processes import RunError, agreed_message

CHECKPOINT_DIR = "checkpoints"
LATEST_FILE = "latest"
MANIFEST_FILE = "manifest.json"
EMA_FILE = "ema.safetensors"
RAW_FILE = "weights.safetensors"
HASH_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class TrainState:
    """What resuming needs beside tensors."""

    step: int = 0  # optimizer steps done
    samples_consumed: int = 0  # stream position of the next sample


@dataclass(frozen=True)
class Layout:
    """How a checkpoint's tensors are spread."""

    world_size: int
    expert_parallel_size: int
    zero_stage: int
    precision: str  # "bf16", "autocast" or "fp32"

    def __str__(self) -> str:
        return (
            f"{self.world_size} rank(s), expert-parallel size {self.expert_parallel_size}, "
            f"ZeRO {self.zero_stage}, {self.precision}"
        )


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
    order_version: int  # of the rule that maps stream positions to samples
    files: dict[str, FileRecord]  # by name


def record_of(path: Path) -> FileRecord:
    """Describe a finished file."""
    return FileRecord(path.stat().st_size, sha256_of(path))


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
    if record is None or sha256_of(path) != record.sha256:
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
    message = agreed_message(error)
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
    """Refuse to resume in another precision, sample order or on another data set."""
    saved = manifest.layout.precision
    if saved != layout.precision:
        raise ConfigError(
            f"--run-dir: its checkpoint {manifest.tag} was saved with precision {saved}, this "
            f"command has {layout.precision}; change the precision of the --deepspeed file back to "
            f"{saved}, or start another --run-dir."
        )
    if manifest.order_version != ORDER_VERSION:
        raise ConfigError(
            f"--run-dir: its checkpoint {manifest.tag} was trained in sample order version "
            f"{manifest.order_version}, this program has {ORDER_VERSION}; use the program's "
            "version that wrote it, or start another --run-dir."
        )
    if manifest.data_hash != data_hash:
        raise ConfigError(
            f"--data: checkpoint {manifest.tag} of the --run-dir was trained on the data set whose "
            f"dataset.json has sha256 {manifest.data_hash[:12]}, this one has {data_hash[:12]}; "
            "give the original --data, or start another --run-dir."
        )


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
