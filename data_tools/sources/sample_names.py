"""Split names of files and tar members into KEY and SUFFIX, and tell images from other files.

A sample's files share a KEY. It ends at the first dot of the last part of the path, as webdataset
has it; photographs have dots in their names, so where nobody names suffixes the last dot counts.
"""

import re

from data_tools.sources.images import IMAGE_SUFFIXES

HIDDEN_KIND = "hidden or system files"  # as one kind of what is left out
# Folders that systems put between people's files.
_JUNK_FOLDERS = frozenset(
    {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
)
TAR_NAME = re.compile(r"(?i)[.](tar|tgz|tbz2?|txz|tar[.](gz|bz2|xz|zst|lz4))$")  # packed, too
_SUFFIX = re.compile(r"[a-z0-9]{1,9}")
_WORD = re.compile(r"[A-Za-z_]")


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into KEY and SUFFIX at the first dot of its last part.

    A part that begins with a dot has its first dot for the key: it is hidden, and no sample's.
    """
    folder, slash, base = name.rpartition("/")
    key, _, suffix = base.partition(".")
    return folder + slash + key, suffix


def split_last(name: str) -> tuple[str, str]:
    """Split a name into KEY and SUFFIX at its last dot; the suffix in small letters."""
    folder, slash, base = name.rpartition("/")
    key, dot, suffix = base.rpartition(".")
    return (folder + slash + key, suffix.lower()) if dot else (name, "")


def is_image(suffix: str) -> bool:
    """Tell the suffixes of images, in any letters."""
    return f".{suffix.lower()}" in IMAGE_SUFFIXES


def companion_key(key: str) -> str | None:
    """Return the KEY of which an image could be a companion, as the mask KEY.seg.png of KEY.jpg.

    Args:
        key: of an image, up to its last dot; 22.05 is a key with a dot in it, and nothing's mask.
    """
    short, middle = split_name(key)
    return short if short and not short.endswith("/") and _WORD.match(middle) else None


def is_hidden(part: str) -> bool:
    """Tell files and folders that systems make and nobody means as data: .x, ._x, __MACOSX, ..."""
    return (part.startswith(".") and part not in (".", "..")) or part in _JUNK_FOLDERS


def suffix_kind(name: str) -> str:
    """Name the kind of a file that is not used: its suffix, where it has one."""
    suffix = split_last(name)[1]
    return f".{suffix}" if _SUFFIX.fullmatch(suffix) else "files without a suffix"


def is_hidden_path(name: str) -> bool:
    """Tell whether any part of a path is_hidden; quick for the usual names."""
    return (name[0:1] == "." or "/" in name or name in _JUNK_FOLDERS) and any(
        map(is_hidden, name.split("/"))
    )
