"""Lists of images: a path per line, or a path, a tab and a class."""

import os
import re
from array import array
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path

import numpy as np

from data_tools.errors import ConfigError
from data_tools.sources import FileSource, Names, classes_of, numbered_classes
from data_tools.user_text import TextError, text_lines

_WINDOWS_PATH = re.compile(rb"[A-Za-z]:[\\/]|\\\\")
_SEPARATORS = (b" ", b",", b";")  # that people write instead of a tab


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
    sample. Blanks around paths, quotes and the backslashes of Windows are left out or turned in
    all lines if the first line's file is only found so.
    """
    place_of: dict[bytes, int] = {}
    members = array("i")
    num_plain = 0

    def found() -> Iterator[bytes]:
        nonlocal num_plain
        mends: tuple[_Mend, ...] | None = None
        for number, line in enumerate(text_lines(path), 1):
            fields = line.rstrip(b"\r\n").split(b"\t")
            if not b"".join(fields).strip():
                continue
            if len(fields) > 2 or not all(field.strip() for field in fields):
                raise ConfigError(
                    f"--input {path}: line {number} is no path, or path, tab and class; correct it."
                )
            if mends is None:
                mends = _mends_of(path, number, fields)
            name = fields[0]
            for mend in mends:
                name = mend(name)
            num_plain += len(fields) == 1
            label = fields[1].strip() if len(fields) == 2 else b""
            if _unquoted in mends:
                label = _unquoted(label)
            members.append(place_of.setdefault(label, len(place_of)))
            yield name

    try:
        names = Names(found())
    except OSError as err:
        raise ConfigError(
            f"--input {path}: cannot be read ({err.strerror}); give a list of images."
        ) from err
    except TextError as err:
        raise ConfigError(f"--input {path}: is no text that can be read: {err}.") from err
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


def _mends_of(path: Path, number: int, fields: list[bytes]) -> tuple[_Mend, ...]:
    """Find how the text of a line becomes the name of a file.

    Args:
        path: of the list.
        number: of the line.
        fields: of the line: path and perhaps class.

    Returns:
        What to do one after the other; nothing where no way leads to a file.

    Raises:
        ConfigError: there is no such file, and the line tells why.
    """
    folder, text = os.fsencode(path.parent), fields[0]

    def exists(name: bytes) -> bool:
        return os.path.lexists(os.path.join(folder, name))

    for count in range(len(_MENDS) + 1):
        for mends in combinations(_MENDS, count):
            name = text
            for mend in mends:
                name = mend(name)
            if exists(name):
                return mends
    shown = text.decode("utf-8", "backslashreplace")
    where = f"--input {path}: line {number}: {shown}"
    if _WINDOWS_PATH.match(text.strip().lstrip(b"\"'")):
        raise ConfigError(
            f"{where}: is a path of Windows, and no such file is here; write paths relative to the "
            "list's folder."
        )
    for separator in _SEPARATORS if len(fields) == 1 else ():
        if exists(_with_slashes(text.rpartition(separator)[0]) or text):
            raise ConfigError(f"{where}: no such file; path and class are separated by a tab.")
    return ()
