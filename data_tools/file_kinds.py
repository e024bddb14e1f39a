"""What a file is by its first bytes, where it is not what was asked for.

Servers answer with login pages, error messages and pointers in the place of files, often with the
status of a success.
"""

import json
import re

HEAD_BYTES = 4096  # of a file, enough to tell
_SHOWN = 80  # characters of what a server says
_GIT_LFS = b"version https://git-lfs"
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip (as .npz and .pt are)",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
}


def kind_of(head: bytes) -> str:
    """Name what a file is: "tar", "HTML", "XML", "JSON", "a Git LFS pointer", "gzip" ...; or "".

    Args:
        head: its first HEAD_BYTES, or all of it.
    """
    if head[257:262] == b"ustar":
        return "tar"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(_GIT_LFS):
        return "a Git LFS pointer"
    start = text[:512].lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<script")):
        return "HTML"
    if start.startswith(b"<?xml") or re.match(rb"<[a-z]+>", start):
        return "HTML" if b"<html" in start else "XML"
    if start.startswith((b'{"', b"{\n", b"{ ", b"{\r", b"{}")):
        return "JSON"
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "")


def server_says(body: bytes) -> str:
    """Return the message in an error's body as object stores and web services write it, or ""."""
    kind, text = kind_of(body), body.decode("utf-8", "replace")
    if kind == "XML":
        found = [re.search(f"<{tag}>([^<]*)</{tag}>", text) for tag in ("Code", "Message")]
        said = ": ".join(match[1] for match in found if match)
    elif kind == "JSON":
        said = _message(text)
    elif kind == "HTML":
        title = re.search(r"<title[^>]*>([^<]*)</title>", text, re.IGNORECASE)
        said = title[1] if title else ""
    else:
        said = ""
    plain = "".join(filter(str.isprintable, " ".join(said.split()))).rstrip(".")
    return plain if len(plain) <= _SHOWN else plain[: _SHOWN - 3] + "..."


def _message(text: str) -> str:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    while isinstance(content, dict):
        keys = ("message", "error_description", "error", "detail", "msg")
        content = next((content[key] for key in keys if key in content), "")
    return content if isinstance(content, str) else ""
