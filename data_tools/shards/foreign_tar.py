"""Read the samples of a tar of latents that another program may have written.

Arrays must be stored as numpy.save stores them. Their headers are parsed without ever loading a
pickle.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from data_tools.shards.foreign_arrays import not_npy, unusable
from data_tools.shards.manifest import Members
from data_tools.shards.records import NPY_HEADER_ERRORS
from data_tools.sources.left_out import Tally
from data_tools.sources.sample_labels import LabelError
from data_tools.sources.sample_names import split_name
from data_tools.sources.tar_members import (
    BadTarError,
    SeekableFile,
    TarParts,
    content_of,
    grouped,
    walk,
)

_MAX_HEADER_BYTES = 4096  # of an npy file; numpy's own have 128


class RefusedTarError(BadTarError):
    """Something in a tar that cannot be used."""


@dataclass(frozen=True)
class TarSample:
    """One sample as its members say."""

    key: str  # what its members' names begin with
    # Of an index: where the content of the array's .npy member begins in the tar, and that of the
    # mirrored image or -1, in bytes; the label, 0 where the set has none.
    row: tuple[int, int, int]
    # (2C, H, W) or (C, H, W) by the names of their members; the mirrored image's second.
    arrays: dict[str, np.ndarray]

    @property
    def label(self) -> int:
        """The label."""
        return self.row[2]

    @property
    def array(self) -> np.ndarray:
        """The array of the image as it is."""
        return next(iter(self.arrays.values()))


def index_name(shard_name: str) -> str:
    """Name the file that says where the samples of a tar by others lie."""
    return shard_name.removesuffix(".tar") + ".index.npy"


def first_foreign_member(file: BinaryIO, members: Members) -> str | None:
    """Return the name of the first member that is no part of a sample; None if there is none."""
    try:
        for member in walk(file):
            if not member.is_plain or split_name(member.name)[1] not in members.suffixes:
                return member.shown
    except BadTarError:
        return None  # damaged: the checks of the samples say where
    return None


def walk_samples(
    file: SeekableFile, members: Members, left_out: Tally | None = None
) -> Iterator[TarSample]:
    """Read all samples of a tar in order; `left_out` counts all other members.

    Raises:
        BadTarError: a header is damaged, a part is missing, occurs twice, or is no array or label
            that can be used; a clause that follows the tar's name, and what to do.
    """
    for parts in grouped(walk(file), members.suffixes, left_out):
        arrays, offsets = {}, []
        for suffix in filter(None, (members.array, members.flip)):
            member = parts.by_suffix[suffix]
            name = f"{parts.shown}.{suffix}"
            arrays[name] = _array(content_of(file, member), name)
            offsets.append(member.offset_data)
        flip_offset = offsets[1] if members.flip else -1
        row = (offsets[0], flip_offset, _label(file, parts, members.label))
        yield TarSample(parts.key, row, arrays)


def _label(file: SeekableFile, parts: TarParts, label: str) -> int:
    try:
        number = parts.label(file, label)
    except LabelError as err:
        raise RefusedTarError(
            f"sample {parts.shown} has {err} as its {label}, which gives no whole number; "
            "see --label"
        ) from err
    if not 0 <= number < 1 << 31:
        raise RefusedTarError(f"sample {parts.shown} has the label {number}; labels count from 0")
    return number


def _array(content: bytes, name: str) -> np.ndarray:
    """Return the array of an .npy file, which must be as numpy.save writes it."""
    file = io.BytesIO(content)
    if not content.startswith(np.lib.format.MAGIC_PREFIX):
        raise RefusedTarError(f"{name} {not_npy(content)}")
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("an npy version that numpy.save does not write for numbers")
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(
            file, max_header_size=_MAX_HEADER_BYTES
        )
    except NPY_HEADER_ERRORS as err:
        raise RefusedTarError(f"{name} is no .npy file of numbers ({err}); write it anew") from err
    if problem := unusable(shape, dtype, is_fortran):
        raise RefusedTarError(f"{name} {problem}")
    expected = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        expected, {"descr": dtype.str, "fortran_order": False, "shape": shape}
    )
    start = file.tell()
    if dtype.str[0] == ">" or content[:start] != expected.getvalue():
        raise RefusedTarError(f"{name} was not written by numpy.save of today; write it anew")
    if len(content) != start + int(np.prod(shape)) * dtype.itemsize:
        raise RefusedTarError(
            f"{name} is shorter or longer than its shape {shape} says; write it anew"
        )
    return np.frombuffer(content, dtype, offset=start).reshape(shape)
