"""Parse where a data set lies: in a folder, on a server, in a bucket, or behind a command.

A location comes from the user's own command line or config, never from a file that was read. The
names that are looked up in it come from such files, so only plain file names are accepted.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from data_tools.errors import ConfigError
from data_tools.user_files.place_names import PIPE

_STORES = ("s3://", "gs://")
_REMOTE_SCHEMES = ("http", "https", "s3", "gs")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Location:
    """Where the files of one data set lie."""

    text: str  # as the user gave it
    folder: Path | None  # on this machine; None if the files are fetched

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


def _check_name(name: str) -> None:
    if not _PLAIN_NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r}: is no plain file name, so it is not looked up; correct the dataset.json "
            "that names it."
        )
