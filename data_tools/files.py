"""Read JSON strictly into dataclasses, and write files whole or not at all."""

import errno
import json
import os
import uuid
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields, is_dataclass
from functools import cache
from io import FileIO
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

_PLAIN = (int, float, str, bool)
SINCE = "since"  # metadata of a field: the format (formats.py) that it came with
FIRST = {SINCE: 1}  # of a field whose default serves the code only: every file has it


class MalformedError(Exception):
    """JSON that is not what a dataclass describes."""


_hints = cache(get_type_hints)  # slow, and a manifest has a hundred thousand parts


@cache
def _required(kind: type) -> frozenset[str]:
    return frozenset(
        field.name
        for field in fields(kind)
        if (field.default is MISSING and field.default_factory is MISSING)
        or field.metadata.get(SINCE) == 1
    )


def from_json(kind: Any, value: Any, where: str = "the content") -> Any:
    """Build a dataclass tree from parsed JSON; unknown, missing and mistyped keys are errors.

    A key that is missing takes its field's default, if that has one.
    """
    if kind in _PLAIN and type(value) is kind:
        return value
    if is_dataclass(kind):
        hints, required = _hints(kind), _required(kind)
        if not isinstance(value, dict) or not required <= value.keys() <= hints.keys():
            given = set(value) if isinstance(value, dict) else set()
            missing, unknown = sorted(required - given), sorted(given - set(hints))
            raise MalformedError(f"{where} lacks {missing} and has the unknown {unknown}")
        return kind(**{name: from_json(hints[name], value[name], name) for name in value})
    if get_origin(kind) is list and isinstance(value, list):
        return [from_json(get_args(kind)[0], item, f"an item of {where}") for item in value]
    if get_origin(kind) is dict and isinstance(value, dict):
        return {name: from_json(get_args(kind)[1], item, name) for name, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(kind, UnionType) and get_args(kind)[1:] == (NoneType,):  # "X | None"
        return None if value is None else from_json(get_args(kind)[0], value, where)
    if type(value) is not kind:
        raise MalformedError(f"{where} is {value!r}, which is no {getattr(kind, '__name__', kind)}")
    return value


def as_json(content: Any) -> str:
    """Return a dataclass or dictionary as the text of a file."""
    value = asdict(content) if is_dataclass(content) else content
    return json.dumps(value, indent=1) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a text whole or not at all.

    Several processes may write the same content at once: each has a temporary file of its own.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    replace_file(path, lambda file: file.write(text.encode()), temporary)


def write_text_once(path: Path, text: str) -> None:
    """Write as write_text, unless the file exists; of several processes the first one wins.

    Making a link is atomic on a network file system too, and asks the server and no cache.
    """
    own = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    write_text(own, text)
    try:
        os.link(own, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        if not path.exists():
            write_text(path, text)
    finally:
        own.unlink(missing_ok=True)


def parse_json(text: bytes | str) -> Any:  # noqa: ANN401
    """Parse JSON.

    Raises:
        ValueError: it is none, or is nested deeper than Python follows.
    """
    try:
        return json.loads(text)
    except RecursionError as err:
        raise ValueError("it is nested too deep") from err


def is_json(text: bytes) -> bool:
    """Tell whether a text is a whole JSON value."""
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def append_whole(file: FileIO, line: str) -> None:
    """Append a line of ASCII or nothing of it.

    Args:
        file: opened for appending and without a buffer, which would be written again on closing.
        line: without its end.

    Raises:
        OSError: it could not be written.
    """
    data, end = f"{line}\n".encode("ascii"), file.seek(0, os.SEEK_END)
    try:
        if file.write(data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        file.truncate(end)
        raise


def append_line(path: Path, line: str) -> None:
    """Add a line of ASCII to a file, durably; what a write that was cut off left there goes.

    A last line that only lacks its end, as an editor may leave it, is whole and stays.
    """
    with path.open("a+b", buffering=0) as file:
        file.seek(0)
        content = file.read()
        start = content.rfind(b"\n") + 1
        if is_json(content[start:]):
            line = f"\n{line}"
        else:
            file.truncate(start)
        append_whole(file, line)
        os.fsync(file.fileno())


def replace_file(path: Path, write: Callable[[Any], object], temporary: Path | None = None) -> None:
    """Call write(file) on a temporary file, flush it to the disk and give it its name."""
    temporary = temporary or path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
