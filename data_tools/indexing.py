"""Tars of latents that others wrote: what is in them and where, found in one pass.

A tar of a webdataset holds a sample's members one after the other, under one key. What a run needs
to read any of them at once is the offset of its arrays and its label, which go into an index beside
dataset.json. Arrays must all be of one shape and dtype and stored as numpy.save stores them; their
headers are parsed without ever loading a pickle.

C latent channels, H W latent size.
"""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np

from data_tools.errors import ConfigError
from data_tools.formats import Format
from data_tools.locations import Location
from data_tools.records import NPY_HEADER_ERRORS, TAR_BLOCK
from data_tools.remote import read_small
from models.latents import LOG_VARIANCE_MAX, LOG_VARIANCE_MIN

DTYPES = ("float16", "float32")
_MAX_HEADER_BYTES = 4096  # of an npy file; numpy's own have 128
_MAX_REMOTE_BYTES = 1 << 33  # of one tar, which is held in memory while it is scanned
_JSON = "json:"
# As webdataset cuts names: the key ends at the first dot of the last part of the path.
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")


@dataclass(frozen=True)
class Wanted:
    """Which members of a sample are what, by the suffix after its key and a dot."""

    array: str
    flip: str  # "": there are no latents of mirrored images
    label: str  # "": no labels; "json:FIELD": a field of the member json
    kind: str  # "moments" or "latents"


@dataclass(frozen=True)
class ScannedShard:
    """What one pass over a tar found; kept beside its index, so that a scan can be continued."""

    wanted: Wanted
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


NOTES = Format(newest=1, kind=ScannedShard)


class _RefusedError(Exception):
    """Something in a tar that cannot be used; the caller names the tar."""


def scan(location: Location, name: str, wanted: Wanted) -> tuple[ScannedShard, bytes]:
    """Read a tar from its beginning to its end.

    Returns:
        what it holds, and its index as the content of an .npy file: int64 (n, 3), offsets of the
        array and of the mirrored one or -1, and the label.
    """
    where = location.describe(name)
    try:
        if location.folder is None:
            return _scan(io.BytesIO(read_small(location, name, _MAX_REMOTE_BYTES)), wanted)
        with (location.folder / name).open("rb") as file:
            return _scan(file, wanted)
    except OSError as err:
        raise ConfigError(
            f"--input {where}: cannot be read ({err.strerror}); give tars that are there."
        ) from err
    except tarfile.TarError as err:
        raise ConfigError(f"--input {where}: is no whole tar ({err}); copy it again.") from err
    except _RefusedError as err:
        raise ConfigError(f"--input {where}: {err}.") from err


def _scan(file: IO[bytes], wanted: Wanted) -> tuple[ScannedShard, bytes]:
    hashing = _HashingReader(file)
    sums = _Sums(wanted.kind)
    rows, counts, first_key = [], {}, ""
    with tarfile.open(fileobj=hashing, mode="r|") as tar:
        for key, members in _samples(tar, wanted):
            label = _label(members, key, wanted.label)
            if not 0 <= label < 1 << 31:
                raise _RefusedError(f"sample {key} has the label {label}; labels count from 0")
            first_key = first_key or key
            flip_offset = -1
            for suffix in filter(None, (wanted.array, wanted.flip)):
                if suffix not in members:
                    raise _RefusedError(f"sample {key} has no {suffix}; see --array and --flip")
                content, offset = members[suffix]
                sums.add(_array(content, f"{key}.{suffix}"), suffix == wanted.array)
                flip_offset = offset if suffix == wanted.flip else -1
            rows.append((members[wanted.array][1], flip_offset, label))
            counts[str(label)] = counts.get(str(label), 0) + 1
        end = tar.offset  # in the file, of the last member that tarfile could read
    hashing.drain()
    if not rows:
        raise _RefusedError("holds no samples; see --array")
    if hashing.data_end > end:  # tarfile takes a damaged header for the end
        raise _RefusedError(
            f"has a damaged header after {end:,} bytes, behind sample {key}; copy it again"
        )
    if any(hashing.end):
        raise _RefusedError("does not end as a tar does, so its last samples may be missing")
    index = io.BytesIO()
    np.save(index, np.array(rows, np.dtype("<i8")))
    found = ScannedShard(
        wanted=wanted,
        num_samples=len(rows),
        bytes=hashing.count,
        sha256=hashing.digest.hexdigest(),
        index_sha256=hashlib.sha256(index.getvalue()).hexdigest(),
        first_key=first_key,
        shape=list(sums.shape),
        dtype=sums.dtype,
        label_counts=counts,
        channel_sum=sums.total.tolist(),
        channel_square_sum=sums.squares.tolist(),
    )
    return found, index.getvalue()


def _samples(
    tar: tarfile.TarFile, wanted: Wanted
) -> Iterator[tuple[str, dict[str, tuple[bytes, int]]]]:
    """Yield keys with their members' contents and offsets, by suffix; only what is wanted."""
    label = "json" if wanted.label.startswith(_JSON) else wanted.label
    suffixes = {wanted.array, wanted.flip, label} - {""}
    key, members = None, {}
    for member in tar:
        name = _NAME.fullmatch(member.name)
        # The content of a sparse member does not lie in the tar as it is.
        if not member.isreg() or member.issparse() or name is None:
            continue
        if name[1] != key:
            if members:
                yield key, members
            key, members = name[1], {}
        if name[2] in suffixes:
            if name[2] in members:
                raise _RefusedError(f"sample {key} has two {name[2]}; rename one of them")
            members[name[2]] = (tar.extractfile(member).read(), member.offset_data)
    if members:
        yield key, members


def _label(members: dict[str, tuple[bytes, int]], key: str, label: str) -> int:
    if not label:
        return 0
    suffix, _, field = label.partition(":")
    if suffix not in members:
        raise _RefusedError(f"sample {key} has no {suffix}; see --label")
    text = members[suffix][0]
    try:
        if not field:
            return int(text)
        value = json.loads(text)[field]
        if type(value) is not int:
            raise ValueError("not a whole number")
        return value
    except (ValueError, KeyError, TypeError) as err:
        raise _RefusedError(
            f"sample {key} has {text[:40]!r} as its {label}, which gives no whole number; "
            "see --label"
        ) from err


def _array(content: bytes, name: str) -> np.ndarray:
    """Return the array of an .npy file, which must be as numpy.save writes it."""
    file = io.BytesIO(content)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("an npy version that numpy.save does not write for numbers")
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(
            file, max_header_size=_MAX_HEADER_BYTES
        )
    except NPY_HEADER_ERRORS as err:
        raise _RefusedError(f"{name} is no .npy file of numbers ({err}); write it anew") from err
    if is_fortran or len(shape) != 3 or dtype.newbyteorder("=").name not in DTYPES:
        raise _RefusedError(
            f"{name} holds {dtype} {shape}; (channels, height, width) of float16 or float32 in C "
            "order can be read"
        )
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


class _Sums:
    """Sums over posterior draws per channel, and the shape and dtype that all arrays have."""

    def __init__(self, kind: str) -> None:
        self.kind, self.shape, self.dtype = kind, (), ""
        self.total = self.squares = np.zeros(0)

    def add(self, array: np.ndarray, is_counted: bool) -> None:
        """Check an array (C, H, W) or (2C, H, W); mirrored ones are not counted."""
        if not self.shape:
            self.shape, self.dtype = array.shape, array.dtype.name
            if self.kind == "moments" and array.shape[0] % 2:
                raise _RefusedError(
                    f"arrays have {array.shape[0]} channels, but mean | log-variance are an even "
                    "number; use --kind latents for draws of the posterior"
                )
        if (array.shape, array.dtype.name) != (self.shape, self.dtype):
            raise _RefusedError(
                f"holds arrays {self.dtype} {self.shape} and {array.dtype.name} {array.shape}; all "
                "samples must have one shape and dtype"
            )
        if not np.isfinite(array).all():
            raise _RefusedError(
                "holds an array with a value that is no number; write the tar without that sample"
            )
        if not is_counted:
            return
        values, variance = array.astype(np.float64), 0.0
        if self.kind == "moments":
            values, log_variance = np.split(values, 2)
            variance = np.exp(log_variance.clip(LOG_VARIANCE_MIN, LOG_VARIANCE_MAX))
        if not len(self.total):
            self.total = self.squares = np.zeros(len(values))
        self.total = self.total + values.sum(axis=(1, 2))
        self.squares = self.squares + (values**2 + variance).sum(axis=(1, 2))


class _HashingReader:
    """Passes a file on, and knows its size, its sha256, its last two blocks, where zeros begin."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.count, self.end = file, hashlib.sha256(), 0, b""
        self.data_end = 0

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        if length := len(data.rstrip(b"\0")):
            self.data_end = self.count + length
        self.count += len(data)
        self.end = (self.end + data)[-2 * TAR_BLOCK :]
        return data

    def drain(self) -> None:
        """Read what the tar's end left."""
        while self.read(1 << 20):
            pass
