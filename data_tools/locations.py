"""Where the files of a data set lie: a folder, a web server, an object store, a shell command.

A location comes from the user's own command line or config, never from a file that was read. The
names that are looked up in it come from such files, so only plain file names are accepted.
"""

import re
import shlex
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from braceexpand import UnbalancedBracesError, braceexpand

from data_tools.errors import ConfigError

PIPE = "pipe:"
_STORES = ("s3://", "gs://")
_REMOTE_SCHEMES = ("http", "https", "s3", "gs")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_RANGE = re.compile(r"\{(-?\d{1,18})\.\.(-?\d{1,18})")
_MAX_EXPANSIONS = 10_000  # a slip of the pen such as {0..999999999} must not fill the memory


@dataclass(frozen=True)
class Location:
    """Where the files of one data set lie.

    Attributes:
        text: as the user gave it.
        folder: on this machine; None if the files are fetched.
    """

    text: str
    folder: Path | None

    def path(self, name: str) -> Path:
        """Return where a file lies on this machine."""
        assert self.folder is not None, "a remote file has a URL"
        _check_name(name)
        return self.folder / name

    def url(self, name: str) -> str:
        """Return the URL of a file, or "pipe:" and the shell command that prints it."""
        assert self.folder is None, "a local file has a path"
        _check_name(name)
        if self.text.startswith(PIPE):
            return self.text.replace("{}", shlex.quote(name))
        if self.text.startswith(_STORES):  # in a key, ?, # and % are letters like others
            return f"{self.text.rstrip('/')}/{name}"
        parts = urlsplit(self.text)
        path = f"{parts.path.rstrip('/')}/{quote(name)}"
        return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))

    def describe(self, name: str) -> str:
        """Name a file in a message: its path, or its URL without password and query."""
        if self.folder is not None:
            return str(self.folder / name)
        url = self.url(name)
        if url.startswith((PIPE, *_STORES)):
            return url
        parts = urlsplit(url)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def parse_location(text: str, flag: str) -> Location:
    """Understand what the user gave.

    Args:
        text: FOLDER, file:///FOLDER, http(s)://HOST/FOLDER[?QUERY], s3://BUCKET/FOLDER,
            gs://BUCKET/FOLDER, or "pipe:COMMAND {} ..." with {} where the file's name goes.
        flag: that gave it, for messages.
    """
    if text.startswith(PIPE):
        if "{}" not in text:
            raise ConfigError(
                f"{flag} {text}: has no {{}} for the file's name; write a command such as "
                "pipe:ssh host cat folder/{}."
            )
        return Location(text, None)
    scheme, colon, rest = text.partition(":")
    if scheme == "file" and colon:
        host = urlsplit(text).netloc
        if host not in ("", "localhost"):
            raise ConfigError(
                f"{flag} {text}: a file: URL cannot name another machine ({host}); write "
                "file:///FOLDER with three slashes."
            )
        return _local(text, unquote(urlsplit(text).path), flag)
    if colon and rest.startswith("//"):
        try:
            host = urlsplit(text).netloc
            if scheme in ("http", "https"):
                (urlsplit(text).hostname or "").encode("idna")
        except ValueError:  # such as http://[x or http://a..b
            host = ""
        if scheme not in _REMOTE_SCHEMES or not host:
            known = ", ".join(f"{known}://" for known in _REMOTE_SCHEMES)
            raise ConfigError(
                f"{flag} {text}: is no URL that can be read; use a folder, file:, {known} with a "
                "host or bucket, or pipe:COMMAND."
            )
        if scheme in ("http", "https") and "#" in text:
            raise ConfigError(
                f"{flag} {text}: a server is never sent what follows the #; write %23 where it is "
                "part of a name, or leave it out."
            )
        return Location(text, None)
    if not text:
        raise ConfigError(f"{flag}: is empty; name a folder or a URL.")
    return _local(text, text, flag)


def _local(text: str, path: str, flag: str) -> Location:
    folder = Path(path)
    try:
        folder.exists()
    except OSError as err:  # a name too long, or a folder above it that may not be entered
        raise ConfigError(
            f"{flag} {text}: {err.strerror}; name a folder that can be read."
        ) from err
    return Location(text, folder)


def expand_braces(text: str, flag: str) -> list[str]:
    """Expand {a,b} and {000..012} as a shell does; a pipe's command is left alone."""
    if text.startswith(PIPE):
        return [text]
    # braceexpand holds every range as a list, so a long one must not reach it.
    ranges = [abs(int(first) - int(last)) for first, last in _RANGE.findall(text)]
    try:
        is_long = max(ranges, default=0) >= _MAX_EXPANSIONS
        expanded = [] if is_long else list(islice(braceexpand(text), _MAX_EXPANSIONS + 1))
    except UnbalancedBracesError as err:
        raise ConfigError(f"{flag} {text}: its braces do not pair; write {{a,b}}.") from err
    if is_long or len(expanded) > _MAX_EXPANSIONS:
        raise ConfigError(
            f"{flag} {text}: stands for more than {_MAX_EXPANSIONS} data sets; name fewer."
        )
    return expanded


def _check_name(name: str) -> None:
    if not _PLAIN_NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r}: is no plain file name, so it is not looked up; correct the dataset.json "
            "that names it."
        )
