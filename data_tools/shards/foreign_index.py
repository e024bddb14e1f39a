"""Index a tar of latents that another program wrote, in one pass over it.

A sample's members share a key, see sources/tar_samples.py. To read any sample at once, a run needs
the offsets of its arrays and its label; these go into an index beside dataset.json. All arrays must
have one shape and dtype and be stored as numpy.save stores them. Their headers are parsed without
ever loading a pickle.

C latent channels, H W latent size.
"""

import hashlib
import io
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from data_tools.errors import ConfigError, told_as
from data_tools.files import SINCE
from data_tools.formats import Format
from data_tools.shards.foreign_arrays import channels_last, not_npy, unusable
from data_tools.shards.manifest import Members
from data_tools.shards.records import NPY_HEADER_ERRORS
from data_tools.shards.sidecar import ShardTotals, add_samples
from data_tools.sources.left_out import LeftOut, Tally, sentence
from data_tools.sources.sample_labels import LabelError
from data_tools.sources.tar_members import BadTarError, content_of, walk
from data_tools.sources.tar_samples import IncompleteSampleError, TarParts, grouped
from data_tools.storage.fetch import read_small
from data_tools.storage.locations import Location

_MAX_HEADER_BYTES = 4096  # of an npy file; numpy's own have 128
_MAX_REMOTE_BYTES = 1 << 33  # of one tar, which is held in memory while it is scanned
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class WantedMembers:
    """Which members of a sample are what, by the suffix after its key and a dot."""

    array: str
    flip: str  # "": there are no latents of mirrored images
    label: str  # "": no labels; "json:FIELD": a field of the member json
    kind: str  # "moments" or "latents"


@dataclass(frozen=True)
class ScannedShard:
    """What one pass over a tar found; kept beside its index, so that a scan can be continued."""

    wanted: WantedMembers
    num_samples: int
    bytes: int
    sha256: str
    index_sha256: str
    first_key: str
    shape: list[int]
    dtype: str
    label_counts: dict[str, int]
    channel_sum: list[float]  # (C,) of unscaled posterior draws
    channel_square_sum: list[float]
    left_out: list[LeftOut] = field(default_factory=list, metadata={SINCE: 2})
    # Least of all moments; else, or where it is unknown, -1.
    log_variance_min: float = field(default=-1.0, metadata={SINCE: 2})

    @property
    def totals(self) -> ShardTotals:
        """The sums that a sidecar would hold."""
        return ShardTotals(self.label_counts, self.channel_sum, self.channel_square_sum)


NOTES = Format(newest=2, kind=ScannedShard)


class _RefusedError(Exception):
    """Something in a tar that cannot be used; the caller names the tar."""


def scan(location: Location, name: str, wanted: WantedMembers) -> tuple[ScannedShard, bytes]:
    """Read a tar from its beginning to its end.

    Returns:
        what it holds, and its index as the content of an .npy file: int64 (n, 3), offsets of the
        array and of the mirrored one or -1, and the label.
    """
    where = location.describe(name)
    try:
        if location.folder is None:
            return _scan(io.BytesIO(read_small(location, name, _MAX_REMOTE_BYTES)), wanted)
        with (
            told_as(f"--input {where}: cannot be read", "give tars that are there"),
            (location.folder / name).open("rb") as file,
        ):
            return _scan(file, wanted)
    except (BadTarError, _RefusedError) as err:
        raise ConfigError(f"--input {where}: {err}.") from err


def _scan(file: BinaryIO, wanted: WantedMembers) -> tuple[ScannedShard, bytes]:
    hashing, left_out = _HashingReader(file), Tally()
    uniform, totals = _Uniform(wanted.kind), ShardTotals()
    rows: list[tuple[int, int, int]] = []
    first_key = ""
    suffixes = Members(wanted.array, wanted.flip, wanted.label).suffixes
    try:
        for sample in grouped(walk(hashing), suffixes, left_out):
            array, flip_offset = _read_arrays(hashing, sample, wanted, uniform)
            label = _label(hashing, sample, wanted.label)
            add_samples(totals, [label], array[None], wanted.kind)
            first_key = first_key or sample.key
            rows.append((sample.by_suffix[wanted.array].offset_data, flip_offset, label))
    except IncompleteSampleError as err:
        there = f"; the tar has {sentence(left_out.entries())}" if left_out else ""
        raise _RefusedError(f"{err}{there}") from err
    hashing.drain()
    if not rows:
        there = f" (it has {sentence(left_out.entries())})" if left_out else ""
        raise _RefusedError(f"holds no samples{there}; see --array")
    rows.sort()  # labels that stand elsewhere complete samples late
    index = io.BytesIO()
    np.save(index, np.array(rows, np.dtype("<i8")))
    found = ScannedShard(
        wanted=wanted,
        num_samples=len(rows),
        bytes=hashing.count,
        sha256=hashing.digest.hexdigest(),
        index_sha256=hashlib.sha256(index.getvalue()).hexdigest(),
        first_key=first_key,
        shape=list(uniform.shape),
        dtype=uniform.dtype,
        label_counts=totals.class_counts,
        channel_sum=totals.channel_sum,
        channel_square_sum=totals.channel_square_sum,
        left_out=left_out.entries(),
        log_variance_min=uniform.log_variance_min,
    )
    return found, index.getvalue()


def _read_arrays(
    file: "_HashingReader", sample: TarParts, wanted: WantedMembers, uniform: "_Uniform"
) -> tuple[np.ndarray, int]:
    """Read and check a sample's arrays; return the first, and the offset of the mirrored one."""
    found = []
    for suffix in filter(None, (wanted.array, wanted.flip)):
        name = f"{sample.shown}.{suffix}"
        found.append(_array(content_of(file, sample.by_suffix[suffix]), name))
        uniform.check(found[-1], name)
    uniform.note_log_variance(found[0])
    return found[0], sample.by_suffix[wanted.flip].offset_data if wanted.flip else -1


def _label(file: "_HashingReader", sample: TarParts, label: str) -> int:
    try:
        number = sample.label(file, label)
    except LabelError as err:
        raise _RefusedError(
            f"sample {sample.shown} has {err} as its {label}, which gives no whole number; "
            "see --label"
        ) from err
    if not 0 <= number < 1 << 31:
        raise _RefusedError(f"sample {sample.shown} has the label {number}; labels count from 0")
    return number


def _array(content: bytes, name: str) -> np.ndarray:
    """Return the array of an .npy file, which must be as numpy.save writes it."""
    file = io.BytesIO(content)
    if not content.startswith(np.lib.format.MAGIC_PREFIX):
        raise _RefusedError(f"{name} {not_npy(content)}")
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("an npy version that numpy.save does not write for numbers")
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(
            file, max_header_size=_MAX_HEADER_BYTES
        )
    except NPY_HEADER_ERRORS as err:
        raise _RefusedError(f"{name} is no .npy file of numbers ({err}); write it anew") from err
    if problem := unusable(shape, dtype, is_fortran):
        raise _RefusedError(f"{name} {problem}")
    expected = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        expected, {"descr": dtype.str, "fortran_order": False, "shape": shape}
    )
    start = file.tell()
    if dtype.str[0] == ">" or content[:start] != expected.getvalue():
        raise _RefusedError(f"{name} was not written by numpy.save of today; write it anew")
    if len(content) != start + int(np.prod(shape)) * dtype.itemsize:
        raise _RefusedError(
            f"{name} is shorter or longer than its shape {shape} says; write it anew"
        )
    return np.frombuffer(content, dtype, offset=start).reshape(shape)


class _Uniform:
    """The shape and dtype that all arrays of a tar must have, and their least log-variance."""

    def __init__(self, kind: str) -> None:
        self.kind, self.shape, self.dtype = kind, (), ""
        self.log_variance_min = np.inf if kind == "moments" else -1.0

    def check(self, array: np.ndarray, name: str) -> None:
        """Refuse an array (C, H, W) or (2C, H, W) that is not as the others, or not finite."""
        if not self.shape:
            self.shape, self.dtype = array.shape, array.dtype.name
            if self.kind == "moments" and array.shape[0] % 2:
                raise _RefusedError(
                    f"arrays have {array.shape[0]} channels, but mean | log-variance are an even "
                    "number; use --kind latents for draws of the posterior"
                    f"{channels_last(array.shape)}"
                )
        if (array.shape, array.dtype.name) != (self.shape, self.dtype):
            raise _RefusedError(
                f"holds arrays {self.dtype} {self.shape} and {array.dtype.name} {array.shape}; all "
                "samples must have one shape and dtype"
            )
        if not np.isfinite(array).all():
            raise _RefusedError(
                f"{name} holds a value that is no number; write the tar without that sample"
            )

    def note_log_variance(self, array: np.ndarray) -> None:
        """Take the least log-variance of an array into account, where it has any."""
        if self.kind == "moments":
            least = float(array[len(array) // 2 :].astype(np.float64).min())
            self.log_variance_min = min(self.log_variance_min, least)


class _HashingReader:
    """Passes a file on to a reader of tars, hashing each byte once, the first time it is passed."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.count = file, hashlib.sha256(), 0

    def read(self, size: int, /) -> bytes:
        data = self.file.read(size)
        if new := max(0, self.file.tell() - self.count):
            self.digest.update(data[-new:])
            self.count += new
        return data

    def seek(self, offset: int, /) -> None:
        """Go to a place, reading what was not read before."""
        if offset > self.count:
            self.file.seek(self.count)
        while offset > self.count and self.read(min(_CHUNK_BYTES, offset - self.count)):
            pass
        self.file.seek(offset)

    def tell(self) -> int:
        return self.file.tell()

    def drain(self) -> None:
        """Read what is left."""
        self.file.seek(self.count)
        while self.read(_CHUNK_BYTES):
            pass
