"""Count by kind what an input holds and encoding does not use, with a few names."""

from collections import Counter
from dataclasses import dataclass

_EXAMPLES = 3  # names kept of a kind
_MAX_KINDS = 100  # counted apart: names may have any suffix
_OTHER_KINDS = "other kinds"
_KINDS_SHOWN = 12


@dataclass(frozen=True)
class LeftOut:
    """One kind of what was left out: how many, and the first names."""

    kind: str
    count: int
    examples: list[str]


class Tally:
    """Counts what is left out while an input is read."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}

    def __bool__(self) -> bool:
        return bool(self._counts)

    def _count(self, kind: str, number: int) -> list[str]:
        """Count, and return the examples of the kind."""
        if kind not in self._counts and len(self._counts) >= _MAX_KINDS:
            kind = _OTHER_KINDS
        self._counts[kind] += number
        return self._examples.setdefault(kind, [])

    def add(self, kind: str, name: str) -> None:
        """Count one file or folder."""
        examples = self._count(kind, 1)
        if len(examples) < _EXAMPLES:
            # Bytes that are no text would end the writing of JSON.
            examples.append(name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))

    def add_all(self, entry: LeftOut, prefix: str = "") -> None:
        """Count what another tally found, whose names stand behind a prefix."""
        examples = self._count(entry.kind, entry.count)
        examples += [prefix + name for name in entry.examples[: _EXAMPLES - len(examples)]]

    def entries(self) -> list[LeftOut]:
        """Return all kinds, the most frequent first."""
        order = sorted(self._counts, key=lambda kind: (-self._counts[kind], kind))
        return [LeftOut(kind, self._counts[kind], self._examples[kind]) for kind in order]


def sentence(entries: list[LeftOut]) -> str:
    """Write kinds and counts in a line: ".csv 9 (a.csv, b.csv, c.csv, ...), .heic 1 (1.HEIC)"."""
    parts = []
    for entry in entries[:_KINDS_SHOWN]:
        shown = entry.examples[:_EXAMPLES] + (["..."] if entry.count > _EXAMPLES else [])
        parts.append(f"{entry.kind} {entry.count} ({', '.join(shown)})")
    if len(entries) > _KINDS_SHOWN:
        others = sum(entry.count for entry in entries[_KINDS_SHOWN:])
        parts.append(f"{_OTHER_KINDS} {others}")
    return ", ".join(parts)
