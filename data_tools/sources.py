"""Where images come from: files that a folder or a list names; what all sources have.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.errors import ConfigError
from data_tools.images import BadImageError
from data_tools.left_out import LeftOut

MAX_IMAGE_BYTES = 1 << 30  # of a file; more is no photograph, and would be read into memory
MAX_CLASSES = 1_000_000  # a larger label is a mistake, such as an image's number
_CHUNK = 1 << 16  # names hashed together
# Images whose size is asked for: on a network disk, those of 1.28 M files take many minutes.
_NUM_SIZES = 64


@dataclass(frozen=True)
class ImageClass:
    """One class: its label, what the input calls it, and how many images the input has of it."""

    index: int
    id: str
    count: int


class Names:
    """A sequence of byte strings in one buffer: their bytes and 8 more each."""

    def __init__(self, names: Iterable[bytes] = ()) -> None:
        """Collect names."""
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
        """Return how many."""
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        """Return one."""
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
        labels: int32 (N,), class of each image; all 0 when unconditional.
        classes: by label; empty when unconditional.
        former: labels and classes as earlier versions gave them, where they gave others.
        notes: lines for people, about what could be understood in another way.
        left_out: what the input holds beside these images.
    """

    def __init__(
        self,
        text: str,
        labels: np.ndarray,
        classes: tuple[ImageClass, ...],
        *,
        former: tuple[np.ndarray, tuple[ImageClass, ...]] | None = None,
        notes: Sequence[str] = (),
        left_out: Sequence[LeftOut] = (),
    ) -> None:
        """Hold what every kind of source has."""
        self.text, self.labels, self.classes = text, labels, classes
        self.former, self.notes, self.left_out = former, list(notes), list(left_out)

    def __len__(self) -> int:
        """Return the number of images."""
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
        digest, lines = hashlib.sha256(), []
        for name, label in zip(self.raw_names(), _each(self.labels), strict=True):
            lines.append(b"%b\t%d\n" % (name, label))
            if len(lines) == _CHUNK:
                digest.update(b"".join(lines))
                lines.clear()
        digest.update(b"".join(lines))
        return digest.hexdigest()

    def with_former_labels(self) -> "ImageSource":
        """Return the same images with the labels that earlier versions gave them."""
        assert self.former is not None
        other = copy.copy(self)
        other.labels, other.classes = self.former
        return other

    def sizes(self) -> list[int]:
        """Return the bytes of at most 64 evenly spaced images, -1 for those without a file.

        They tell sets of the same names apart, such as those whose images are only numbered.
        """
        count = min(len(self), _NUM_SIZES)
        return [self.num_bytes(i * len(self) // count) for i in range(count)]


class FileSource(ImageSource):
    """Images that are files of their own."""

    def __init__(
        self,
        text: str,
        folder: Path,
        names: Names,
        labels: np.ndarray,
        classes: tuple[ImageClass, ...],
        **others: Any,  # noqa: ANN401
    ) -> None:
        """Describe files whose names are relative to `folder`, or absolute."""
        super().__init__(text, labels, classes, **others)
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
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BadImageError("is no file")
            if status.st_size > MAX_IMAGE_BYTES:
                raise BadImageError(f"has {status.st_size:,} bytes, more than {MAX_IMAGE_BYTES:,}")
            return file.read()

    def num_bytes(self, index: int) -> int:
        """Ask the file system; -1 for a file that is not there or not readable."""
        try:
            return os.stat(os.path.join(self.folder, self.names[index])).st_size
        except OSError:
            return -1


def _each(values: np.ndarray) -> Iterator[int]:
    for first in range(0, len(values), _CHUNK):
        yield from values[first : first + _CHUNK].tolist()


def classes_of(
    ids: list[str], members: np.ndarray, order: Sequence[Any] | None = None
) -> tuple[np.ndarray, tuple[ImageClass, ...]]:
    """Give the classes their labels in the order of their ids.

    Args:
        ids: each once.
        members: int (N,), place in `ids` of each image's class.
        order: what the classes are sorted by instead, one for each id.

    Returns:
        int32 (N,) labels; the classes.
    """
    order = sorted(range(len(ids)), key=(order or ids).__getitem__)
    label_of = np.empty(len(ids), np.int32)
    label_of[order] = np.arange(len(ids), dtype=np.int32)
    counts = np.bincount(members, minlength=len(ids))
    classes = (ImageClass(i, ids[place], int(counts[place])) for i, place in enumerate(order))
    return label_of[members], tuple(classes)


def numbered_classes(text: str, labels: np.ndarray) -> tuple[ImageClass, ...]:
    """Describe classes that the input numbers itself, 0 to the largest; some may have no image.

    Args:
        text: the input as typed.
        labels: int (N,); numbers from MAX_CLASSES on, however cut to a type's range, are refused.
    """
    if int(labels.max()) >= MAX_CLASSES:
        raise too_large_label(text)
    return tuple(ImageClass(i, str(i), int(n)) for i, n in enumerate(np.bincount(labels)))


def too_large_label(text: str) -> ConfigError:
    """Say that an input's classes have numbers from MAX_CLASSES on."""
    return ConfigError(
        f"--input {text}: has a class number above {MAX_CLASSES - 1:,}, which seems to be "
        "something else than a label; correct it."
    )


def read_list(path: Path) -> FileSource:
    """Read a list of images: a path per line, or a path, a tab and a class.

    Paths are relative to the list's folder. Where every class is a number, it is the label itself;
    else the classes are numbered in the order of their names.
    """
    place_of: dict[bytes, int] = {}
    members = array("i")
    num_plain = 0

    def found() -> Iterator[bytes]:
        nonlocal num_plain
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                fields = line.rstrip(b"\r\n").split(b"\t")
                if fields == [b""]:
                    continue
                if len(fields) > 2 or b"" in fields:
                    raise ConfigError(
                        f"--input {path}: line {number} is no path, or path, tab and class; "
                        "correct it."
                    )
                num_plain += len(fields) == 1
                name = fields[1] if len(fields) == 2 else b""
                members.append(place_of.setdefault(name, len(place_of)))
                yield fields[0]

    try:
        names = Names(found())
    except OSError as err:
        raise ConfigError(
            f"--input {path}: cannot be read ({err.strerror}); give a list of images."
        ) from err
    if not len(names):
        raise ConfigError(f"--input {path}: names no images; write a path per line.")
    if 0 < num_plain < len(names):
        raise ConfigError(
            f"--input {path}: {num_plain} of {len(names)} lines name no class; name one in every "
            "line, or in none."
        )
    folder = path.parent
    if num_plain:
        return FileSource(str(path), folder, names, np.zeros(len(names), np.int32), ())
    places = np.frombuffer(members, np.int32)
    if all(name.isdigit() for name in place_of):
        # Seven digits are too large already; Python refuses to read thousands of them.
        numbers = np.array([int(name.lstrip(b"0")[:7] or b"0") for name in place_of], np.int32)
        labels = numbers[places]
        return FileSource(str(path), folder, names, labels, numbered_classes(str(path), labels))
    ids = [name.decode("utf-8", "backslashreplace") for name in place_of]
    return FileSource(str(path), folder, names, *classes_of(ids, places))
