"""Expand paths as people type them, and say what is wrong with one that is not there.

A shell replaces ~ and $VARIABLES, but not behind --flag=, and nothing replaces them in a YAML file.
Taken literally they would become folders called "~" and "$SCRATCH".
"""

import os
import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

from data_tools.errors import ConfigError
from data_tools.user_files.place_names import PIPE

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))")
_HOME = re.compile(r"^~[^/]*")
# Where a data set's name begins in a union or a mixture, or the whole text.
_HOME_OF_DATA = re.compile(r"(?:^|(?<=[,{]))~[^/,{}=]*")
MAX_NAME_BYTES = 255  # of file systems, and what Linux takes as a path, with room for our names
MAX_PATH_BYTES = 4096 - 512


def expand(text: str, where: str) -> str:
    """Return a path with ~, ~user and $VARIABLES replaced; one that exists as it is stays.

    `where` is the flag or key that gave it.

    Raises:
        ConfigError: a variable that is not set, a user whom nobody knows, or a link to nothing.
    """
    _check_possible(text, where)
    path = expand_name(text, where)
    if broken_link(Path(path)):
        raise ConfigError(
            f"{where} {text}: {absence(Path(path))}; restore what it stood for, or name another."
        )
    return path


def _check_possible(text: str, where: str) -> None:
    """Refuse what no system takes as a path; asking whether it exists would fail."""
    try:
        coded = os.fsencode(text)
    except UnicodeEncodeError:
        coded = b"\0"
    longest = max(map(len, coded.split(b"/")))
    if b"\0" in coded:
        raise ConfigError(f"{where} {text[:60]!r}: holds characters that no path has; correct it.")
    if longest > MAX_NAME_BYTES or len(coded) > MAX_PATH_BYTES:
        raise ConfigError(
            f"{where} {text[:60]}...: is too long for a path ({len(coded)} bytes, its longest name "
            f"{longest}); shorten it."
        )


def expand_name(text: str, where: str) -> str:
    """Expand a path that may be gone: a run goes on without the weights that it began with."""
    return _expanded(text, where, _HOME)


def expand_data(text: str, where: str) -> str:
    """Expand a text that may name several data sets; a pipe's command is left to the shell."""
    return text if text.startswith(PIPE) else _expanded(text, where, _HOME_OF_DATA)


def _expanded(text: str, where: str, home: re.Pattern[str]) -> str:
    if "$" in text and os.path.lexists(text):
        return text

    def value_of(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if not os.environ.get(name):
            raise ConfigError(
                f"{where} {text}: the variable {name} is not set; set it, or write the path out."
            )
        return os.environ[name]

    def home_of(found: re.Match[str]) -> str:
        folder = os.path.expanduser(found[0])
        if folder == found[0]:
            raise ConfigError(
                f"{where} {text}: no user's home is {found[0]}; write the path out, or "
                f"./{found[0]} for a folder of that name."
            )
        return folder

    expanded = home.sub(home_of, _VARIABLE.sub(value_of, text))
    if text.startswith("~") and os.path.lexists(text) and not os.path.lexists(expanded):
        raise ConfigError(
            f"{where} {text}: means {expanded}, which does not exist, and here lies a folder "
            f"called {text.split('/')[0]} that an earlier version of this program may have made; "
            f"write ./{text} for what is in it, or {expanded}."
        )
    return expanded


def typed_text(text: str, expand: Callable[[str, str], str] = expand) -> str:
    """Expand a flag's value, as argparse's type; argparse names the flag."""
    try:
        return expand(text, "")
    except ConfigError as err:
        raise ArgumentTypeError(str(err).strip().rstrip(".")) from err


def typed_path(text: str) -> Path:
    """Expand a flag's value to a Path, as argparse's type."""
    return Path(typed_text(text))


def typed_data(text: str) -> str:
    """Expand a flag that may name several data sets, as argparse's type."""
    return typed_text(text, expand_data)


def broken_link(wanted: Path) -> Path | None:
    """Return the link on the way to a path whose target is not there; None if there is none."""
    try:
        links = (part for part in (wanted, *wanted.parents) if part.is_symlink())
        return next((link for link in links if not link.exists()), None)
    except OSError:  # a folder on the way that may not be entered
        return None


def absence(wanted: Path, named: Path | None = None) -> str:
    """Say in what way a path is not there: it is a link to nothing, or nothing at all.

    `named` is what the sentence begins with, if that is another path.
    """
    link = broken_link(wanted)
    if link is None:
        return "does not exist"
    what = "" if link == (named or wanted) else f"{link} "
    return f"{what}is a link to {os.readlink(link)}, which does not exist"
