"""Recognise what servers send in the place of a file: login pages, error messages, pointers."""

import re

from data_tools.files import parse_json
from data_tools.user_files.file_kinds import content_kind, is_lfs_pointer

HEAD_BYTES = 4096  # of what was sent, enough for its message
_TAR_MAGIC = slice(257, 262)
_SHOWN = 80  # characters of what a server says


def instead_of_file(head: bytes, name: str, origin: str) -> str:
    """Say what came in a file's place; "" where nothing speaks against the file itself.

    `origin` is what the server says of it, see Stream.
    """
    if is_lfs_pointer(head):
        return f"it is a git-lfs pointer and no {name}: ask for what the site's downloads give"
    kind = content_kind(head)
    if kind not in ("HTML", "XML", "JSON") or head[_TAR_MAGIC] == b"ustar":
        return ""
    if kind == "JSON" and name.endswith(".json"):
        return ""
    said = server_says(head)
    about = ", ".join(filter(None, (origin, said and repr(said))))
    why = ": the server may ask for a login" if kind == "HTML" else ""
    return f"it is {kind}{about and f' ({about})'} and no {name}{why}"


def error_message(body: bytes) -> str:
    """Return what an error's body says beyond its status; a page's title repeats the status."""
    return "" if content_kind(body) == "HTML" else server_says(body)


def server_says(body: bytes) -> str:
    """Return the message in what object stores and web services send; a page's title; or ""."""
    kind, text = content_kind(body), body[:HEAD_BYTES].decode("utf-8", "replace")
    if kind == "XML":
        found = [re.search(f"<{tag}>([^<]*)</{tag}>", text) for tag in ("Code", "Message")]
        said = ": ".join(match[1] for match in found if match)
    elif kind == "JSON":
        said = _json_message(text)
    elif kind == "HTML":
        title = re.search(r"<title[^>]*>([^<]*)</title>", text, re.IGNORECASE)
        said = title[1] if title else ""
    else:
        said = ""
    plain = "".join(filter(str.isprintable, " ".join(said.split()))).rstrip(".")
    return plain if len(plain) <= _SHOWN else plain[: _SHOWN - 3] + "..."


def json_message(text: bytes) -> str:
    """Return the message, where JSON is one and no data; else ""."""
    return server_says(text) if content_kind(text) == "JSON" and len(text) <= HEAD_BYTES else ""


def _json_message(text: str) -> str:
    try:
        content = parse_json(text)
    except ValueError:
        return ""
    while isinstance(content, dict):
        keys = ("message", "error_description", "error", "detail", "msg")
        content = next((content[key] for key in keys if key in content), "")
    return content if isinstance(content, str) else ""
