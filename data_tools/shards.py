"""The description of an encoded data set: dataset.json and its checks.

dataset.json is written last, so its presence means that encoding finished.

C latent channels, H W latent size.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from data_tools.errors import ConfigError
from data_tools.records import RecordLayout

MANIFEST_NAME = "dataset.json"
FORMAT_VERSION = 1
_ENCODE = "python data_tools/encode_latents.py"


@dataclass(frozen=True)
class Shard:
    """One tar file; also the content of its sidecar beside it."""

    name: str
    num_samples: int
    bytes: int
    sha256: str
    stride: int  # bytes from one sample to the next
    first_key: str
    skipped: list[str]  # image files that could not be decoded, relative to the input folder


@dataclass(frozen=True)
class LatentFormat:
    """What a sample's array holds."""

    kind: str  # "moments"
    shape: list[int]  # (2C, H, W)
    dtype: str
    layout: str
    flip: bool  # moments of the mirrored images are stored too


@dataclass(frozen=True)
class VaeReference:
    """Which VAE made the latents, and its numbers."""

    id: str
    sha256: str
    scaling_factor: float
    shift_factor: float


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and standard deviation per channel (C,) of unscaled posterior draws."""

    mean: list[float]
    std: list[float]


@dataclass(frozen=True)
class ImageFormat:
    """How the images were cut before encoding."""

    size: int
    crop: str


@dataclass(frozen=True)
class SourceList:
    """The image files that were encoded."""

    num_files: int
    num_skipped: int
    sha256: str  # of their relative paths and labels


@dataclass(frozen=True)
class ClassEntry:
    """One class: its label, the name of its folder, a name for people, its samples."""

    index: int
    id: str
    name: str
    count: int


@dataclass(frozen=True)
class Manifest:
    """The content of dataset.json."""

    format_version: int
    num_samples: int
    shards: list[Shard]
    latent: LatentFormat
    vae: VaeReference
    statistics: ChannelStatistics
    image: ImageFormat
    source: SourceList
    order_seed: int  # of the permutation that dealt the images to the shards
    classes: list[ClassEntry]  # empty: unconditional
    versions: dict[str, str]  # of the tools that wrote it


@dataclass(frozen=True)
class DatasetManifest(Manifest):
    """dataset.json as read from a folder.

    Attributes:
        folder: where the shards are.
        hash: sha256 of dataset.json; another value means another data set.
    """

    folder: Path
    hash: str

    @classmethod
    def load(cls, folder: str | Path, check_shards: bool = True) -> "DatasetManifest":
        """Read a data set's description.

        Args:
            folder: holds dataset.json.
            check_shards: also compare the shards' sizes; False for a copy without shards.
        """
        folder = Path(folder)
        path = folder / MANIFEST_NAME
        if not folder.is_dir():
            state = "is not a folder" if folder.exists() else "does not exist"
            raise ConfigError(f"--data {folder}: {state}; make it: {_ENCODE} --output {folder}.")
        if not path.is_file():
            raise ConfigError(
                f"--data {folder}: no {MANIFEST_NAME}, encoding did not finish; "
                f"run {_ENCODE} --output {folder} with the same flags again (it resumes)."
            )
        text = path.read_bytes()
        manifest = _parse(path, text)
        if check_shards:
            for shard in manifest.shards:
                _check_shard(folder / shard.name, shard)
        values = {field.name: getattr(manifest, field.name) for field in fields(Manifest)}
        return cls(**values, folder=folder, hash=hashlib.sha256(text).hexdigest())

    @property
    def latent_channels(self) -> int:
        """C: half of the stored channels, the other half being log-variances."""
        return self.latent.shape[0] // 2

    @property
    def latent_height(self) -> int:
        """H."""
        return self.latent.shape[1]

    @property
    def latent_width(self) -> int:
        """W."""
        return self.latent.shape[2]

    @property
    def has_flip(self) -> bool:
        """Whether the moments of the mirrored images are stored."""
        return self.latent.flip

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for an unconditional data set."""
        return len(self.classes)

    @property
    def layout(self) -> RecordLayout:
        """The bytes of a sample."""
        channels, height, width = self.latent.shape
        return RecordLayout((channels, height, width), self.latent.flip)


def _parse(path: Path, text: bytes) -> Manifest:
    try:
        content = json.loads(text)
    except ValueError as err:
        raise ConfigError(
            f"{path}: is not JSON ({err}); delete it and run {_ENCODE} again, the shards are kept."
        ) from err
    version = content.get("format_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise ConfigError(
            f"{path}: has format version {version}, this code reads {FORMAT_VERSION}; "
            "use the code that wrote it, or encode again."
        )
    try:
        manifest = from_json(Manifest, content)
        _check_consistent(manifest)
        return manifest
    except MalformedError as err:
        raise ConfigError(
            f"{path}: {err}; delete it and run {_ENCODE} again, the shards are kept."
        ) from err


def _check_consistent(manifest: Manifest) -> None:
    shape = manifest.latent.shape
    if len(shape) != 3 or min(shape) < 1 or shape[0] % 2:
        raise MalformedError(f"latent.shape {shape} is not (2 x channels, height, width)")
    in_shards = sum(shard.num_samples for shard in manifest.shards)
    if in_shards != manifest.num_samples or in_shards < 1:
        raise MalformedError(
            f"num_samples is {manifest.num_samples} but the shards hold {in_shards}"
        )
    stride = RecordLayout((shape[0], shape[1], shape[2]), manifest.latent.flip).stride
    for shard in manifest.shards:
        if shard.stride != stride:
            raise MalformedError(f"{shard.name} has stride {shard.stride}, its shape asks {stride}")
    if [entry.index for entry in manifest.classes] != list(range(len(manifest.classes))):
        raise MalformedError("the class indices are not 0, 1, 2, ...")


def _check_shard(path: Path, shard: Shard) -> None:
    try:
        found = f"has {path.stat().st_size} bytes"
        is_good = path.stat().st_size == shard.bytes
    except FileNotFoundError:
        found, is_good = "is missing", False
    if not is_good:
        raise ConfigError(
            f"{path}: {found}, {MANIFEST_NAME} says {shard.bytes} bytes; copy the shard again, or "
            f"delete {MANIFEST_NAME} and run {_ENCODE} with the same flags again."
        )


class MalformedError(Exception):
    """JSON that is not what a dataclass describes."""


def from_json(kind: Any, value: Any, where: str = "the content") -> Any:
    """Build a dataclass tree from parsed JSON; unknown, missing and mistyped keys are errors."""
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        if not isinstance(value, dict) or value.keys() != hints.keys():
            given = set(value) if isinstance(value, dict) else set()
            missing, unknown = sorted(set(hints) - given), sorted(given - set(hints))
            raise MalformedError(f"{where} lacks {missing} and has the unknown {unknown}")
        parts = {name: from_json(hints[name], value[name], name) for name in hints}
        return kind(**parts)
    if get_origin(kind) is list and isinstance(value, list):
        return [from_json(get_args(kind)[0], item, f"an item of {where}") for item in value]
    if get_origin(kind) is dict and isinstance(value, dict):
        return {name: from_json(get_args(kind)[1], item, name) for name, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise MalformedError(f"{where} is {value!r}, which is no {getattr(kind, '__name__', kind)}")
    return value


def write_json(path: Path, content: Any) -> None:
    """Write a dataclass or dictionary as JSON, whole or not at all.

    Several processes may write the same content at once: each has a temporary file of its own.
    """
    value = asdict(content) if is_dataclass(content) else content
    text = json.dumps(value, indent=1) + "\n"
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    replace_file(path, lambda file: file.write(text.encode()), temporary)


def replace_file(path: Path, write: Callable[[Any], object], temporary: Path | None = None) -> None:
    """Call write(file) on a temporary file, flush it to the disk and give it its name."""
    temporary = temporary or path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
