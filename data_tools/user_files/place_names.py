"""Expand a user's text into the places that it names: by name, by braces, by wildcards.

A text that exists as it was typed stands for itself, whatever characters it has. Only in any other
text do characters such as {, *, a comma or = have a meaning.
"""

import glob
import os
import re
from itertools import islice

from braceexpand import braceexpand

from data_tools.errors import ConfigError

PIPE = "pipe:"
_RANGE = re.compile(r"\{(-?\d{1,18})\.\.(-?\d{1,18})")
_WEIGHT = re.compile(r"(.+)=([^=/,]*)", re.DOTALL)
_MAX_PLACES = 10_000  # a slip of the pen such as {0..999999999} must not fill the memory
_MAX_COMMAS = 16  # in the name of one folder of several


def is_address(text: str) -> bool:
    """Tell addresses and commands from paths of this machine."""
    return "://" in text or text.startswith(PIPE)


def exists_as_typed(text: str) -> bool:
    """Tell whether the whole text is the name of something on this machine."""
    return not is_address(text) and os.path.exists(text)


def places_of(text: str, flag: str) -> list[str]:
    """Expand {a,b}, {000..012} and, on this machine, *, ? and [..], as a shell does.

    A pipe's command is left alone.

    Returns:
        at least one; those of a wildcard exist and are sorted.
    """
    if not text:
        raise ConfigError(f"{flag}: is empty; name a file, a folder or an address.")
    if text.startswith(PIPE) or exists_as_typed(text):
        return [text]
    # braceexpand holds every range as a list, so a long one must not reach it.
    ranges = [abs(int(first) - int(last)) for first, last in _RANGE.findall(text)]
    try:
        is_long = max(ranges, default=0) >= _MAX_PLACES
        expanded = [] if is_long else list(islice(braceexpand(text), _MAX_PLACES + 1))
    except ValueError as err:
        raise ConfigError(
            f"{flag} {text}: is not there, and its braces are wrong ({err}); write {{a,b}} or "
            "{000..146}."
        ) from err
    if is_long or len(expanded) > _MAX_PLACES:
        raise ConfigError(f"{flag} {text}: stands for more than {_MAX_PLACES} names; name fewer.")
    return [place for one in expanded for place in _matching(one, flag)]


def _matching(text: str, flag: str) -> list[str]:
    if is_address(text):
        if "*" in text.partition("?")[0]:
            raise ConfigError(
                f"{flag} {text}: a server cannot be asked what matches *; write braces, such as "
                "{000..146}."
            )
        return [text]
    if not glob.has_magic(text) or exists_as_typed(text):
        return [text]
    found = [] if "\0" in text else sorted(glob.glob(text))
    if not found:
        raise ConfigError(f"{flag} {text}: nothing is called so, and nothing matches; correct it.")
    return found


def split_list(text: str, flag: str) -> list[str]:
    """Split at the commas that are in no braces and no existing name.

    A pipe's command takes the rest of the text.
    """
    if not text or exists_as_typed(text):
        return [text]
    entries, start = [], 0
    while start <= len(text):
        end = _end_of_entry(text, start)
        entries.append(text[start:end])
        start = end + 1
    if not all(entries):
        raise ConfigError(f"{flag} {text}: names nothing beside a comma; remove the comma.")
    return entries


def _end_of_entry(text: str, start: int) -> int:
    if text.startswith(PIPE, start):
        return len(text)
    commas = [i for i in range(start, len(text)) if text[i] == ","]
    for end in reversed([*commas[:_MAX_COMMAS], len(text)]):
        name = text[start:end]
        if exists_as_typed(name) or ((found := split_weight(name)) and exists_as_typed(found[0])):
            return end
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if text[i] == "," and depth == 0:
            return i
    return len(text)


def split_weight(entry: str) -> tuple[str, str] | None:
    """Split NAME=WEIGHT at its last equals sign; None where that is something else.

    It is a part of an existing name, of a command, or of what follows the ? of an address.
    """
    if exists_as_typed(entry) or entry.startswith(PIPE) or (is_address(entry) and "?" in entry):
        return None
    found = _WEIGHT.fullmatch(entry)
    return None if found is None else (found[1], found[2])
