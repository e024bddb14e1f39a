"""Parts of the sentences that tell users of a mistake."""

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any


def did_you_mean(wrong: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """Return "; did you mean 'x'?" for the closest known word.

    If none is close, return `otherwise`; None = a list of all words.
    """
    known = list(known)
    lower = {word.lower(): word for word in known}
    close = difflib.get_close_matches(wrong.lower(), lower, n=1)
    if close:
        return f"; did you mean '{lower[close[0]]}'?"
    return f"; choose one of: {', '.join(known)}." if otherwise is None else otherwise


def shown(value: Any) -> str:
    """Show a value of any size in one short line.

    A few lines of YAML hold lists of lists that take more than a machine's memory to write out.
    """
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    return " ".join(short.repr(value).split())


def either(words: Iterable[str]) -> str:
    """Write "a", "a or b", "a, b or c"."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last
