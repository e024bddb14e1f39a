"""Make classes of the folders that hold images, and number them."""

import os
from array import array
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from data_tools.errors import ConfigError, some
from data_tools.sources.reading import Reading
from data_tools.sources.source import Classes, ImageClass, classes_of

_SPLITS = frozenset(
    {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}
)
_SHOWN = 5  # classes named in a line


class ClassFolders:
    """Collects the folders of images, one image after the other."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.num_loose, self.first_loose = 0, b""  # images that lie in no folder
        self._place_of: dict[bytes, int] = {}
        self._members = array("i")
        self._num_direct = 0  # images that lie in the first folder of their path itself

    def add(self, name: bytes) -> None:
        """Take the next image's path, "/" between its parts."""
        # Tars may name ./a, /a and ../a, which are no folders.
        while name.startswith((b"./", b"../", b"/")):
            name = name.partition(b"/")[2]
        folder, is_inside, rest = name.partition(b"/")
        if not is_inside:
            self.num_loose += 1
            self.first_loose = self.first_loose or name
            self._members.append(0)
            return
        self._num_direct += b"/" not in rest
        if self.reading.class_from == "path":
            folder = name.rpartition(b"/")[0]
        self._members.append(self._place_of.setdefault(folder, len(self._place_of)))

    def first_folders(self) -> set[bytes]:
        """Return the folders at the top of the input that hold images, at any depth."""
        return {name.partition(b"/")[0] for name in self._place_of}

    def classes(self, where: str, split_advice: Callable[[str], str]) -> Classes:
        """Number the classes: in the order of their names, numbers in the order of numbers.

        Args:
            where: the flag and the input, for messages.
            split_advice: what to do if the folders are called train and test, for one of them.
        """
        members = np.frombuffer(self._members, np.int32)
        if self.num_loose == len(members) or self.reading.class_from == "none":
            return Classes.none(len(members))
        ids = [name.decode("utf-8", "backslashreplace") for name in self._place_of]
        if not self.reading.class_from:
            self._refuse_splits(where, split_advice, ids)
        if self.reading.class_from == "path":
            ids = _without_common_folders(ids)
        notes = []
        if not self.reading.class_from and not self._num_direct:
            what, it = f"the classes are {some(sorted(ids), _SHOWN)}", "them"
            if len(ids) == 1:
                what, it = f"all images lie in the folder {ids[0]}, which is the only class", "it"
            notes.append(
                f"{what}: the folders in {it} are not classes, add --class-from path if they "
                "should be"
            )
        if not all(name.isascii() and name.isdigit() for name in ids):
            return replace(classes_of(ids, members), notes=notes)
        numbers = [name.lstrip("0") for name in ids]
        order = [(len(number), number, name) for number, name in zip(numbers, ids, strict=True)]
        found, by_text = classes_of(ids, members, order), classes_of(ids, members)
        if difference := number_difference(found.classes):
            notes.append(f"{difference}: classes count from 0, without gaps")
        is_other = (found.labels != by_text.labels).any()
        return replace(found, former=by_text if is_other else None, notes=notes)

    def _refuse_splits(self, where: str, advice: Callable[[str], str], ids: list[str]) -> None:
        """Refuse the folders of a training and a test set as classes."""
        are_pictures_of_trains = len(ids) == 1 and self._num_direct
        if are_pictures_of_trains or not _SPLITS.issuperset(name.lower() for name in ids):
            return
        verb = "class would be called" if len(ids) == 1 else "classes would be called"
        raise ConfigError(
            f"{where}: its {verb} {' and '.join(sorted(ids))}, as parts of a data set are called; "
            f"{advice(min(ids))}, or add --class-from folder if they are classes."
        )


def number_difference(classes: tuple[ImageClass, ...]) -> str:
    """Name the first class of numbers whose folder has another number; "": all have the same."""
    for entry in classes:
        if (entry.id.lstrip("0") or "0") != str(entry.index):
            return f"the folder {entry.id} is class {entry.index}"
    return ""


def _without_common_folders(ids: list[str]) -> list[str]:
    """Cut off the folders that all share, as long as something is left of each."""
    parts = [name.split("/") for name in ids]
    shared = len(os.path.commonprefix(parts))
    shared = min(shared, min(map(len, parts)) - 1)
    return ["/".join(rest[shared:]) for rest in parts]
