"""What a complete checkpoint says of itself, and whether a run may continue from it.

    checkpoints/latest                    the newest complete step, one line
    checkpoints/step-0001000/             DeepSpeed's files
                     ema.safetensors      averaged weights, fp32, experts in global order
                     ema-NAME.safetensors likewise, of the further averages
                     weights.safetensors  raw weights, likewise
                     manifest.json        files with sizes and sha256, layout, progress, its own
                                          sha256

DeepSpeed loads a changed expert-parallel size as silent garbage: where the manifest has another
layout than the job, training/reshard.py loads instead.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data_tools.errors import CONFIG_ERROR_EXIT_CODE, ConfigError
from data_tools.files import MalformedError, from_json
from data_tools.order import ORDER_VERSION
from training.processes import RunError, agreed_message
from training.unpickling import foreign_objects

CHECKPOINT_DIR = "checkpoints"
LATEST_FILE = "latest"
MANIFEST_FILE = "manifest.json"
EMA_FILE = "ema.safetensors"
RAW_FILE = "weights.safetensors"
HASH_BLOCK_BYTES = 1 << 20
PICKLE_SUFFIX = ".pt"
CHECKSUM_KEY = "sha256"  # in a manifest, of all else in it


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


class IncompleteCheckpointError(ConfigError):
    """A checkpoint whose files are not what they were when it was published.

    Args:
        folder: of the checkpoint.
        reason: what is wrong, naming the file.
    """

    def __init__(self, folder: Path, reason: str) -> None:
        pointer = folder.parent / LATEST_FILE
        super().__init__(
            f"{reason}; delete {folder} and write the name of an older checkpoint into {pointer}."
        )
        self.folder, self.reason = folder, reason


class DamagedCheckpointError(RunError):
    """No checkpoint can be continued from; raised on all ranks."""

    exit_code = CONFIG_ERROR_EXIT_CODE


class ResumePoint(NamedTuple):
    """A checkpoint that a run may continue from."""

    folder: Path
    manifest: CheckpointManifest


def tag_of(step: int) -> str:
    """Name the checkpoint of a step so that names sort like steps."""
    return f"step-{step:07d}"


def step_of(tag: str) -> int:
    """Return the step of a checkpoint's name."""
    return int(tag.removeprefix("step-"))


def manifest_text(manifest: CheckpointManifest) -> str:
    """Return the content of `manifest.json`, with a checksum of its own."""
    content = asdict(manifest)
    return json.dumps(content | {CHECKSUM_KEY: _checksum_of(content)}, indent=1) + "\n"


def _checksum_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _parse_manifest(data: bytes) -> CheckpointManifest:
    content = json.loads(data)
    checksum = content.pop(CHECKSUM_KEY, None) if isinstance(content, dict) else None
    if checksum not in (None, _checksum_of(content)):  # older ones have none
        raise MalformedError("its content does not match the checksum in it")
    manifest: CheckpointManifest = from_json(CheckpointManifest, content)
    return manifest


def read_manifest(folder: Path) -> CheckpointManifest:
    """Read a checkpoint's manifest and check that its files are there in their sizes."""
    path = folder / MANIFEST_FILE
    try:
        manifest = _parse_manifest(path.read_bytes())
    except FileNotFoundError as err:
        reason = f"{folder}: no {MANIFEST_FILE}, so this is not a complete checkpoint"
        raise IncompleteCheckpointError(folder, reason) from err
    except (OSError, ValueError, MalformedError) as err:
        reason = f"{path} is not a checkpoint manifest ({err})"
        raise IncompleteCheckpointError(folder, reason) from err
    for name, record in manifest.files.items():
        file = folder / name
        size = file.stat().st_size if file.exists() else None
        if size != record.bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            reason = f"{file} {found}, its {MANIFEST_FILE} says {record.bytes} bytes"
            raise IncompleteCheckpointError(folder, reason)
    return manifest


def verify_file(manifest: CheckpointManifest, path: Path) -> None:
    """Compare a file with the checksum in its checkpoint's manifest before it is read."""
    record = manifest.files.get(path.name)
    if record is None:
        reason = f"{path} is not in its {MANIFEST_FILE}"
        raise IncompleteCheckpointError(path.parent, reason)
    try:
        is_right = sha256_of(path) == record.sha256
    except OSError as err:  # a disk that fails to read, or a file that has gone since
        raise IncompleteCheckpointError(path.parent, f"{path}: {err.strerror}") from err
    if not is_right:
        reason = f"{path} does not match the checksum in its {MANIFEST_FILE}"
        raise IncompleteCheckpointError(path.parent, reason)


def verify_together(point: ResumePoint) -> str | None:
    """Compare all files with their checksums, shared among the ranks. All ranks must call this.

    Those that will be unpickled must hold nothing that could run a program, too.

    Returns:
        On all ranks, what is wrong with the first file that differs; None = nothing.
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    reason = None
    try:
        for name in sorted(point.manifest.files)[rank::world_size]:
            path = point.folder / name
            verify_file(point.manifest, path)
            if path.suffix == PICKLE_SUFFIX and (objects := foreign_objects(path)):
                found = f"{path} holds {objects}, which no checkpoint of this program does"
                raise IncompleteCheckpointError(point.folder, found)
    except IncompleteCheckpointError as err:
        reason = err.reason
    return agreed_message(reason)


def resume_points(run_dir: Path) -> tuple[list[ResumePoint], list[str]]:
    """List the checkpoints to continue from, newest first, by manifests and sizes of files.

    Later ones than `latest` names are of a line that was left.

    Returns:
        The points, and what is wrong with those left out; no points before the first checkpoint.

    Raises:
        ConfigError: there are checkpoints, but none to continue from.
    """
    newest = latest_checkpoint(run_dir)
    if newest is None:
        return [], []
    points, errors = [], []
    for folder in sorted(newest.parent.glob("step-*"), reverse=True):
        if folder.name > newest.name:
            continue
        try:
            points.append(ResumePoint(folder, read_manifest(folder)))
        except IncompleteCheckpointError as err:
            errors.append(err)
    if not points:
        raise errors[0]
    reasons = [err.reason for err in errors if err.folder.name > points[0].folder.name]
    return points, reasons


def first_undamaged(points: list[ResumePoint]) -> tuple[ResumePoint, list[str]]:
    """Choose the newest point whose files match their checksums. All ranks must call this.

    Returns:
        The point, and what is wrong with the newer ones.

    Raises:
        DamagedCheckpointError: on all ranks, when there is none.
    """
    reasons: list[str] = []
    for point in points:
        reason = verify_together(point)
        if reason is None:
            return point, reasons
        reasons.append(reason)
    folder = points[0].folder.parent
    raise DamagedCheckpointError(
        f"{reasons[0]}, and no older checkpoint in {folder} is whole; restore the file from a "
        f"copy, or delete {folder / LATEST_FILE} to start afresh."
    )


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Return the folder that `latest` names, None before the first checkpoint."""
    pointer = run_dir / CHECKPOINT_DIR / LATEST_FILE
    if not pointer.exists():
        return None
    name, before, folders = _content(pointer), None, {}
    while name not in folders and name != before:  # a job may publish and prune right now
        folders = {path.name: path for path in pointer.parent.glob("step-*")}
        name, before = _content(pointer), name
    if name not in folders:
        raise ConfigError(
            f"{pointer} names {name!r}, which is no checkpoint in {pointer.parent}; write the name "
            "of one that exists into it, or delete it to start afresh."
        )
    return folders[name]


def _content(pointer: Path) -> str:
    return pointer.read_text(encoding="ascii", errors="replace").strip()


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
