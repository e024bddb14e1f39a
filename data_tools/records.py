"""The bytes of one sample inside a shard.

A shard is an ordinary webdataset tar. Each sample is KEY.cls (the label in ASCII), KEY.moments.npy
(raw latents, float16 (2C, H, W)) and, if mirrored images were encoded too, KEY.flip.npy. All
samples of a data set have the same shape, so every sample takes the same number of bytes: sample i
starts at i * stride, and training reads it without an index and without walking the tar.

N batch, C latent channels, H W latent size.
"""

import io
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO

import numpy as np
import webdataset as wds

TAR_BLOCK = 512  # tar pads headers and contents to this many bytes
KEY_DIGITS = 8
_NAME_BYTES = 100  # the file name is the first field of a tar header


@dataclass(frozen=True)
class Sample:
    """One encoded image."""

    key: int  # its place in the sorted list of image files
    label: int
    moments: np.ndarray  # float16 (2C, H, W)
    flip: np.ndarray | None  # likewise, of the mirrored image


class DamagedRecordError(Exception):
    """The bytes at a sample's place are not that sample."""


def sample_key(index: int) -> str:
    """Name the sample of the index-th image file; a fixed width keeps the file names aligned."""
    assert 0 <= index < 10**KEY_DIGITS, "more images than a key has digits for"
    return f"{index:0{KEY_DIGITS}d}"


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // TAR_BLOCK) * TAR_BLOCK


class RecordLayout:
    """Where the parts of a sample lie, in bytes from its start; follows from shape and flip."""

    def __init__(self, shape: tuple[int, int, int], has_flip: bool) -> None:
        """Compute the layout for raw latents of `shape` (2C, H, W)."""
        self.shape, self.has_flip = shape, has_flip
        self.array_bytes = math.prod(shape) * 2  # float16
        empty = _npy(np.zeros(shape, np.float16))
        self.npy_header = np.frombuffer(empty[: len(empty) - self.array_bytes], np.uint8)
        member = TAR_BLOCK + _padded(len(empty))
        self.label_bytes = 2 * TAR_BLOCK  # header and content of KEY.cls
        self.moments_offset = self.label_bytes
        self.flip_offset = self.label_bytes + member
        self.stride = self.label_bytes + member * (2 if has_flip else 1)

    def write(self, file: IO[bytes], samples: Iterable[Sample]) -> int:
        """Write a whole tar; the same samples give the same bytes.

        Returns:
            the number of samples.
        """
        count = 0
        # mtime=0: the time of writing must not change the checksum of a shard.
        with wds.TarWriter(file, encoder=False, mtime=0) as writer:
            for sample in samples:
                assert sample.moments.shape == self.shape and sample.moments.dtype == np.float16
                assert (sample.flip is not None) == self.has_flip, "flip: all samples or none"
                key = {"__key__": sample_key(sample.key)}
                label = str(sample.label).encode()
                writer.write(key | {"cls": label, "moments.npy": _npy(sample.moments)})
                if sample.flip is not None:  # apart, because TarWriter sorts the parts by name
                    writer.write(key | {"flip.npy": _npy(sample.flip)})
                count += 1
                assert writer.tarstream.offset == count * self.stride, "a sample's size differs"
        return count

    def read(
        self,
        descriptor: int,
        row: int,
        label: np.ndarray,
        header: np.ndarray,
        array: np.ndarray,
        use_flip: bool,
    ) -> None:
        """Read one sample into the rows of a batch's buffers, unchecked.

        Args:
            descriptor: of the open shard.
            row: the sample's place in the shard.
            label: uint8 (label_bytes,), filled with the first member.
            header: uint8 (header_bytes,), filled with the array's tar and npy headers.
            array: uint8 (array_bytes,), filled with the float16 values.
            use_flip: read the mirrored image's moments.
        """
        start = row * self.stride
        offset = start + (self.flip_offset if use_flip else self.moments_offset)
        found = os.preadv(descriptor, [label], start)
        found += os.preadv(descriptor, [header, array], offset)
        if found != self.label_bytes + self.header_bytes + self.array_bytes:
            raise DamagedRecordError(f"ends inside sample {row}")

    @property
    def header_bytes(self) -> int:
        """Bytes between the start of an array's tar header and its first value."""
        return TAR_BLOCK + len(self.npy_header)

    def check(self, labels: np.ndarray, headers: np.ndarray, use_flip: np.ndarray) -> np.ndarray:
        """Check that what was read are the expected members, and parse the labels.

        A wrong offset, a foreign tar or a damaged header is found here, on every sample; damaged
        values are not, only the shard's sha256 tells.

        Args:
            labels: uint8 (N, label_bytes).
            headers: uint8 (N, header_bytes).
            use_flip: bool (N,), which array was read.

        Returns:
            int64 (N,) labels.
        """
        keys = labels[:, :KEY_DIGITS]
        is_good = (headers[:, TAR_BLOCK:] == self.npy_header).all(axis=1)
        is_good &= (headers[:, :KEY_DIGITS] == keys).all(axis=1)
        is_good &= _has_suffix(labels, b".cls")
        is_good &= np.where(
            use_flip, _has_suffix(headers, b".flip.npy"), _has_suffix(headers, b".moments.npy")
        )
        if not is_good.all():
            raise DamagedRecordError("holds other bytes than a sample where one should start")
        contents = labels[:, TAR_BLOCK:]
        try:
            # The block is filled up with zero bytes, which end a numpy string.
            return np.ascontiguousarray(contents[:, :16]).view("S16")[:, 0].astype(np.int64)
        except ValueError as err:
            raise DamagedRecordError("holds a label that is not a number") from err


def _has_suffix(headers: np.ndarray, suffix: bytes) -> np.ndarray:
    """Test whether the file names in tar headers (N, >= 512) end like this, bool (N,)."""
    expected = np.zeros(_NAME_BYTES - KEY_DIGITS, np.uint8)
    expected[: len(suffix)] = np.frombuffer(suffix, np.uint8)
    return (headers[:, KEY_DIGITS:_NAME_BYTES] == expected).all(axis=1)
