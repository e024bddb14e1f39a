"""Lists of images: a path per line, or a path, a tab and a class."""

import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations, islice
from pathlib import Path

import numpy as np

from data_tools.errors import ConfigError, os_errors_as
from data_tools.sources.source import Classes, FileSource, Names, classes_of, numbered_classes
from data_tools.user_files.user_text import TextError, text_lines

_WINDOWS_PATH = re.compile(rb"[A-Za-z]:[\\/]|\\\\")
_NEGATIVE = re.compile(rb"-[0-9]+")
_SEPARATORS = (b" ", b",", b";")  # that people write instead of a tab
_MOST_TRIED = 100  # lines whose files are looked for, until one is there


def _unquoted(path: bytes) -> bytes:
    is_quoted = len(path) > 1 and path[:1] == path[-1:] and path[:1] in (b'"', b"'")
    return path[1:-1] if is_quoted else path


def _with_slashes(path: bytes) -> bytes:
    return path.replace(b"\\", b"/")


_Mend = Callable[[bytes], bytes]
# What may stand between the text of a line and the name of its file, tried in this order.
_MENDS: tuple[_Mend, ...] = (bytes.strip, _unquoted, _with_slashes)


def read_list(path: Path) -> FileSource:
    """Read a list of images.

    Paths are relative to the list's folder. Where every class is a number, it is the label itself;
    else the classes are numbered in the order of their names. A line that is repeated is another
    sample. Blanks around paths, quotes and the backslashes of Windows are left out or turned where
    files are only found so.
    """
    place_of: dict[bytes, int] = {}
    members = array("i")
    num_plain = 0
    mending = _Mending(path)

    def found() -> Iterator[bytes]:
        nonlocal num_plain
        for number, line in enumerate(text_lines(path), 1):
            fields = line.rstrip(b"\r\n").split(b"\t")
            if not b"".join(fields).strip():
                continue
            if len(fields) > 2 or not all(field.strip() for field in fields):
                raise ConfigError(
                    f"--input {path}: line {number} is no path, or path, tab and class; correct it."
                )
            mends = mending.of(fields[0])
            num_plain += len(fields) == 1
            label = fields[1].strip() if len(fields) == 2 else b""
            if _unquoted in mends:
                label = _unquoted(label)
            members.append(place_of.setdefault(label, len(place_of)))
            yield _mended(fields[0], mends)

    try:
        with os_errors_as(f"--input {path}: cannot be read", "give a list of images"):
            mending.refuse_other_lists()
            names = Names(found())
    except TextError as err:
        raise ConfigError(f"--input {path}: is no text that can be read: {err}.") from err
    if not len(names):
        raise ConfigError(f"--input {path}: names no images; write a path per line.")
    if 0 < num_plain < len(names):
        raise ConfigError(
            f"--input {path}: {num_plain} of {len(names)} lines name no class; name one in every "
            "line, or in none."
        )
    classes = Classes.none(len(names)) if num_plain else _classes(path, place_of, members)
    return FileSource(str(path), path.parent, names, classes)


def _classes(path: Path, place_of: dict[bytes, int], members: array) -> Classes:
    places = np.frombuffer(members, np.int32)
    if odd := next((name for name in place_of if _NEGATIVE.fullmatch(name)), b""):
        raise ConfigError(
            f"--input {path}: has the class number {odd.decode()}; labels count from 0, correct it."
        )
    if all(name.isdigit() for name in place_of):
        # Seven digits are too large already; Python refuses to read thousands of them.
        numbers = np.array([int(name.lstrip(b"0")[:7] or b"0") for name in place_of], np.int32)
        return numbered_classes(str(path), numbers[places])
    return classes_of([name.decode("utf-8", "backslashreplace") for name in place_of], places)


def _mended(text: bytes, mends: Iterable[_Mend]) -> bytes:
    for mend in mends:
        text = mend(text)
    return text


class _Mending:
    """How the texts of a list become names of files; texts that look alike are treated alike."""

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, os.fsencode(path.parent)
        # What could be done to a text: what is done to it.
        self._chosen: dict[tuple[_Mend, ...], tuple[_Mend, ...]] = {(): ()}

    def of(self, text: bytes) -> tuple[_Mend, ...]:
        """Return what to do with a text, one after the other; nothing where that finds no file."""
        possible = _possible(text)
        if possible not in self._chosen:
            # A file may be missing; then the next line of this look decides.
            alike = (other for _, other, _ in self._lines() if _possible(other) == possible)
            tried = (self._that_finds(other, possible) for other in islice(alike, _MOST_TRIED))
            self._chosen[possible] = next((found for found in tried if found is not None), ())
        return self._chosen[possible]

    def refuse_other_lists(self) -> None:
        """Refuse paths of another machine, or another letter in the place of the tab.

        Raises:
            ConfigError: the first lines name no file, and tell why.
        """
        lines = list(islice(self._lines(), _MOST_TRIED))
        if any(self._that_finds(path, _possible(path)) is not None for _, path, _ in lines):
            return
        for number, path, is_alone in lines:
            shown = path.decode("utf-8", "backslashreplace")
            where = f"--input {self.path}: line {number}: {shown}"
            if _WINDOWS_PATH.match(path.strip().lstrip(b"\"'")):
                raise ConfigError(
                    f"{where}: is a path of Windows, and no such file is here; write paths "
                    "relative to the list's folder."
                )
            for separator in _SEPARATORS if is_alone else ():
                if self._exists(_with_slashes(path.rpartition(separator)[0]) or path):
                    raise ConfigError(
                        f"{where}: no such file; path and class are separated by a tab."
                    )

    def _lines(self) -> Iterator[tuple[int, bytes, bool]]:
        """Go through numbers of lines, paths, and whether nothing else is in the line."""
        for number, line in enumerate(text_lines(self.path), 1):
            path, *others = line.rstrip(b"\r\n").split(b"\t")
            if path.strip():
                yield number, path, not others

    def _that_finds(self, text: bytes, possible: tuple[_Mend, ...]) -> tuple[_Mend, ...] | None:
        """Return the fewest changes to a text that lead to a file; None where none do."""
        for count in range(len(possible) + 1):
            for mends in combinations(possible, count):
                if self._exists(_mended(text, mends)):
                    return mends
        return None

    def _exists(self, name: bytes) -> bool:
        return os.path.lexists(os.path.join(self.folder, name))


def _possible(text: bytes) -> tuple[_Mend, ...]:
    """Return which changes would change a text."""
    possible = []
    for mend in _MENDS:
        changed = mend(text)
        if changed != text:
            possible.append(mend)
        text = changed
    return tuple(possible)
