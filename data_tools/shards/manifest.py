"""dataset.json: the description of an encoded data set, its dataclasses and checks.

dataset.json is written last, so its presence means that encoding finished.

C latent channels, H W latent size.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

from data_tools.errors import ConfigError
from data_tools.files import SINCE, MalformedError, parse_json
from data_tools.formats import FORMAT_KEY, Format, stored_values
from data_tools.shards.records import IndexedLayout, RecordLayout
from data_tools.shards.undescribed import MANIFEST_NAME, explain, run_folder
from data_tools.sources.left_out import LeftOut
from data_tools.sources.sample_labels import split_label
from data_tools.user_files.file_kinds import LFS_REASON, is_lfs_pointer, refuse_lfs_pointer

HASHED_FORMAT = 2  # part of every hash that checkpoints remember, whatever the file's number
# By training: parts of a description that its hash leaves out.
NOT_READ = ("versions", "source", "left_out")
_ENCODE = "python data_tools/encode_latents.py"
_VERIFY = "python data_tools/verify_shards.py"


@dataclass(frozen=True)
class Shard:
    """One tar file; also the content of its sidecar beside it."""

    name: str
    num_samples: int
    bytes: int
    sha256: str
    # Bytes from one sample to the next; 0: the index beside the tar says where they lie.
    stride: int
    index_sha256: str  # of that index, which only tars written by others need; else ""
    first_key: str
    skipped: list[str]  # image files that could not be decoded, relative to the input folder

    @property
    def sidecar(self) -> str:
        """The name of the file beside it (shards/sidecar.py)."""
        return self.name.removesuffix(".tar") + ".json"


@dataclass(frozen=True)
class LatentFormat:
    """What a sample's array holds."""

    kind: str  # "moments" of the posterior, or "latents": one frozen draw, unscaled
    shape: list[int]  # (2C, H, W), of latents (C, H, W)
    dtype: str
    layout: str
    flip: bool  # those of the mirrored images are stored too
    precision: str  # of the VAE's arithmetic: fp32, bf16, fp16, or unknown

    @property
    def record_layout(self) -> RecordLayout:
        """The bytes of a sample in shards that this project wrote."""
        return RecordLayout(self.shape, self.flip)

    @property
    def indexed_layout(self) -> IndexedLayout:
        """How samples are read from tars of others."""
        return IndexedLayout(self.shape, self.dtype)


@dataclass(frozen=True)
class Members:
    """What the members of a sample are called in the tars, after the key and a dot."""

    array: str
    flip: str  # "" where mirrored images are not stored
    label: str  # "" where there are no labels; "json:FIELD": a field of the member json

    @property
    def suffixes(self) -> frozenset[str]:
        """Of the members that every sample has."""
        return frozenset({self.array, self.flip, split_label(self.label)[0]} - {""})


@dataclass(frozen=True)
class VaeReference:
    """Which VAE made the latents, and its numbers."""

    id: str  # finds it again: a hub id, or a path; inside this repository relative to it
    sha256: str  # of the weights (names, shapes and fp32 values), whatever file they came from
    scaling_factor: float  # final = (latent - shift_factor) * scaling_factor
    shift_factor: float  # 0 where the VAE's configuration has none
    # (C,), which replaces shift_factor, and (C,), by which final latents are divided; most VAEs
    # have neither.
    latents_mean: list[float] = field(default_factory=list, metadata={SINCE: 3})
    latents_std: list[float] = field(default_factory=list, metadata={SINCE: 3})

    @property
    def normalisation(self) -> tuple[float, float, list[float], list[float]]:
        """The numbers between the VAE's latents and those that a model sees."""
        return self.scaling_factor, self.shift_factor, self.latents_mean, self.latents_std


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

    num_samples: int
    shards: list[Shard]
    latent: LatentFormat
    members: Members
    vae: VaeReference
    statistics: ChannelStatistics
    image: ImageFormat
    source: SourceList
    order_seed: int  # of the permutation that dealt the images to the shards
    classes: list[ClassEntry]  # empty: unconditional
    versions: dict[str, str]  # of the tools that wrote it
    # What the input held that is no part of the data set, for people.
    left_out: list[LeftOut] = field(default_factory=list, kw_only=True, metadata={SINCE: 3})


# A description that uses nothing new is of format 2, which older programs read.
DATASET = Format(newest=3, base=2, oldest=2, kind=Manifest)


@dataclass(frozen=True)
class DatasetManifest(Manifest):
    """dataset.json as read from a folder."""

    folder: Path | None  # where it was found; None where that is no folder of this machine
    hash: str  # sha256 of what training reads; another value means another data set

    @classmethod
    def load(cls, folder: str | Path, check_shards: bool = True) -> "DatasetManifest":
        """Read a folder's description, and compare its shards' sizes unless it is a mere copy."""
        folder = Path(folder)
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise ConfigError(f"--data {folder}: {explain(folder)}.")
        try:
            manifest = cls.parse(path.read_bytes(), str(path), folder)
        except OSError as err:
            raise ConfigError(f"{path}: {err.strerror}; make it readable.") from err
        if check_shards:
            if said := run_folder(folder):
                raise ConfigError(f"--data {folder}: {said}.")
            for shard in manifest.shards:
                _check_shard(folder / shard.name, shard)
        return manifest

    @classmethod
    def parse(cls, text: bytes, where: str, folder: Path | None = None) -> "DatasetManifest":
        """Read the content of a dataset.json; messages say `where` it was found."""
        advice = f"check the address, and that {_ENCODE} wrote the file"
        if folder is not None:
            advice = f"copy it again, or run {_VERIFY} --data {folder}, it says what to do"
        if is_lfs_pointer(text):
            raise ConfigError(f"{where}: {LFS_REASON}.")
        try:
            manifest = DATASET.parse(parse_json(text), where)
            _check_consistent(manifest)
        except MalformedError as err:
            raise ConfigError(f"{where}: {err}; {advice}.") from err
        except ValueError as err:
            raise ConfigError(f"{where}: is not JSON ({err}); {advice}.") from err
        values = {item.name: getattr(manifest, item.name) for item in fields(Manifest)}
        return cls(**values, folder=folder, hash=content_hash(manifest))

    def described(self) -> Manifest:
        """Return what dataset.json says."""
        return Manifest(**{item.name: getattr(self, item.name) for item in fields(Manifest)})

    @property
    def is_frozen(self) -> bool:
        """Whether the stored arrays are latents, drawn once, and not the posterior's moments."""
        return self.latent.kind == "latents"

    @property
    def scaled_std(self) -> list[float]:
        """Standard deviation per channel (C,) as a model sees it."""
        own = self.vae.latents_std or [1.0] * len(self.statistics.std)
        pairs = zip(self.statistics.std, own, strict=True)
        return [std * self.vae.scaling_factor / own_std for std, own_std in pairs]

    @property
    def latent_channels(self) -> int:
        """C: half of the stored channels where the other half are log-variances."""
        return self.latent.shape[0] if self.is_frozen else self.latent.shape[0] // 2

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
    def has_own_layout(self) -> bool:
        """Whether this project wrote all shards, so that none needs an index."""
        return all(shard.stride for shard in self.shards)

    @property
    def is_indexed(self) -> bool:
        """Whether others wrote the tars, so that an index beside each says where samples lie."""
        return self.shards[0].stride == 0


def content_hash(manifest: Manifest) -> str:
    """Return the sha256 of all that decides what training reads.

    Where the VAE was found, which tools wrote the files, and what people call a class do not count:
    a data set that was copied or encoded again with newer tools to the same bytes is the same. Nor
    does a field that was added since and says nothing.
    """
    stored = stored_values(manifest)
    content = {f.name: stored[f.name] for f in fields(Manifest) if f.name in stored}
    content = {name: value for name, value in content.items() if name not in NOT_READ}
    vae = {name: value for name, value in stored_values(manifest.vae).items() if name != "id"}
    classes = [
        {name: value for name, value in stored_values(entry).items() if name != "name"}
        for entry in manifest.classes
    ]
    counted = content | {FORMAT_KEY: HASHED_FORMAT, "vae": vae, "classes": classes}
    return hashlib.sha256(
        json.dumps(counted, sort_keys=True, default=stored_values).encode()
    ).hexdigest()


def _check_consistent(manifest: Manifest) -> None:
    latent, shape = manifest.latent, manifest.latent.shape
    if latent.kind not in ("moments", "latents"):
        raise MalformedError(f"latent.kind is {latent.kind!r}, not moments or latents")
    if latent.dtype not in ("float16", "float32"):
        raise MalformedError(f"latent.dtype is {latent.dtype!r}, not float16 or float32")
    if len(shape) != 3 or min(shape) < 1 or (latent.kind == "moments" and shape[0] % 2):
        raise MalformedError(f"latent.shape {shape} is not (2 x channels, height, width)")
    channels = shape[0] // 2 if latent.kind == "moments" else shape[0]
    mean, std = manifest.vae.latents_mean, manifest.vae.latents_std
    if len(mean) != len(std) or len(std) not in (0, channels) or min(std, default=1.0) <= 0:
        raise MalformedError(f"latents_mean and latents_std are no {channels} numbers each")
    in_shards = sum(shard.num_samples for shard in manifest.shards)
    if in_shards != manifest.num_samples or in_shards < 1:
        raise MalformedError(f"num_samples is {manifest.num_samples}, the shards hold {in_shards}")
    for shard in manifest.shards:
        # The name may come from anywhere; it must not lead out of the data's or the cache's folder.
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.tar", shard.name):
            raise MalformedError(f"a shard is called {shard.name!r}, which is no plain NAME.tar")
        if min(shard.num_samples, shard.bytes) < 0:
            raise MalformedError(f"{shard.name} has a negative size")
    if any(shard.stride for shard in manifest.shards):  # else all tars are of others
        if (latent.kind, latent.dtype) != ("moments", "float16"):
            raise MalformedError(f"shards with a stride hold float16 moments, not {latent.dtype}")
        stride = latent.record_layout.stride
        for shard in manifest.shards:
            if shard.stride not in (0, stride):
                what = f"{shard.name} has stride {shard.stride}"
                raise MalformedError(f"{what}, its shape asks {stride}")
    if [entry.index for entry in manifest.classes] != list(range(len(manifest.classes))):
        raise MalformedError("the class indices are not 0, 1, 2, ...")
    if len({entry.id for entry in manifest.classes}) < len(manifest.classes):
        # Sets are united by these: samples of both classes would get one label.
        raise MalformedError("two classes have the same id")


def _check_shard(path: Path, shard: Shard) -> None:
    try:
        size = path.stat().st_size
        found = f"has {size} bytes"
    except FileNotFoundError:
        size, found = None, "is missing"
    if size != shard.bytes:
        refuse_lfs_pointer("--data", path)
        raise ConfigError(
            f"{path}: {found}, {MANIFEST_NAME} says {shard.bytes} bytes; copy the shard again, or "
            f"run {_VERIFY} --data {path.parent}, it says what to do."
        )
