"""Index a tar of latents that another program wrote, in one pass over it.

A sample's members share a key, see sources/tar_members.py. To read any sample at once, a run needs
the offsets of its arrays and its label; these go into an index beside dataset.json. All arrays must
have one shape and dtype.

C latent channels, H W latent size.
"""

import hashlib
import io
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from data_tools.errors import ConfigError, os_errors_as
from data_tools.files import SINCE
from data_tools.formats import Format
from data_tools.shards.foreign_arrays import channels_last
from data_tools.shards.foreign_tar import RefusedTarError, TarSample, walk_samples
from data_tools.shards.manifest import Members
from data_tools.shards.records import npy_bytes
from data_tools.shards.sidecar import ShardTotals, add_samples
from data_tools.sources.left_out import LeftOut, Tally, sentence
from data_tools.sources.tar_members import BadTarError, IncompleteSampleError
from data_tools.storage.fetch import read_small
from data_tools.storage.locations import Location

_MAX_REMOTE_BYTES = 1 << 33  # of one tar, which is held in memory while it is scanned
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class WantedMembers(Members):
    """Which members of a sample are what, and what the arrays hold."""

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
            os_errors_as(f"--input {where}: cannot be read", "give tars that are there"),
            (location.folder / name).open("rb") as file,
        ):
            return _scan(file, wanted)
    except BadTarError as err:
        raise ConfigError(f"--input {where}: {err}.") from err


def _scan(file: BinaryIO, wanted: WantedMembers) -> tuple[ScannedShard, bytes]:
    hashing, left_out = _HashingReader(file), Tally()
    uniform, totals = _Uniform(wanted.kind), ShardTotals()
    rows: list[tuple[int, int, int]] = []
    first_key = ""
    try:
        for sample in walk_samples(hashing, wanted, left_out):
            uniform.check(sample)
            add_samples(totals, [sample.label], sample.array[None], wanted.kind)
            first_key = first_key or sample.key
            rows.append(sample.row)
    except IncompleteSampleError as err:
        there = f"; the tar has {sentence(left_out.entries())}" if left_out else ""
        raise RefusedTarError(f"{err}{there}") from err
    hashing.drain()
    if not rows:
        there = f" (it has {sentence(left_out.entries())})" if left_out else ""
        raise RefusedTarError(f"holds no samples{there}; see --array")
    rows.sort()  # labels that stand elsewhere complete samples late
    index = npy_bytes(np.array(rows, np.dtype("<i8")))
    found = ScannedShard(
        wanted=wanted,
        num_samples=len(rows),
        bytes=hashing.count,
        sha256=hashing.digest.hexdigest(),
        index_sha256=hashlib.sha256(index).hexdigest(),
        first_key=first_key,
        shape=list(uniform.shape),
        dtype=uniform.dtype,
        label_counts=totals.class_counts,
        channel_sum=totals.channel_sum,
        channel_square_sum=totals.channel_square_sum,
        left_out=left_out.entries(),
        log_variance_min=uniform.log_variance_min,
    )
    return found, index


class _Uniform:
    """The shape and dtype that all arrays of a tar must have, and their least log-variance."""

    def __init__(self, kind: str) -> None:
        self.kind, self.shape, self.dtype = kind, (), ""
        self.log_variance_min = np.inf if kind == "moments" else -1.0

    def check(self, sample: TarSample) -> None:
        """Refuse arrays (C, H, W) or (2C, H, W) that are not as the others, or not finite."""
        first = sample.array
        if not self.shape:
            self.shape, self.dtype = first.shape, first.dtype.name
            if self.kind == "moments" and len(first) % 2:
                raise RefusedTarError(
                    f"arrays have {len(first)} channels, but mean | log-variance are an even "
                    "number; use --kind latents for draws of the posterior"
                    f"{channels_last(first.shape)}"
                )
        for name, array in sample.arrays.items():
            if (array.shape, array.dtype.name) != (self.shape, self.dtype):
                raise RefusedTarError(
                    f"holds arrays {self.dtype} {self.shape} and {array.dtype.name} "
                    f"{array.shape}; all samples must have one shape and dtype"
                )
            if not np.isfinite(array).all():
                raise RefusedTarError(
                    f"{name} holds a value that is no number; write the tar without that sample"
                )
        if self.kind == "moments":
            least = float(first[len(first) // 2 :].min())
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
