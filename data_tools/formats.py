"""Number the formats of this program's files, so that other versions read or refuse them.

- Every file says its format. One without a number is of the first format, which had none.
- A field that a later version added has a default: an older file lacks it. Where such a field says
  no more than its default it is not written, and the file has the lower number that older programs
  read.
- A newer number is refused in one sentence, before anything is written.
- A field that the number's own version does not know is damage: no version writes it.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from data_tools.errors import ConfigError
from data_tools.files import SINCE, MalformedError, append_line, from_json, parse_json, write_text

FORMAT_KEY = "format_version"


class NewerFormatError(ConfigError):
    """A file, intact, of a later version of this program."""


@dataclass(frozen=True)
class Format:
    """A kind of file, or of a journal's lines.

    A field that is added gets a default, and its format in its metadata, {SINCE: 3}; without
    that it counts as new in the newest one.
    """

    newest: int  # number that this program knows
    base: int = 1  # number of a file that uses nothing that was added since
    oldest: int = 1  # that is still read
    kind: type | None = None  # dataclass of the content; None: a dictionary of any keys
    key: str = FORMAT_KEY  # of the number, in the file

    def check(self, content: Any, where: str) -> int:  # noqa: ANN401
        """Return the number of a parsed file, or line.

        Args:
            content: of the file.
            where: it was found, for messages; begins the sentence.

        Raises:
            NewerFormatError: a later version wrote it.
            ConfigError: it is too old.
            MalformedError: it says no number.
        """
        unnumbered = 1 if self.oldest == 1 else None  # later formats always say their number
        number = content.get(self.key, unnumbered) if isinstance(content, dict) else self.oldest
        if number is None:
            raise MalformedError(f"the content lacks ['{self.key}']")
        if type(number) is not int or number < 1:
            raise MalformedError(f"{self.key} is {number!r}, which is no number of a format")
        if number > self.newest:
            raise NewerFormatError(
                f"{where} was written by a newer program (format {number}, this one knows "
                f"{self.newest}); use the program that wrote it, or a newer one."
            )
        if number < self.oldest:
            raise ConfigError(
                f"{where} is of format {number}, and this program reads {self.oldest} to "
                f"{self.newest}; use the program that wrote it."
            )
        return number

    def parse(self, content: Any, where: str) -> Any:  # noqa: ANN401
        """Build the content of a parsed file; what it lacks takes its default.

        Raises:
            NewerFormatError, ConfigError: as check.
            MalformedError: it lacks a field, or has one that this program does not know.
        """
        self.check(content, where)
        if isinstance(content, dict):
            content = {name: value for name, value in content.items() if name != self.key}
        return content if self.kind is None else from_json(self.kind, content)

    def loads(self, text: bytes | str, where: str) -> Any:  # noqa: ANN401
        """Build the content of a file of JSON.

        Raises:
            NewerFormatError, ConfigError, MalformedError: as parse.
            ValueError: it is no JSON.
        """
        return self.parse(parse_json(text), where)

    def dumps(self, content: Any, indent: int | None = 1) -> str:  # noqa: ANN401
        """Return the text of a file, without the end of its last line."""
        added_in = [since or self.newest for since in _added_in(content)]
        numbered = {self.key: max([self.base, *added_in])}
        numbered |= stored_values(content) if is_dataclass(content) else content
        return json.dumps(numbered, indent=indent, default=stored_values)

    def write(self, path: Path, content: Any) -> None:  # noqa: ANN401
        """Write a file whole or not at all."""
        write_text(path, self.dumps(content) + "\n")

    def append(self, path: Path, content: Any) -> None:  # noqa: ANN401
        """Add a line to a journal.

        Raises:
            OSError: it cannot be written.
        """
        append_line(path, self.dumps(content, indent=None))

    def read_journal(self, path: Path) -> list[Any]:
        """Read the lines of a journal; none if there is no file.

        Lines that are not understood are left out, and stay in the file: one that was torn, or one
        of a newer program.
        """
        found: list[Any] = []
        lines = path.read_text(encoding="ascii", errors="replace") if path.exists() else ""
        for line in lines.splitlines():
            with suppress(ValueError, MalformedError, ConfigError):
                found.append(self.loads(line, str(path)))
        return found

    def refuse_newer(self, path: Path) -> None:
        """Refuse to replace a file that a later version wrote.

        Raises:
            NewerFormatError: it did.
        """
        try:
            self.check(parse_json(path.read_bytes()), str(path))
        except NewerFormatError:
            raise
        except (OSError, ValueError, MalformedError, ConfigError):
            pass  # none, or one that its reader refuses


def stored_values(content: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return a dataclass's values by name, without added fields that have their default."""
    values, added = vars(content), _added(type(content))
    if not added:
        return values
    return {k: v for k, v in values.items() if not (k in added and v == added[k][0])}


@cache
def _added(kind: type) -> dict[str, tuple[Any, int | None]]:
    """Return default and format of the fields that came after the first format, by name."""
    found = {}
    for field in fields(kind):
        has_factory = field.default_factory is not MISSING
        default = field.default_factory() if has_factory else field.default
        if default is not MISSING and field.metadata.get(SINCE) != 1:
            found[field.name] = default, field.metadata.get(SINCE)
    return found


def _added_in(content: Any) -> Iterator[int | None]:  # noqa: ANN401
    """Go through the formats of the added fields that a tree of dataclasses uses."""
    if is_dataclass(content):
        used, added = stored_values(content), _added(type(content))
        yield from (added[name][1] for name in used if name in added)
        content = used
    parts = content.values() if isinstance(content, dict) else content
    for part in parts if isinstance(content, dict | list | tuple) else ():
        yield from _added_in(part)
