"""Walking the members of a tar of latents that may have been written by others."""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from data_tools.manifest import LatentFormat, Members
from data_tools.records import NPY_HEADER_ERRORS, DamagedRecordError

_MAX_LABEL_BYTES = 1 << 20
_SHOWN_NAME = 80  # characters of a member's name in a message


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


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name as webdataset does: at the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    key, _, suffix = base.partition(".")
    return folder + slash + key, suffix


def first_foreign_member(file: BinaryIO, members: Members) -> str | None:
    """Return the name of the first member that is no part of a sample; None if there is none."""
    known = {members.array, members.flip, members.label.partition(":")[0]} - {""}
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if not member.isfile() or split_name(member.name)[1] not in known:
                    return member.name[:_SHOWN_NAME]
    except (tarfile.TarError, ValueError):
        return None  # damaged: the checks of the samples say where
    return None


def walk_samples(file: BinaryIO, members: Members, latent: LatentFormat) -> Iterator[TarSample]:
    """Read all samples of a tar in order.

    Raises:
        DamagedRecordError: a header is damaged, a part is missing, occurs twice or is not what
            `latent` says; nothing in the file is ever unpickled.
    """
    file.seek(0)
    seen: set[str] = set()
    parts: dict[str, tarfile.TarInfo] = {}
    current = ""
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                key, suffix = split_name(member.name)
                if not member.isfile():
                    continue
                if key != current and parts:
                    yield _sample(file, current, parts, members, latent)
                    parts = {}
                if key != current and key in seen:
                    raise DamagedRecordError(f"holds the key {key[:_SHOWN_NAME]!r} twice")
                if suffix in parts:
                    raise DamagedRecordError(f"holds {member.name[:_SHOWN_NAME]!r} twice")
                seen.add(key)
                current, parts[suffix] = key, member
    except (tarfile.TarError, ValueError) as err:
        raise DamagedRecordError(f"is no tar ({err})") from err
    if parts:
        yield _sample(file, current, parts, members, latent)
    file.seek(end)
    while chunk := file.read(1 << 20):  # tarfile takes a damaged header for the end
        if any(chunk):
            raise DamagedRecordError(f"a damaged header follows sample {current[:_SHOWN_NAME]!r}")


def _sample(
    file: BinaryIO,
    key: str,
    parts: dict[str, tarfile.TarInfo],
    members: Members,
    latent: LatentFormat,
) -> TarSample:
    shown = key[:_SHOWN_NAME]
    label_suffix, _, json_key = members.label.partition(":")  # "json:KEY" is a field of KEY.json
    for suffix in (members.array, members.flip, label_suffix):
        if suffix and suffix not in parts:
            raise DamagedRecordError(f"sample {shown!r} has no .{suffix}")
    array_offset, values = _array(file, parts[members.array], shown, latent)
    flip_offset = -1
    if members.flip:
        flip_offset, flipped = _array(file, parts[members.flip], shown, latent)
        if not np.isfinite(flipped).all():
            raise DamagedRecordError(f"a value that is no number in the mirrored {shown!r}")
    label = 0
    if label_suffix:
        member = parts[label_suffix]
        file.seek(member.offset_data)
        label = _label(file.read(min(member.size, _MAX_LABEL_BYTES)), json_key, shown)
    return TarSample(key, array_offset, flip_offset, label, values)


def _label(text: bytes, json_key: str, shown: str) -> int:
    try:
        value = json.loads(text)[json_key] if json_key else int(text)
    except (ValueError, KeyError, TypeError):
        value = None
    if type(value) is not int:
        raise DamagedRecordError(f"the label of sample {shown!r} is not a number")
    return value


def _array(
    file: BinaryIO, member: tarfile.TarInfo, shown: str, latent: LatentFormat
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
