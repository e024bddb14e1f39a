"""The bytes of one sample inside a shard.

A shard is an ordinary webdataset tar. Each sample is KEY.cls (the label in ASCII), KEY.moments.npy
(raw latents, float16 (2C, H, W)) and, if mirrored images were encoded too, KEY.flip.npy. All
samples of a data set have the same shape, so every sample takes the same number of bytes: sample i
starts at i * stride, and training reads it without an index and without walking the tar. Tars that
others wrote are read at the offsets of an index (shards/foreign_index.py).

N batch, C latent channels, H W latent size.
"""

import io
import math
import os
import tokenize
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
import webdataset as wds

TAR_BLOCK = 512  # tar pads headers and contents to this many bytes
KEY_DIGITS = 8
# What numpy raises for the header of an npy file, by what is damaged in it.
NPY_HEADER_ERRORS = (ValueError, TypeError, SyntaxError, tokenize.TokenError)
_NAME_BYTES = 96  # of the name, which is the first field of a tar header and has 100
_WORD = 8  # bytes that are compared at once


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


def npy_bytes(array: np.ndarray) -> bytes:
    """Return an array as the content of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


class RecordLayout:
    """Where the parts of a sample lie, in bytes from its start; follows from shape and flip."""

    def __init__(self, shape: Sequence[int], has_flip: bool) -> None:
        """Compute the layout for raw latents of `shape` (2C, H, W)."""
        self.shape, self.has_flip = tuple(shape), has_flip
        self.array_bytes = math.prod(shape) * 2  # float16
        empty = npy_bytes(np.zeros(shape, np.float16))
        self.npy_header = np.frombuffer(empty[: len(empty) - self.array_bytes], np.uint8)
        member = TAR_BLOCK * (1 + -(-len(empty) // TAR_BLOCK))  # header, and content filled up
        self.label_bytes = 2 * TAR_BLOCK  # header and content of KEY.cls
        self.moments_offset = self.label_bytes
        self.flip_offset = self.label_bytes + member
        self.stride = self.label_bytes + member * (2 if has_flip else 1)
        # A label's member, and the array's tar header and npy header.
        self.head_bytes = self.label_bytes + TAR_BLOCK + len(self.npy_header)

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
                writer.write(key | {"cls": label, "moments.npy": npy_bytes(sample.moments)})
                if sample.flip is not None:  # apart, because TarWriter sorts the parts by name
                    writer.write(key | {"flip.npy": npy_bytes(sample.flip)})
                count += 1
                assert writer.tarstream.offset == count * self.stride, "a sample's size differs"
        return count

    def read_rows(
        self,
        descriptor: int,
        rows: list[int],
        use_flip: list[bool],
        heads: list[memoryview],
        arrays: list[memoryview],
    ) -> None:
        """Read samples of a shard, unchecked.

        Args:
            rows: the N samples' places in the shard.
            use_flip: read the mirrored image's array.
            heads: N of head_bytes, filled with the label's member and the array's headers.
            arrays: N of array_bytes, filled with the values.

        Raises:
            DamagedRecordError: the shard ends too early.
        """
        preadv, stride, whole = os.preadv, self.stride, self.head_bytes + self.array_bytes
        for row, is_flip, head, array in zip(rows, use_flip, heads, arrays, strict=True):
            start = row * stride
            if not is_flip:  # all that is needed lies together
                if preadv(descriptor, (head, array), start) != whole:
                    read_fully(descriptor, (head, array), start)
            else:
                read_fully(descriptor, (head[: self.label_bytes],), start)
                read_fully(descriptor, (head[self.label_bytes :], array), start + self.flip_offset)

    def check(self, heads: np.ndarray, use_flip: np.ndarray) -> np.ndarray:
        """Check that what was read are the expected members, and parse the labels.

        A wrong offset, a foreign tar or a damaged header is found here, on every sample; damaged
        values are not, only the shard's sha256 tells.

        Args:
            heads: uint8 (N, head_bytes), rows of whole words.
            use_flip: bool (N,), which array was read.

        Returns:
            int64 (N,) labels.
        """
        words = heads.view(np.uint64)  # (N, head_bytes / 8); the key is the first word of a header
        name = slice(KEY_DIGITS // _WORD, _NAME_BYTES // _WORD)
        header = words[:, self.label_bytes // _WORD :]
        is_good = (header[:, TAR_BLOCK // _WORD :] == self.npy_header.view(np.uint64)).all(axis=1)
        is_good &= header[:, 0] == words[:, 0]
        is_good &= (words[:, name] == _LABEL_NAME).all(axis=1)
        expected = np.where(use_flip[:, None], _FLIP_NAME, _ARRAY_NAME)
        is_good &= (header[:, name] == expected).all(axis=1)
        if not is_good.all():
            raise DamagedRecordError("holds other bytes than a sample where one should start")
        try:
            # The block is filled up with zero bytes, which end a numpy string.
            contents = np.ascontiguousarray(heads[:, TAR_BLOCK : TAR_BLOCK + 16])
            return contents.view("S16")[:, 0].astype(np.int64)
        except ValueError as err:
            raise DamagedRecordError("holds a label that is not a number") from err


class IndexedLayout:
    """How samples are read from tars of others: at the offsets of an index.

    An index is int64 (n, 3): the offsets in the tar of the array's .npy file and of the mirrored
    image's (-1: none), and the label.
    """

    def __init__(self, shape: Sequence[int], dtype: str) -> None:
        """Compute the layout for arrays of `shape` and `dtype` (float16 or float32)."""
        self.array_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        empty = npy_bytes(np.zeros(shape, dtype))
        self.npy_header = np.frombuffer(empty[: len(empty) - self.array_bytes], np.uint8)
        self.head_bytes = len(self.npy_header)

    def read_rows(
        self,
        descriptor: int,
        offsets: np.ndarray,
        heads: list[memoryview],
        arrays: list[memoryview],
    ) -> None:
        """Read the samples whose arrays lie at `offsets` (N,); else as `RecordLayout.read_rows`."""
        for offset, head, array in zip(offsets.tolist(), heads, arrays, strict=True):
            read_fully(descriptor, (head, array), offset)

    def check(self, heads: np.ndarray) -> None:
        """Check the npy headers, uint8 (N, head_bytes)."""
        if not (heads.view(np.uint64) == self.npy_header.view(np.uint64)).all():
            raise DamagedRecordError("holds other bytes than an array where its index has one")


def read_fully(descriptor: int, buffers: tuple[memoryview, ...], offset: int) -> None:
    """Fill buffers with the bytes from an offset on, however many a file system gives at once."""
    found = os.preadv(descriptor, buffers, offset)
    if found == sum(len(buffer) for buffer in buffers):
        return
    for buffer in buffers:
        done = min(found, len(buffer))
        found -= done
        offset += done
        while done < len(buffer):
            more = os.preadv(descriptor, (buffer[done:],), offset)
            if more == 0:
                raise DamagedRecordError("ends inside a sample")
            done += more
            offset += more


def _name_words(suffix: bytes) -> np.ndarray:
    """Return the words that follow the key in the name of a tar member."""
    name = np.zeros(_NAME_BYTES - KEY_DIGITS, np.uint8)
    name[: len(suffix)] = np.frombuffer(suffix, np.uint8)
    return name.view(np.uint64)


_LABEL_NAME = _name_words(b".cls")
_ARRAY_NAME = _name_words(b".moments.npy")
_FLIP_NAME = _name_words(b".flip.npy")
