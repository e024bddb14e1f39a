"""JSON files that are read strictly, and files that are written whole or not at all."""

import contextlib
import errno
import json
import os
import uuid
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields, is_dataclass
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

_PLAIN = (int, float, str, bool)


class MalformedError(Exception):
    """JSON that is not what a dataclass describes."""


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)  # slow, and a manifest has a hundred thousand parts


@cache
def _required(kind: type) -> frozenset[str]:
    return frozenset(
        item.name
        for item in fields(kind)
        if item.default is MISSING and item.default_factory is MISSING
    )


def from_json(kind: Any, value: Any, where: str = "the content") -> Any:
    """Build a dataclass tree from parsed JSON; unknown, missing and mistyped keys are errors.

    A key may be missing where the dataclass has a default: files of before it knew the key.
    """
    if kind in _PLAIN and type(value) is kind:
        return value
    if is_dataclass(kind):
        hints = _hints(kind)
        given = set(value) if isinstance(value, dict) else set()
        missing, unknown = sorted(_required(kind) - given), sorted(given - set(hints))
        if missing or unknown or not isinstance(value, dict):
            raise MalformedError(f"{where} lacks {missing} and has the unknown {unknown}")
        parts = {name: from_json(hints[name], value[name], name) for name in hints if name in given}
        return kind(**parts)
    if get_origin(kind) is list and isinstance(value, list):
        return [from_json(get_args(kind)[0], item, f"an item of {where}") for item in value]
    if get_origin(kind) is dict and isinstance(value, dict):
        return {name: from_json(get_args(kind)[1], item, name) for name, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise MalformedError(f"{where} is {value!r}, which is no {getattr(kind, '__name__', kind)}")
    return value


def as_json(content: Any) -> str:
    """Return a dataclass or dictionary as the text of a file."""
    value = asdict(content) if is_dataclass(content) else content
    return json.dumps(value, indent=1) + "\n"


def write_json(path: Path, content: Any) -> None:
    """Write a dataclass or dictionary as JSON, whole or not at all.

    Several processes may write the same content at once: each has a temporary file of its own.
    """
    text = as_json(content)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    replace_file(path, lambda file: file.write(text.encode()), temporary)


def write_json_once(path: Path, content: Any) -> None:
    """Write as write_json, unless the file exists; of several processes the first one wins.

    Making a link is atomic on a network file system too, and asks the server and no cache.
    """
    own = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    write_json(own, content)
    try:
        os.link(own, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        if not path.exists():
            write_json(path, content)
    finally:
        own.unlink(missing_ok=True)


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


def read_lines(path: Path, kind: type[Any]) -> list[Any]:
    """Read the lines of JSON that `append_line` wrote; none if there is no file.

    What does not fit is left out: a line that was torn, or is of another version of this program.
    """
    found: list[Any] = []
    lines = path.read_text(encoding="ascii", errors="replace") if path.exists() else ""
    for line in lines.splitlines():
        with contextlib.suppress(ValueError, MalformedError):
            found.append(from_json(kind, json.loads(line)))
    return found


def append_line(path: Path, line: str) -> None:
    """Add a line of ASCII to a file, durably; what a write that was cut off left there goes."""
    with path.open("a+b", buffering=0) as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
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
