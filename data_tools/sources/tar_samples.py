"""Group the members of a tar of latents into samples by their KEY, wherever they stand."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from data_tools.sources.left_out import Tally
from data_tools.sources.sample_labels import LABEL_BYTES, parse_label, split_label
from data_tools.sources.sample_names import HIDDEN_KIND, is_hidden, split_name, suffix_kind
from data_tools.sources.tar_members import SHOWN_NAME, BadTarError, Member, SeekableFile, content_of


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
        kind, key, suffix = _look(member)
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


def _look(member: Member) -> tuple[str, str, str]:
    """Return why a member is left out, "" where it is not, and its key and suffix."""
    key, suffix = split_name(member.name)
    # The last part only: sets that are in use may have samples in hidden folders.
    if is_hidden(member.name.rpartition("/")[2]):
        return HIDDEN_KIND, key, suffix
    return unusable_kind(member) or ("" if suffix else suffix_kind(member.name)), key, suffix


def unusable_kind(member: Member) -> str:
    """Say why a member has no content in the tar that could be read; "": it has."""
    if member.is_plain:
        return ""
    if member.issparse():
        return "sparse members"
    return "links" if member.islnk() or member.issym() else "members that are no files"
