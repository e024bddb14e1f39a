"""Read text files as editors on any system save them.

A byte order mark is left out, and UTF-16 and UTF-32 are read where a mark says so.
"""

import codecs
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO

# UTF-32 first: its mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class TextError(ValueError):
    """A file that is no text which can be read; says why."""


def _encoding(head: bytes) -> str:
    return next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8")


def read_text(path: Path) -> str:
    """Read a file whole.

    Raises:
        TextError: it is no text.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    encoding = _encoding(data[:4])
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as err:
        raise TextError(f"byte {err.start} is not {err.encoding}; save it as UTF-8") from err
    if "\0" in text:
        raise TextError("it holds NUL bytes; save it as UTF-8")
    return text


def text_lines(path: Path) -> Iterator[bytes]:
    """Go through the lines of a file of any size, with their ends.

    Bytes that are no UTF-8 are left as they are, because names of files may have them.

    Raises:
        TextError: it is no text.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        encoding = _encoding(file.peek(4)[:4])
        for number, line in enumerate(_lines(file, encoding), 1):
            if b"\0" in line:
                raise TextError(f"line {number} holds a NUL byte; save it as UTF-8")
            yield line


def _lines(file: IO[bytes], encoding: str) -> Iterator[bytes]:
    if encoding == "utf-8":
        yield from file
    elif encoding == "utf-8-sig":
        file.seek(len(codecs.BOM_UTF8))
        yield from file
    else:
        try:
            with io.TextIOWrapper(file, encoding, newline="\n") as text:
                for line in text:
                    yield line.encode()
        except UnicodeError as err:
            raise TextError(f"it is no whole {encoding}; save it as UTF-8") from err
