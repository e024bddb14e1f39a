"""Read the samples of a tar of latents that another program may have written."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from data_tools.shards.manifest import LatentFormat, Members
from data_tools.shards.records import NPY_HEADER_ERRORS, DamagedRecordError
from data_tools.sources.sample_labels import LabelError
from data_tools.sources.sample_names import split_name
from data_tools.sources.tar_members import BadTarError, Member, walk
from data_tools.sources.tar_samples import TarParts, grouped


@dataclass(frozen=True)
class TarSample:
    """One sample as its members say.

    Attributes:
        key: what its members' names begin with.
        array_offset: of the .npy member's content, in bytes from the start of the tar.
        flip_offset: likewise of the mirrored image; -1 where there is none.
        label: 0 where the set has no labels.
        values: the stored array, (2C, H, W) or (C, H, W).
    """

    key: str
    array_offset: int
    flip_offset: int
    label: int
    values: np.ndarray


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


def walk_samples(file: BinaryIO, members: Members, latent: LatentFormat) -> Iterator[TarSample]:
    """Read all samples of a tar in order.

    Raises:
        DamagedRecordError: a header is damaged, a part is missing, occurs twice or is not what
            `latent` says; nothing in the file is ever unpickled.
    """
    try:
        for sample in grouped(walk(file), members.suffixes):
            yield _sample(file, sample, members, latent)
    except BadTarError as err:
        raise DamagedRecordError(str(err).rpartition("; ")[0]) from err


def _sample(file: BinaryIO, sample: TarParts, members: Members, latent: LatentFormat) -> TarSample:
    shown, parts = sample.shown, sample.by_suffix
    array_offset, values = _array(file, parts[members.array], shown, latent)
    flip_offset = -1
    if members.flip:
        flip_offset, flipped = _array(file, parts[members.flip], shown, latent)
        if not np.isfinite(flipped).all():
            raise DamagedRecordError(f"a value that is no number in the mirrored {shown!r}")
    try:
        label = sample.label(file, members.label)
    except LabelError as err:
        raise DamagedRecordError(f"the label of sample {shown!r} is not a number") from err
    return TarSample(sample.key, array_offset, flip_offset, label, values)


def _array(
    file: BinaryIO, member: Member, shown: str, latent: LatentFormat
) -> tuple[int, np.ndarray]:
    file.seek(member.offset_data)
    try:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, is_fortran, dtype = read(file)
    except NPY_HEADER_ERRORS as err:
        raise DamagedRecordError(f"sample {shown!r} holds no .npy array ({err})") from err
    if list(shape) != latent.shape or dtype != np.dtype(latent.dtype) or is_fortran:
        raise DamagedRecordError(
            f"sample {shown!r} is {dtype} {list(shape)}, dataset.json says {latent.dtype} "
            f"{latent.shape}"
        )
    data = file.read(dtype.itemsize * int(np.prod(shape)))
    if len(data) != dtype.itemsize * int(np.prod(shape)):
        raise DamagedRecordError(f"ends inside sample {shown!r}")
    return member.offset_data, np.frombuffer(data, dtype).reshape(shape)
