"""Check every byte of one shard, and say what is wrong with it.

Headers are checked by the tar format's own sums, so a damaged one is found and its sample named;
the values have no sum but the shard's sha256. Where a shard does not look as it should, its members
are walked one after another to name the first that does not belong there.

n samples, C latent channels, H W latent size.
"""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_tools.errors import count_of
from data_tools.shards.foreign_tar import (
    RefusedTarError,
    first_foreign_member,
    index_name,
    walk_samples,
)
from data_tools.shards.manifest import DatasetManifest, Shard
from data_tools.shards.records import KEY_DIGITS, TAR_BLOCK
from data_tools.shards.sidecar import ShardTotals, add_samples
from data_tools.sources.tar_members import BadTarError
from data_tools.user_files.file_kinds import LFS_REASON, is_lfs_pointer_file

OTHER_BYTES = "its sha256 is not that of dataset.json"
_CHUNK_BYTES = 1 << 22
_NAME = slice(0, 100)  # fields of a tar header
_SIZE, _SIZE_DIGITS = 124, 11
_SUM, _SUM_DIGITS, _SUM_BYTES = 148, 6, 8
_LABEL_BYTES = 16  # a label has fewer digits
_HALF_EXPONENT = np.uint16(0x7C00)  # all ones in float16: infinite, or no number


@dataclass
class ShardContent:
    """What a shard holds, as far as it could be read."""

    problems: list[str] = field(default_factory=list)  # most telling first; empty: sound
    digest: str = ""  # sha256 of the file; "" if it could not be read
    # int64 (n,) of a data set of this project; empty for tars of others
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    totals: ShardTotals = field(default_factory=ShardTotals)  # of the samples that are sound
    num_samples: int = 0  # found


def read_shard(folder: Path, shard: Shard, manifest: DatasetManifest) -> ShardContent:
    """Read a shard from its first to its last byte and check all that it should hold."""
    path, content = folder / shard.name, ShardContent()
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if is_lfs_pointer_file(path):
                return ShardContent([LFS_REASON])
            if not shard.stride:
                content.digest = hashlib.file_digest(file, "sha256").hexdigest()
                _check_foreign(file, folder, shard, manifest, content)
            else:
                _StridedCheck(shard, manifest, content).run(file)
                looks_whole = content.problems and size == shard.bytes
                name = first_foreign_member(file, manifest.members) if looks_whole else None
                if name is not None:
                    what = f"holds the member {name!r}, which is no part of a sample"
                    content.problems.insert(0, what)
    except OSError as err:
        what = "is missing" if isinstance(err, FileNotFoundError) else _unreadable(err)
        return ShardContent([what])
    content.problems = _whole_file_problems(size, content, shard, manifest) + content.problems
    return content


def _unreadable(err: OSError) -> str:
    return f"cannot be read ({err.strerror})"


def _whole_file_problems(
    size: int, content: ShardContent, shard: Shard, manifest: DatasetManifest
) -> list[str]:
    """Compare size and checksum, and guess the cause from them."""
    if content.digest == shard.sha256:
        return []
    for other in manifest.shards:
        if content.digest == other.sha256:
            content.problems.clear()
            return [f"holds the bytes of {other.name}"]
    if size < shard.bytes:
        content.problems.clear()
        num_whole = size // shard.stride if shard.stride else 0
        where = f", after sample {num_whole - 1}" if num_whole else ""
        return [f"is cut off{where}: has {size} of {shard.bytes} bytes"]
    if size > shard.bytes:
        return [f"has {size} bytes, dataset.json says {shard.bytes}"]
    return [OTHER_BYTES]


class _StridedCheck:
    """The samples of a shard whose samples all take the same number of bytes."""

    def __init__(self, shard: Shard, manifest: DatasetManifest, content: ShardContent) -> None:
        self.shard, self.manifest, self.content = shard, manifest, content
        self.layout = manifest.latent.record_layout
        self.faults: dict[str, list[int]] = {}  # what: rows
        self.keys: list[np.ndarray] = []

    def run(self, file: BinaryIO) -> None:
        """Read the file once; hash and check it chunk by chunk."""
        stride, digest = self.shard.stride, hashlib.sha256()
        buffer = bytearray(max(1, _CHUNK_BYTES // stride) * stride)
        row = 0
        while row < self.shard.num_samples:
            wanted = min(len(buffer), (self.shard.num_samples - row) * stride)
            found = file.readinto(memoryview(buffer)[:wanted])  # full, but for the end of the file
            digest.update(memoryview(buffer)[:found])
            rows = found // stride
            block = np.frombuffer(buffer, np.uint8, rows * stride).reshape(rows, stride)
            self._check_block(block, row)
            row += rows
            if found < wanted:
                break
        self.content.num_samples = row
        self.content.keys = np.concatenate([np.empty(0, np.int64), *self.keys])
        self._report(row)
        self._check_tail(file, digest)
        self.content.digest = digest.hexdigest()

    def _report(self, num_rows: int) -> None:
        problems = self.content.problems
        if num_rows < self.shard.num_samples:
            problems.append(f"holds {count_of(num_rows, 'sample')}, not {self.shard.num_samples}")
        for what, rows in self.faults.items():
            others = f" and {len(rows) - 1} others" if len(rows) > 1 else ""
            problems.append(f"holds {what} in sample {rows[0]}{others}")
        keys = self.content.keys
        first_key = f"{keys[0]:0{KEY_DIGITS}d}" if len(keys) else ""
        if not self.faults and num_rows and first_key != self.shard.first_key:
            problems.append(f"begins with {first_key}, dataset.json says {self.shard.first_key}")

    def _check_tail(self, file: BinaryIO, digest: "hashlib._Hash") -> None:
        """Only zeros may follow the last sample."""
        is_clean = True
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            is_clean = is_clean and not np.frombuffer(chunk, np.uint8).any()
        if not is_clean and not self.faults:
            self.content.problems.append(
                f"holds more than {count_of(self.shard.num_samples, 'sample')}"
            )

    def _fault(self, what: str, is_bad: np.ndarray, first_row: int) -> None:
        if is_bad.any():
            rows = (np.flatnonzero(is_bad) + first_row).tolist()
            self.faults.setdefault(what, []).extend(rows)

    def _check_block(self, block: np.ndarray, first_row: int) -> None:
        """Check samples, uint8 (n, stride), and add up what they hold."""
        layout, latent = self.layout, self.manifest.latent
        if not len(block):
            return
        keys, is_sound = _digits(block[:, :KEY_DIGITS], 10)
        is_damaged = ~is_sound | ~_is_header(block[:, :TAR_BLOCK], keys, b".cls", None)
        labels, is_label = _labels(block[:, TAR_BLOCK : layout.label_bytes])
        places = [(b".moments.npy", layout.moments_offset)]
        places += [(b".flip.npy", layout.flip_offset)] if layout.has_flip else []
        header_bytes = TAR_BLOCK + len(layout.npy_header)
        npy_bytes = len(layout.npy_header) + layout.array_bytes
        for suffix, start in places:
            headers = block[:, start : start + header_bytes]
            is_damaged |= ~_is_header(headers[:, :TAR_BLOCK], keys, suffix, npy_bytes)
            is_array = (headers[:, TAR_BLOCK:] == layout.npy_header).all(axis=1)
            shape = "x".join(map(str, latent.shape))
            self._fault(f"an array that is no float16 {shape}", ~is_array & ~is_damaged, first_row)
            first = start + header_bytes
            values = np.ascontiguousarray(block[:, first : first + layout.array_bytes])
            values = values.view(np.uint16)
            is_odd = ((values & _HALF_EXPONENT) == _HALF_EXPONENT).any(axis=1)
            what = f"a value that is no number ({suffix.decode()[1:]})"
            self._fault(what, is_odd & is_array & ~is_damaged, first_row)
            if suffix == b".moments.npy":
                moments, is_good = values.view(np.float16), is_label & is_array & ~is_odd
        self._fault("a damaged header", is_damaged, first_row)
        self._fault("a label that is not a number", ~is_label & ~is_damaged, first_row)
        is_beyond = is_label & (labels >= max(1, self.manifest.num_classes))
        what = f"a label beyond the {count_of(max(1, self.manifest.num_classes), 'class')}"
        self._fault(what, is_beyond & ~is_damaged, first_row)
        is_good &= ~is_damaged
        arrays = moments[is_good].reshape(-1, *latent.shape)
        add_samples(self.content.totals, labels[is_good].tolist(), arrays)
        self.keys.append(keys)


def _digits(characters: np.ndarray, base: int) -> tuple[np.ndarray, np.ndarray]:
    """Parse fixed-width numbers, uint8 (n, width): int64 (n,) values, and whether they are."""
    digits = characters.astype(np.int64) - ord("0")
    powers = base ** np.arange(characters.shape[1] - 1, -1, -1, dtype=np.int64)
    return digits @ powers, ((digits >= 0) & (digits < base)).all(axis=1)


def _labels(contents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Parse the contents of label members: int64 (n,), and whether they are numbers, bool (n,)."""
    text = np.ascontiguousarray(contents[:, :_LABEL_BYTES]).view(f"S{_LABEL_BYTES}")[:, 0]
    is_number = np.char.isdigit(text)
    return np.where(is_number, text, b"0").astype(np.int64), is_number


def _is_header(
    headers: np.ndarray, keys: np.ndarray, suffix: bytes, num_bytes: int | None
) -> np.ndarray:
    """Test for tar headers, uint8 (n, 512), of the members KEY + suffix with num_bytes bytes."""
    field_sum = headers[:, _SUM : _SUM + _SUM_BYTES].sum(axis=1, dtype=np.int64)
    total = headers.sum(axis=1, dtype=np.int64) - field_sum + _SUM_BYTES * ord(" ")
    stated, is_good = _digits(headers[:, _SUM : _SUM + _SUM_DIGITS], 8)
    is_good &= stated == total
    found, is_number = _digits(headers[:, :KEY_DIGITS], 10)
    is_good &= is_number & (found == keys)
    expected = np.zeros(_NAME.stop - KEY_DIGITS, np.uint8)
    expected[: len(suffix)] = np.frombuffer(suffix, np.uint8)
    is_good &= (headers[:, KEY_DIGITS : _NAME.stop] == expected).all(axis=1)
    if num_bytes is not None:
        stated, is_number = _digits(headers[:, _SIZE : _SIZE + _SIZE_DIGITS], 8)
        is_good &= is_number & (stated == num_bytes)
    return is_good


def _check_foreign(
    file: BinaryIO, folder: Path, shard: Shard, manifest: DatasetManifest, content: ShardContent
) -> None:
    """Walk a tar that others wrote, and compare the index beside it with what was found."""
    found: list[tuple[int, int, int]] = []
    latent, num_classes = manifest.latent, max(1, manifest.num_classes)
    wanted = (tuple(latent.shape), latent.dtype)
    try:
        for sample in walk_samples(file, manifest.members):
            for name, array in sample.arrays.items():
                if (array.shape, array.dtype.name) != wanted:
                    raise RefusedTarError(
                        f"{name} is {array.dtype} {list(array.shape)}, dataset.json says "
                        f"{latent.dtype} {latent.shape}; copy it again"
                    )
                if not np.isfinite(array).all():
                    content.problems.append(f"a value that is no number in {name}")
            found.append(sample.row)
            if sample.label >= num_classes:
                content.problems.append(
                    f"label {sample.label} of {sample.key!r} is beyond the "
                    f"{count_of(num_classes, 'class')}"
                )
            add_samples(content.totals, [sample.label], sample.array[None], latent.kind)
    except BadTarError as err:
        content.problems.append(str(err).rpartition("; ")[0])
    found.sort()  # as an index has them; labels that stand elsewhere complete samples late
    content.num_samples = len(found)
    if len(found) != shard.num_samples:
        content.problems.append(f"holds {count_of(len(found), 'sample')}, not {shard.num_samples}")
    content.problems += _index_problems(folder / index_name(shard.name), shard, np.array(found))


def _index_problems(path: Path, shard: Shard, found: np.ndarray) -> list[str]:
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != shard.index_sha256:
            return [f"the sha256 of its index {path.name} is not that of dataset.json"]
        index = np.load(path, allow_pickle=False)
    except OSError as err:
        return [f"its index {path.name} {_unreadable(err)}"]
    except ValueError as err:
        return [f"its index {path.name} is no array ({err})"]
    if index.shape != found.shape or (index != found).any():
        return [f"its index {path.name} does not say where its samples lie"]
    return []
