"""Images in webdataset tars, read at the places that a scan of the tars' headers found.

Nothing is extracted: names in a tar only name samples.
"""

import hashlib
import os
import tarfile
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from data_tools.errors import ConfigError
from data_tools.files import replace_file
from data_tools.images import BadImageError
from data_tools.sources import (
    MAX_CLASSES,
    MAX_IMAGE_BYTES,
    ImageClass,
    ImageSource,
    Names,
    classes_of,
    numbered_classes,
)

_IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})
_LABEL_SUFFIX = "cls"
_NO_LABEL = -1
_LABEL_BYTES = 16  # more is no number of a class
_SCANNERS = 8  # tars whose headers are read at once: over a network, reading them is waiting
_INDEX_VERSION = 1


@dataclass(frozen=True)
class TarIndex:
    """The images of one tar.

    Attributes:
        names: of the image files in it.
        offsets: int64 (n,), where their contents begin.
        sizes: int64 (n,), bytes of their contents.
        labels: int32 (n,), -1 without a .cls.
    """

    names: Names
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray


def scan_tar(path: Path) -> TarIndex:
    """Read a tar's headers; its samples are consecutive files that differ in their suffix only."""
    names, sizes, offsets, labels = [], array("q"), array("q"), array("i")
    key, label, image = "", _NO_LABEL, None

    def close_sample() -> None:
        if image is not None:
            names.append(os.fsencode(image.name.removeprefix("./")))
            offsets.append(image.offset_data)
            sizes.append(image.size)
            labels.append(label)

    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    tar.members.clear()  # it would keep every header
                    stem, _, suffix = member.name.rpartition(".")
                    suffix = suffix.lower()
                    is_image = suffix in _IMAGE_SUFFIXES
                    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or not (
                        is_image or suffix == _LABEL_SUFFIX
                    ):
                        continue
                    if stem != key:
                        close_sample()
                        key, label, image = stem, _NO_LABEL, None
                    if not is_image:
                        label = _parse_label(path, member, file)
                    elif image is None:
                        image = member
                    else:
                        raise ConfigError(
                            f"--input {path}: {image.name} and {member.name} are one sample; leave "
                            "one image per sample."
                        )
                close_sample()
                end = tar.offset
        except tarfile.TarError as err:
            raise ConfigError(
                f"--input {path}: is no whole, uncompressed tar ({err}); copy it again, or unpack "
                "its compression."
            ) from err
        # tarfile takes the first header that it cannot read for the end.
        if os.pread(file.fileno(), tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
            raise ConfigError(
                f"--input {path}: is cut off or damaged after {end:,} bytes; copy it again."
            )
    return TarIndex(
        Names(names),
        np.frombuffer(offsets, np.int64),
        np.frombuffer(sizes, np.int64),
        np.frombuffer(labels, np.int32),
    )


def _parse_label(path: Path, member: tarfile.TarInfo, file: object) -> int:
    text = os.pread(file.fileno(), min(member.size, _LABEL_BYTES + 1), member.offset_data).strip()
    if not text.isdigit() or len(text) > _LABEL_BYTES:
        raise ConfigError(
            f"--input {path}: {member.name} holds {text!r}, which is no number of a class; write "
            "the label into it."
        )
    return min(int(text), MAX_CLASSES)


def _readable(look: Callable[[Path], Any], path: Path) -> Any:  # noqa: ANN401
    try:
        return look(path)
    except OSError as err:
        raise ConfigError(
            f"--input {path}: cannot be read ({err.strerror}); give tars of images."
        ) from err


def _index_of(path: Path, cache: Path | None) -> TarIndex:
    """Scan a tar, or read what an earlier scan wrote while the tar was the same."""
    if cache is None:
        return _readable(scan_tar, path)
    status = _readable(Path.stat, path)
    state = np.array([_INDEX_VERSION, status.st_size, status.st_mtime_ns], np.int64)
    stored = cache / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.npz"
    try:
        with np.load(stored, allow_pickle=False) as found:
            if np.array_equal(found["state"], state):
                names = Names.of(found["blob"], found["ends"])
                return TarIndex(names, found["offsets"], found["sizes"], found["labels"])
    except (FileNotFoundError, KeyError, ValueError, EOFError, BadZipFile):
        pass  # none yet, or one that was damaged: it is written again
    index = _readable(scan_tar, path)
    names = index.names
    arrays = {"blob": names.blob, "ends": names.ends, "offsets": index.offsets}
    arrays |= {"sizes": index.sizes, "labels": index.labels, "state": state}
    temporary = stored.with_suffix(f".{os.getpid()}-{os.urandom(4).hex()}.tmp")
    cache.mkdir(parents=True, exist_ok=True)
    replace_file(stored, lambda file: np.savez(file, **arrays), temporary)
    return index


class TarSource(ImageSource):
    """Images inside tars."""

    def __init__(
        self,
        text: str,
        paths: list[Path],
        indexes: list[TarIndex],
        labels: np.ndarray,
        classes: tuple[ImageClass, ...],
    ) -> None:
        """Join the indexes of the tars, which count their images one after the other."""
        super().__init__(text, labels, classes)
        folder = os.path.commonpath([path.parent for path in paths])
        self.paths = paths
        self.tar_names = [os.fsencode(os.path.relpath(path, folder)) for path in paths]
        self.first = np.cumsum([0] + [len(index.names) for index in indexes])
        self.indexes = indexes

    def raw_names(self) -> Iterator[bytes]:
        """Go through TAR/FILE in order."""
        for tar, index in zip(self.tar_names, self.indexes, strict=True):
            for name in index.names:
                yield b"%b/%b" % (tar, name)

    def raw_name(self, index: int) -> bytes:
        """Return TAR/FILE."""
        tar, place = self._place(index)
        return b"%b/%b" % (self.tar_names[tar], self.indexes[tar].names[place])

    def _place(self, index: int) -> tuple[int, int]:
        tar = int(np.searchsorted(self.first, index, side="right")) - 1
        return tar, index - int(self.first[tar])

    def read(self, index: int) -> bytes:
        """Read a file out of its tar."""
        tar, place = self._place(index)
        size = int(self.indexes[tar].sizes[place])
        if size > MAX_IMAGE_BYTES:
            raise BadImageError(f"has {size:,} bytes, more than {MAX_IMAGE_BYTES:,}")
        with self.paths[tar].open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, int(self.indexes[tar].offsets[place]))
        if len(data) != size:
            raise ConfigError(
                f"--input {self.paths[tar]}: became shorter since its headers were read; copy it "
                "again and run the same command again."
            )
        return data

    def num_bytes(self, index: int) -> int:
        """Return what the tar's header says."""
        tar, place = self._place(index)
        return int(self.indexes[tar].sizes[place])


def open_tars(text: str, paths: list[Path], cache: Path | None) -> TarSource:
    """Index tars of images: KEY.jpg (.jpeg, .png, .webp) and perhaps KEY.cls, a number.

    Without any .cls, folders in the tars are classes; without folders there are none.

    Args:
        text: the input as typed.
        paths: of the tars, in the order of their images.
        cache: folder for the indexes, which several processes may fill at once; None: keep none.
    """
    # Processes that start together begin at different tars and find the others' indexes.
    order = np.random.default_rng().permutation(len(paths))
    indexes: list[TarIndex | None] = [None] * len(paths)

    def scan(place: int) -> None:
        indexes[place] = _index_of(paths[place], cache)

    with ThreadPoolExecutor(_SCANNERS, thread_name_prefix="scan") as pool:
        list(pool.map(scan, order.tolist()))
    labels = np.concatenate([index.labels for index in indexes])
    if not len(labels):
        raise ConfigError(
            f"--input {text}: no images (KEY.jpg, .jpeg, .png or .webp) in its {len(paths)} tars; "
            "give tars of images."
        )
    num_labelled = int((labels >= 0).sum())
    if num_labelled == len(labels):
        return TarSource(text, paths, indexes, labels, numbered_classes(text, labels))
    if num_labelled:
        source = TarSource(text, paths, indexes, labels, ())
        example = source.name(int(np.argmin(labels)))
        raise ConfigError(
            f"--input {text}: {len(labels) - num_labelled} of {len(labels)} images ({example}, "
            "...) have no .cls; give every sample one, or none."
        )
    return TarSource(text, paths, indexes, *_folder_classes(text, indexes))


def _folder_classes(
    text: str, indexes: list[TarIndex]
) -> tuple[np.ndarray, tuple[ImageClass, ...]]:
    place_of: dict[bytes, int] = {}
    members, num_loose = array("i"), 0
    for index in indexes:
        for name in index.names:
            folder, is_inside, _ = name.partition(b"/")
            num_loose += not is_inside
            members.append(place_of.setdefault(folder, len(place_of)) if is_inside else 0)
    if num_loose == len(members):
        return np.zeros(len(members), np.int32), ()
    if num_loose:
        raise ConfigError(
            f"--input {text}: {num_loose} of {len(members)} images lie in no folder of their tar; "
            "give every sample a folder or a .cls, or none."
        )
    ids = [name.decode("utf-8", "backslashreplace") for name in place_of]
    return classes_of(ids, np.frombuffer(members, np.int32))
