"""Images in webdataset tars, read at the places that a scan of the tars' headers found.

Nothing is extracted: a name in a tar is never used as a path.
"""

import contextlib
import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from data_tools.errors import ConfigError, count_of, os_errors_as
from data_tools.files import MalformedError, from_json, replace_file
from data_tools.sources.class_names import ClassFolders
from data_tools.sources.images import BadImageError
from data_tools.sources.left_out import LeftOut, Tally, sentence
from data_tools.sources.reading import Reading
from data_tools.sources.source import (
    MAX_IMAGE_BYTES,
    Classes,
    ImageSource,
    Names,
    classes_of,
    numbered_classes,
)
from data_tools.sources.tar_images import TARS_INSIDE, TarIndex, scan_tar

_SCANNERS = 8  # tars whose headers are read at once: over a network, reading them is waiting
_INDEX_VERSION = 2


def _index_of(path: Path, cache: Path | None, reading: Reading) -> TarIndex:
    """Scan a tar, or read what an earlier scan wrote while the tar was the same."""
    readable = partial(os_errors_as, f"--input {path}: cannot be read", "give tars of images")
    if cache is None:
        with readable():
            return scan_tar(path, reading)
    with readable():
        status = path.stat()
    state = np.array([_INDEX_VERSION, status.st_size, status.st_mtime_ns], np.int64)
    what = b"%b\0%b" % (os.fsencode(path.resolve()), repr(reading).encode(errors="replace"))
    stored = cache / f"{hashlib.sha256(what).hexdigest()[:32]}.npz"
    try:
        with np.load(stored, allow_pickle=False) as found:
            if np.array_equal(found["state"], state):
                names = Names.of(found["blob"], found["ends"])
                left_out = from_json(list[LeftOut], json.loads(found["left_out"].tobytes()))
                arrays = (found["offsets"], found["sizes"], found["labels"])
                return TarIndex(names, *arrays, left_out)
    except (FileNotFoundError, KeyError, ValueError, EOFError, BadZipFile, MalformedError):
        pass  # none yet, or one that was damaged: it is written again
    with readable():
        index = scan_tar(path, reading)
    names = index.names
    arrays = {"blob": names.blob, "ends": names.ends, "offsets": index.offsets}
    arrays |= {"sizes": index.sizes, "labels": index.labels, "state": state}
    entries = json.dumps([asdict(entry) for entry in index.left_out]).encode()
    arrays["left_out"] = np.frombuffer(entries, np.uint8)
    temporary = stored.with_suffix(f".{os.getpid()}-{os.urandom(4).hex()}.tmp")
    with contextlib.suppress(FileNotFoundError):  # another process was refused and removed it
        cache.mkdir(parents=True, exist_ok=True)
        replace_file(stored, lambda file: np.savez(file, **arrays), temporary)
    return index


class TarSource(ImageSource):
    """Images inside tars, which count their images one after the other."""

    def __init__(
        self,
        text: str,
        paths: list[Path],
        indexes: list[TarIndex],
        classes: Classes,
        left_out: Sequence[LeftOut] = (),
    ) -> None:
        super().__init__(text, classes, left_out)
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


def open_tars(
    text: str,
    paths: list[Path],
    cache: Path | None,
    reading: Reading | None = None,
    left_out: Tally | None = None,
) -> TarSource:
    """Index tars of images: KEY.jpg and perhaps KEY.cls, a number; see sources/tar_images.py.

    Without any label, folders in the tars are classes; without folders there are none.

    Args:
        paths: of the tars, in the order of their images.
        cache: folder for the indexes, which several processes may fill at once; None: keep none.
        left_out: what lies beside the tars.
    """
    reading, left_out = reading or Reading(), left_out or Tally()
    reading.refuse_others(text, "tars", "class_from", "image_suffix", "label_suffix")
    # Processes that start together begin at different tars and find the others' indexes.
    order = random.SystemRandom().sample(paths, len(paths))
    with ThreadPoolExecutor(_SCANNERS, thread_name_prefix="scan") as pool:
        found = pool.map(lambda path: _index_of(path, cache, reading), order)
        index_of = dict(zip(order, found, strict=True))
    indexes = [index_of[path] for path in paths]
    for path, index in zip(paths, indexes, strict=True):
        for entry in index.left_out:
            left_out.add_all(entry, f"{_shown(path)}/")
    entries = left_out.entries()
    labels = np.concatenate([index.labels for index in indexes])
    if not len(labels):
        raise _no_images_error(text, paths, entries)
    classes = _classes(text, paths, indexes, labels, reading)
    has_json = any(entry.kind == ".json" for entry in entries)
    if has_json and not (classes.classes or reading.class_from or reading.label_suffix):
        classes.notes.append(
            "add --label-suffix json:FIELD if a field of the .json files holds the class"
        )
    return TarSource(text, paths, indexes, classes, entries)


def _shown(path: Path) -> str:
    return os.fsencode(path.name).decode("utf-8", "replace")


def _no_images_error(text: str, paths: list[Path], entries: list[LeftOut]) -> ConfigError:
    if inside := next((entry for entry in entries if entry.kind == TARS_INSIDE), None):
        return ConfigError(
            f"--input {text}: holds {count_of(inside.count, 'tar')} ({inside.examples[0]}, ...) "
            f"and no images; unpack it once, tar -xf {paths[0]} -C FOLDER, and give --input FOLDER "
            "(with --class-from tar if each tar in it is a class)."
        )
    instead = f"; left out: {sentence(entries)}" if entries else ""
    return ConfigError(
        f"--input {text}: no images (KEY.jpg, .png, ...) in its "
        f"{count_of(len(paths), 'tar')}{instead}; give tars of images."
    )


def _classes(
    text: str, paths: list[Path], indexes: list[TarIndex], labels: np.ndarray, reading: Reading
) -> Classes:
    num_labelled = int((labels >= 0).sum())
    if reading.class_from == "tar":
        ids = [_shown(path).rpartition(".")[0] for path in paths]
        members = np.repeat(np.arange(len(ids)), [len(index.names) for index in indexes])
        if len(set(ids)) < len(ids):
            raise ConfigError(
                f"--class-from tar: two tars of --input {text} are called "
                f"{max(ids, key=ids.count)}; rename one."
            )
        return classes_of(ids, members)
    if reading.class_from:
        return _folder_classes(text, indexes, reading)
    if num_labelled == len(labels):
        return numbered_classes(text, labels)
    if num_labelled:
        source = TarSource(text, paths, indexes, Classes(labels))
        example = source.name(int(np.argmin(labels)))
        raise ConfigError(
            f"--input {text}: {len(labels) - num_labelled} of {len(labels)} images ({example}, "
            "...) have no .cls; give every sample one, or none."
        )
    if reading.label_suffix:
        raise ConfigError(
            f"--label-suffix {reading.label_suffix}: no sample of --input {text} has one; write "
            "what stands after KEY and a dot."
        )
    return _folder_classes(text, indexes, reading)


def _folder_classes(text: str, indexes: list[TarIndex], reading: Reading) -> Classes:
    found, count = ClassFolders(reading), sum(len(index.names) for index in indexes)
    for index in indexes:
        for name in index.names:
            found.add(name)
    if 0 < found.num_loose < count and reading.class_from != "none":
        raise ConfigError(
            f"--input {text}: {found.num_loose} of {count} images lie in no folder of their tar; "
            "give every sample a folder or a .cls, or none."
        )
    classes = found.classes(
        f"--input {text}", lambda part: f"give tars that hold {part} only, or unpack them"
    )
    if not classes.classes and not reading.class_from and len(indexes) > 1:
        classes.notes.append(
            "the images lie in no folders and have no .cls: add --class-from tar if each tar is a "
            "class"
        )
    return classes
