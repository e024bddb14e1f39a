"""ImageSource, the base of everything that images are read from, and its form for plain files.

A source is a numbered sequence of images with labels that is the same in every process. It may
hold 100 million of them, so names are bytes in one buffer and not Python strings.
"""

import copy
import hashlib
import os
import stat
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.errors import ConfigError
from data_tools.sources.images import BadImageError
from data_tools.sources.left_out import LeftOut

MAX_IMAGE_BYTES = 1 << 30  # of a file; more is no photograph, and would be read into memory
MAX_CLASSES = 1_000_000  # a larger label is a mistake, such as an image's number
_CHUNK = 1 << 16  # names hashed together
# Images whose size is asked for: on a network disk, those of 1.28 M files take many minutes.
NUM_SIZES = 1 << 16
_ASKED = 256  # by a thread, one after the other
_ASKERS = 16  # sizes asked for at once: over a network, asking is waiting


@dataclass(frozen=True)
class ImageClass:
    """One class: its label, what the input calls it, and how many images the input has of it."""

    index: int
    id: str
    count: int


@dataclass(frozen=True)
class Classes:
    """Labels and classes of all images."""

    labels: np.ndarray  # int32 (N,), class of each image; all 0 without classes
    classes: tuple[ImageClass, ...] = ()  # by label; empty: the images have none
    former: "Classes | None" = None  # what earlier versions gave, where they gave others
    # Lines for people, about what could be understood in another way.
    notes: list[str] = field(default_factory=list)

    @classmethod
    def none(cls, num_images: int, *notes: str) -> "Classes":
        """Describe images without classes."""
        return cls(np.zeros(num_images, np.int32), notes=list(notes))


class Names:
    """A sequence of byte strings in one buffer: their bytes and 8 more each."""

    def __init__(self, names: Iterable[bytes] = ()) -> None:
        blob, ends = bytearray(), array("q")
        for name in names:
            blob += name
            ends.append(len(blob))
        self.blob = np.frombuffer(blob, np.uint8)
        self.ends = np.frombuffer(ends, np.int64)

    @classmethod
    def of(cls, blob: np.ndarray, ends: np.ndarray) -> "Names":
        """Wrap arrays: the bytes, and where each name ends."""
        names = cls.__new__(cls)
        names.blob, names.ends = blob, ends
        return names

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        start = int(self.ends[index - 1]) if index else 0
        return self.blob[start : int(self.ends[index])].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        """Go through all in order, faster than by index."""
        for first in range(0, len(self), _CHUNK):
            ends = self.ends[first : first + _CHUNK].tolist()
            start = int(self.ends[first - 1]) if first else 0
            chunk, base = self.blob[start : ends[-1]].tobytes(), start
            for end in ends:
                yield chunk[start - base : end - base]
                start = end


class ImageSource(ABC):
    """The images of one --input.

    Attributes:
        text: the input as typed, for messages.
        labels, classes, former, notes: see Classes.
        left_out: what the input holds beside these images.
    """

    def __init__(self, text: str, classes: Classes, left_out: Sequence[LeftOut] = ()) -> None:
        self.text, self.labels, self.classes = text, classes.labels, classes.classes
        self.former, self.notes, self.left_out = classes.former, classes.notes, list(left_out)

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def raw_names(self) -> Iterator[bytes]:
        """Go through the names of all images in order."""

    @abstractmethod
    def raw_name(self, index: int) -> bytes:
        """Return an image's name: a path, or that of a tar and of the file in it."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Return the content of an image's file; threads may call this at once.

        Raises:
            BadImageError: it is no file of a sane size.
            OSError: the system cannot read it.
        """

    @abstractmethod
    def num_bytes(self, index: int) -> int:
        """Return the size of an image's file without reading it; -1 where it has none."""

    def name(self, index: int) -> str:
        """Return an image's name for people; bytes that are no UTF-8 are escaped."""
        return self.raw_name(index).decode("utf-8", "backslashreplace")

    def fingerprint(self) -> str:
        """Return the sha256 of all names and labels in order."""
        digest, chunks = hashlib.sha256(), range(0, len(self), _CHUNK)
        labels = (label for i in chunks for label in self.labels[i : i + _CHUNK].tolist())
        lines = (b"%b\t%d\n" % pair for pair in zip(self.raw_names(), labels, strict=True))
        while chunk := b"".join(islice(lines, _CHUNK)):
            digest.update(chunk)
        return digest.hexdigest()

    def with_former_labels(self) -> "ImageSource":
        """Return the same images with the labels that earlier versions gave them."""
        assert self.former is not None
        other = copy.copy(self)
        other.labels, other.classes = self.former.labels, self.former.classes
        return other

    def sizes(self, count: int = NUM_SIZES) -> list[int]:
        """Return the bytes of at most `count` evenly spaced images, -1 for those without a file.

        They tell sets of the same names apart, such as those whose images are only numbered, and
        an image that was edited from the one that was encoded.
        """
        places = self.sized_places(count)
        parts = [places[first : first + _ASKED] for first in range(0, len(places), _ASKED)]
        with ThreadPoolExecutor(_ASKERS, thread_name_prefix="sizes") as pool:
            found = pool.map(lambda part: [self.num_bytes(place) for place in part], parts)
            return [size for part in found for size in part]

    def sized_places(self, count: int = NUM_SIZES) -> list[int]:
        """Return the places of the images whose sizes `sizes` returns."""
        count = min(len(self), count)
        return [i * len(self) // count for i in range(count)]

    def edited(self, before: list[int], now: list[int]) -> list[int]:
        """Find images that have other sizes than before.

        Args:
            before: what `sizes` returned then, perhaps with another count; empty if not known.
            now: what `sizes` returns.

        Returns:
            their places.
        """
        if before and len(before) != len(now):
            now = self.sizes(len(before))
        pairs = zip(self.sized_places(len(before)), before, now, strict=False)
        return [place for place, then, size in pairs if then != size]


class FileSource(ImageSource):
    """Images that are files of their own, names relative to a folder or absolute."""

    def __init__(
        self,
        text: str,
        folder: Path,
        names: Names,
        classes: Classes,
        left_out: Sequence[LeftOut] = (),
    ) -> None:
        super().__init__(text, classes, left_out)
        self.folder, self.names = os.fsencode(folder), names

    def raw_names(self) -> Iterator[bytes]:
        """Go through the paths, "/" between the parts."""
        return iter(self.names)

    def raw_name(self, index: int) -> bytes:
        """Return a path as the folder or the list has it."""
        return self.names[index]

    def path(self, index: int) -> Path:
        """Return where an image lies."""
        return Path(os.fsdecode(os.path.join(self.folder, self.names[index])))

    def read(self, index: int) -> bytes:
        """Read a file whole."""
        path = os.path.join(self.folder, self.names[index])
        # A list may name anything: a pipe must not stop the thread that opens it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BadImageError("is no file")
            if status.st_size > MAX_IMAGE_BYTES:
                raise BadImageError(f"has {status.st_size:,} bytes, more than {MAX_IMAGE_BYTES:,}")
            with open(descriptor, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(descriptor)

    def num_bytes(self, index: int) -> int:
        """Ask the file system; -1 for a file that is not there or not readable."""
        try:
            return os.stat(os.path.join(self.folder, self.names[index])).st_size
        except OSError:
            return -1


def classes_of(ids: list[str], members: np.ndarray, order: Sequence[Any] | None = None) -> Classes:
    """Give the classes their labels in the order of their ids.

    Args:
        ids: each once.
        members: int (N,), place in `ids` of each image's class.
        order: what the classes are sorted by instead, one for each id.
    """
    order = sorted(range(len(ids)), key=(order or ids).__getitem__)
    label_of = np.empty(len(ids), np.int32)
    label_of[order] = np.arange(len(ids), dtype=np.int32)
    counts = np.bincount(members, minlength=len(ids))
    classes = (ImageClass(i, ids[place], int(counts[place])) for i, place in enumerate(order))
    return Classes(label_of[members], tuple(classes))


def numbered_classes(text: str, labels: np.ndarray, *notes: str) -> Classes:
    """Describe classes that the input numbers itself, 0 to the largest; some may have no image.

    Args:
        labels: int (N,); numbers from MAX_CLASSES on, however cut to a type's range, are refused.
    """
    if int(labels.max()) >= MAX_CLASSES:
        raise too_large_label(text)
    classes = (ImageClass(i, str(i), int(n)) for i, n in enumerate(np.bincount(labels)))
    return Classes(labels, tuple(classes), notes=list(notes))


def too_large_label(text: str) -> ConfigError:
    """Say that an input's classes have numbers from MAX_CLASSES on."""
    return ConfigError(
        f"--input {text}: has a class number above {MAX_CLASSES - 1:,}, which seems to be "
        "something else than a label; correct it."
    )
