"""Walk the members of a tar, and group them into samples by their KEY, wherever they stand.

This is the project's only reader of tars that others wrote. It reads headers only, goes on into
archives that were joined (cat a.tar b.tar), and refuses a tar of which something may be lost:
damaged headers, cut ends, compression.
"""

import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, Protocol

from data_tools.sources.left_out import Tally
from data_tools.sources.sample_labels import LABEL_BYTES, parse_label, split_label
from data_tools.sources.sample_names import HIDDEN_KIND, is_hidden, split_name, suffix_kind
from data_tools.user_files.file_kinds import content_kind

_BLOCK = tarfile.BLOCKSIZE
_CHUNK_BYTES = 1 << 20
SHOWN_NAME = 80  # characters of a member's name in a message
# What makes a tar, or files, of another kind of archive.
_UNPACK = {
    "gzip": "gunzip",
    "bzip2": "bunzip2",
    "xz": "unxz",
    "zstd": "zstd -d",
    "lz4": "lz4 -d",
    "a ZIP archive": "unzip",
    "a 7z archive": "7z x",
    "a RAR archive": "unrar x",
}


class BadTarError(Exception):
    """A tar that cannot be read whole: a clause that follows its name, and what to do."""


class SeekableFile(Protocol):
    """What is asked of a file: reading, and going to a place."""

    def read(self, size: int, /) -> bytes:
        """Return the next bytes."""

    def seek(self, offset: int, /) -> object:
        """Go to a place, counted from the beginning."""

    def tell(self) -> int:
        """Return the place."""


class Member(tarfile.TarInfo):
    """One member."""

    archive = 0  # number of the archive, of those that were joined

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "Member":
        """Read a header; the library alone would take a damaged one for the end of the archive."""
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as err:
            if any(buf):
                raise _BadHeaderError(str(err)) from err
            raise

    @property
    def is_plain(self) -> bool:
        """Whether it is a file whose content lies in the tar as it is."""
        return self.isreg() and not self.issparse()

    @property
    def unusable_kind(self) -> str:
        """Why it has no content in the tar that could be read; "": it has."""
        if self.is_plain:
            return ""
        if self.issparse():
            return "sparse members"
        return "links" if self.islnk() or self.issym() else "members that are no files"

    @property
    def shown(self) -> str:
        """Its name, short enough for a message."""
        return self.name[:SHOWN_NAME]


class _BadHeaderError(Exception):
    """A block that should be a header, or the end, and is neither."""


def walk(file: SeekableFile) -> Iterator[Member]:
    """Go through all members of all archives of a tar.

    Args:
        file: stands anywhere and is read from its beginning. After each member it stands at the
            member's content; whoever reads that may leave it anywhere.

    Raises:
        BadTarError: it is no tar, is compressed, is damaged, or ends too early.
    """
    start, number, last = 0, 0, None
    while start is not None:
        file.seek(start)
        try:
            # The names' bytes must not depend on the locale.
            with tarfile.TarFile(
                fileobj=file, tarinfo=Member, encoding="utf-8", errors="surrogateescape"
            ) as tar:
                # Its own iterator would keep every header.
                while (member := tar.next()) is not None:
                    tar.members.clear()
                    member.archive, last = number, member
                    if member.size < 0:
                        raise _BadHeaderError("negative size")
                    yield member
                end = tar.offset
        except (_BadHeaderError, tarfile.TarError, ValueError, OverflowError) as err:
            raise _reason(file, last, start, err) from err
        start, number = _next_archive(file, end), number + 1


def _reason(file: SeekableFile, last: Member | None, start: int, err: Exception) -> BadTarError:
    """Say what is wrong behind the last member that could be read."""
    if last is None:
        return BadTarError(_other_kind(file, err))
    end = max(start, last.offset_data + -(-last.size // _BLOCK) * _BLOCK)
    if isinstance(err, _BadHeaderError):
        return BadTarError(
            f"has a damaged header after {end:,} bytes, behind {last.shown!r}; copy it again"
        )
    return BadTarError(f"is cut off inside or behind {last.shown!r} ({err}); copy it again")


def _other_kind(file: SeekableFile, err: Exception) -> str:
    file.seek(0)
    begin = file.read(_BLOCK)
    kind = content_kind(begin)
    if kind in _UNPACK:
        what = kind if kind.endswith("archive") else f"compressed with {kind}"
        why = "so that no single file can be read from it"
        return f"is {what}, {why}; unpack it once with {_UNPACK[kind]}"
    what = "is empty" if not begin else f"is no tar, or damaged at its beginning ({err})"
    return f"{what}; copy it again"


def _next_archive(file: SeekableFile, end: int) -> int | None:
    """Return where the next archive begins, behind the zeros at the end of one; None: nowhere."""
    file.seek(end)
    place, is_ended = end, False
    while chunk := file.read(_CHUNK_BYTES):
        is_ended = True
        if rest := chunk.lstrip(b"\0"):
            return place + (len(chunk) - len(rest)) // _BLOCK * _BLOCK
        place += len(chunk)
    if not is_ended:
        raise BadTarError(
            f"is cut off or damaged after {end:,} bytes: it does not end as a tar does, so its "
            "last files may be missing; copy it again"
        )
    return None


def content_of(file: BinaryIO | SeekableFile, member: Member, limit: int | None = None) -> bytes:
    """Read the content of a member that is_plain, or its first `limit` bytes."""
    file.seek(member.offset_data)
    return file.read(member.size if limit is None else min(member.size, limit))


class IncompleteSampleError(BadTarError):
    """A sample lacks a member."""


@dataclass
class TarParts:
    """The members of one sample that are wanted, by suffix."""

    key: str
    by_suffix: dict[str, Member] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """Its key, short enough for a message."""
        return self.key[:SHOWN_NAME]

    def label(self, file: SeekableFile, wanted: str) -> int:
        """Read the label from the tar.

        Args:
            file: the tar.
            wanted: the label's suffix, or json:FIELD; "" where there are no labels, which gives 0.

        Raises:
            LabelError: it is no whole number; what it is instead.
        """
        if not wanted:
            return 0
        suffix, field_name = split_label(wanted)
        return parse_label(content_of(file, self.by_suffix[suffix], LABEL_BYTES), field_name)


def grouped(
    members: Iterable[Member], wanted: frozenset[str], left_out: Tally | None = None
) -> Iterator[TarParts]:
    """Collect members into samples, and yield each when its last wanted member has been read.

    A key may come again in another of several joined archives, and is another sample there.

    Args:
        members: of a tar, in order.
        wanted: suffixes that every sample has.
        left_out: counts all that is not wanted.

    Raises:
        BadTarError: a sample lacks a member at the end of its archive, or has one twice.
    """
    waiting: dict[str, TarParts] = {}
    complete: set[str] = set()
    archive = 0
    for member in members:
        if member.archive != archive:
            _check_complete(waiting, wanted)
            complete.clear()
            archive = member.archive
        key, suffix = split_name(member.name)
        kind = member.unusable_kind or ("" if suffix else suffix_kind(member.name))
        # The last part only: sets that are in use may have samples in hidden folders.
        if is_hidden(member.name.rpartition("/")[2]):
            kind = HIDDEN_KIND
        if kind or suffix not in wanted:
            if left_out is not None and not member.isdir():
                left_out.add(kind or f".{suffix}", member.name)
            continue
        if key in complete:
            raise BadTarError(f"holds the key {key[:SHOWN_NAME]!r} twice; rename one of them")
        parts = waiting.setdefault(key, TarParts(key))
        if suffix in parts.by_suffix:
            raise BadTarError(f"holds {member.shown!r} twice; rename one of them")
        parts.by_suffix[suffix] = member
        if len(parts.by_suffix) == len(wanted):
            complete.add(key)
            yield waiting.pop(key)
    _check_complete(waiting, wanted)


def _check_complete(waiting: dict[str, TarParts], wanted: frozenset[str]) -> None:
    for parts in waiting.values():
        suffix = min(wanted - parts.by_suffix.keys())
        more = f" ({len(waiting)} such samples)" if len(waiting) > 1 else ""
        raise IncompleteSampleError(
            f"sample {parts.shown!r} has no .{suffix}{more}; see --array, --flip and --label"
        )
