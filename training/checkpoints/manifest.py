"""Read and write the manifest of a checkpoint, and find the checkpoint that `latest` names.

    checkpoints/latest                    the newest complete step, one line
    checkpoints/step-0001000/             DeepSpeed's files
                     ema.safetensors      averaged weights, fp32, experts in global order
                     ema-NAME.safetensors the further averages, in the same form
                     weights.safetensors  raw weights, in the same form
                     manifest.json        files with sizes and sha256, layout, progress, its own
                                          sha256

DeepSpeed loads a changed expert-parallel size or order of parameters as silent garbage: where the
manifest has another layout than the job, training/checkpoints/other_layout.py loads instead.
"""

import hashlib
import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.errors import ConfigError
from data_tools.files import FIRST, SINCE, MalformedError, parse_json
from data_tools.formats import Format

CHECKPOINT_DIR = "checkpoints"
LATEST_FILE = "latest"
MANIFEST_FILE = "manifest.json"
EMA_FILE = "ema.safetensors"
RAW_FILE = "weights.safetensors"
HASH_BLOCK_BYTES = 1 << 20
CHECKSUM_KEY = "sha256"  # in a manifest, of all else in it
PARAMETER_ORDER = 2  # in flat tensors: any change of the order needs a new number
_TAG = re.compile(r"step-\d{7,}")


@dataclass(frozen=True)
class TrainState:
    """What resuming needs beside tensors."""

    step: int = field(default=0, metadata=FIRST)  # optimizer steps done
    samples_consumed: int = field(default=0, metadata=FIRST)  # stream position of the next sample


@dataclass(frozen=True)
class Layout:
    """How a checkpoint's tensors are spread."""

    world_size: int
    expert_parallel_size: int
    zero_stage: int
    precision: str  # "bf16", "autocast" or "fp32"
    # 1 = that of the modules, 2 = engine/build.py: in_packing_order
    parameter_order: int = field(default=1, metadata={SINCE: 2})

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


# Its number speaks for all files of a checkpoint.
MANIFEST = Format(newest=2, kind=CheckpointManifest)


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
            f"{reason}; restore {folder} from a copy, or write the name of an older checkpoint "
            f"into {pointer}."
        )
        self.folder, self.reason = folder, reason


def tag_of(step: int) -> str:
    """Name the checkpoint of a step so that names sort like steps."""
    return f"step-{step:07d}"


def step_of(tag: str) -> int:
    """Return the step of a checkpoint's name."""
    return int(tag.removeprefix("step-"))


def checkpoints_up_to(newest: Path) -> list[Path]:
    """List the checkpoints of a run until one of them, oldest first.

    Later ones are of a line that was left by resuming from an older one. Other folders, such as a
    person's copies, are no checkpoints.
    """
    found = (path for path in newest.parent.glob("step-*") if _TAG.fullmatch(path.name))
    return sorted(path for path in found if path.name <= newest.name)


def manifest_text(manifest: CheckpointManifest) -> str:
    """Return the content of `manifest.json`, with a checksum of its own."""
    content = json.loads(MANIFEST.dumps(manifest))
    return json.dumps(content | {CHECKSUM_KEY: _checksum_of(content)}, indent=1) + "\n"


def _checksum_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _parse_manifest(data: bytes, where: str) -> CheckpointManifest:
    content = parse_json(data)
    MANIFEST.check(content, where)  # first: a later version may sum up otherwise
    checksum = content.pop(CHECKSUM_KEY, None) if isinstance(content, dict) else None
    if checksum not in (None, _checksum_of(content)):  # older ones have none
        raise MalformedError("its content does not match the checksum in it")
    manifest: CheckpointManifest = MANIFEST.parse(content, where)
    return manifest


def read_manifest(folder: Path, has_files: bool = True) -> CheckpointManifest:
    """Read a checkpoint's manifest and check that its files are there in their sizes.

    Args:
        folder: of the checkpoint.
        has_files: check the files; a run of hundreds of ranks has thousands.

    Raises:
        IncompleteCheckpointError: it, or a file, is damaged.
        NewerFormatError: a later version of this program wrote it.
    """
    path = folder / MANIFEST_FILE
    try:
        manifest = _parse_manifest(path.read_bytes(), str(path))
    except FileNotFoundError as err:
        reason = f"{folder}: no {MANIFEST_FILE}, so this is not a complete checkpoint"
        raise IncompleteCheckpointError(folder, reason) from err
    except (OSError, ValueError, MalformedError) as err:
        reason = f"{path} is not a checkpoint manifest ({err})"
        raise IncompleteCheckpointError(folder, reason) from err
    for name, record in manifest.files.items() if has_files else ():
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


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Return the folder that `latest` names, None before the first checkpoint.

    A job that was killed while it published its first checkpoint leaves that one without `latest`.
    Beside several, nobody but a person knows which of them is the end of the line to go on with:
    the later ones may be of a line that was left.

    Raises:
        ConfigError: there are checkpoints, and `latest` names none of them.
    """
    pointer = run_dir / CHECKPOINT_DIR / LATEST_FILE
    name, before, folders = _content(pointer), None, {}
    while name not in folders and name != before:  # a job may publish and prune right now
        folders = {path.name: path for path in pointer.parent.glob("step-*")}
        name, before = _content(pointer), name
    found = sorted(tag for tag in folders if _TAG.fullmatch(tag))
    if name not in folders and not name and len(found) < 2:
        return folders[found[0]] if found else None
    if name not in folders:
        raise ConfigError(_say_lost(pointer, name, [folders[tag] for tag in found]))
    return folders[name]


def _content(pointer: Path) -> str:
    try:
        return pointer.read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError:
        return ""
    except OSError as err:
        raise ConfigError(f"{pointer}: {err.strerror}; make it readable.") from err


def _say_lost(pointer: Path, name: str, folders: list[Path]) -> str:
    """Say that `latest` does not name one of some checkpoints, and how to go on."""
    problem = f"{pointer} is {'empty' if pointer.exists() else 'missing'}"
    if name:
        problem = f"{pointer} names {name!r}, which is no checkpoint there"
    newest = next((folder.name for folder in reversed(folders) if _is_whole(folder)), None)
    if newest is None:
        return (
            f"{problem}, and no checkpoint in that folder is whole; copy one back and write its "
            "name into that file, or choose another run directory to start afresh."
        )
    return (
        f"{problem}; the newest whole checkpoint in that folder is {newest}; to continue from it: "
        f"echo {newest} > {shlex.quote(str(pointer))} (to start afresh, choose another run "
        "directory)."
    )


def _is_whole(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except IncompleteCheckpointError:
        return False
    return True


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
