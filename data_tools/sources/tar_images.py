"""Find the images of one tar and their labels, in one pass over its headers."""

from array import array
from collections import Counter
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_tools.errors import ConfigError, count_of
from data_tools.sources.left_out import LeftOut, Tally
from data_tools.sources.reading import Reading
from data_tools.sources.sample_labels import (
    LABEL_BYTES,
    LABEL_SUFFIX,
    LabelError,
    parse_label,
    split_label,
)
from data_tools.sources.sample_names import (
    HIDDEN_KIND,
    TAR_NAME,
    companion_key,
    is_hidden_path,
    is_image,
    split_last,
    split_name,
    suffix_kind,
)
from data_tools.sources.source import MAX_CLASSES, Names
from data_tools.sources.tar_members import SHOWN_NAME, BadTarError, Member, content_of, walk

TARS_INSIDE = "tars in the tar"
_NO_LABEL = -1


@dataclass(frozen=True)
class TarIndex:
    """The images of one tar."""

    names: Names  # of the image files in it
    offsets: np.ndarray  # int64 (n,), where their contents begin
    sizes: np.ndarray  # int64 (n,), bytes of their contents
    labels: np.ndarray  # int32 (n,), -1 without a label
    left_out: list[LeftOut]  # all else in the tar


@dataclass
class _Sample:
    """The members that share a key and follow each other."""

    key: str = ""
    archive: int = 0
    image: Member | None = None
    label: int = _NO_LABEL
    label_name: str = ""


def scan_tar(path: Path, reading: Reading | None = None) -> TarIndex:
    """Read a tar's headers and its labels.

    KEY.jpg is an image and KEY.cls its label, wherever both stand in the tar. KEY.seg.png beside
    KEY.jpg is no image of its own. With a suffix in `reading`, names are cut as webdataset does.
    """
    scan = _Scan(path, reading or Reading())
    try:
        with path.open("rb") as file:
            for member in walk(file):
                scan.take(member, file)
    except BadTarError as err:
        raise ConfigError(f"--input {path}: {err}.") from err
    return scan.index()


class _Scan:
    """Members of a tar as they come, and what has been made of them."""

    def __init__(self, path: Path, reading: Reading) -> None:
        self.path, self.reading = path, reading
        self.is_cut_first = bool(reading.image_suffix or reading.label_suffix)
        suffix, self.label_field = split_label(reading.label_suffix or LABEL_SUFFIX)
        # Where something else names the classes, a label is one more file that is left out.
        self.label_suffix = None if reading.class_from else suffix.lower()
        self.names: list[bytes] = []
        self.sizes, self.offsets, self.labels = array("q"), array("q"), array("i")
        self.left_out = Tally()
        self.sample = _Sample()
        self.first = 0  # image of the current archive
        self.waiting: dict[str, tuple[int, str]] = {}  # labels and their names, by key
        self.orphans: list[str] = []  # names of labels whose image was not found
        self.companions: dict[int, str] = {}  # place of an image, and the key that may be another's
        self.beside: list[int] = []  # places of images that stand beside that of their sample
        self.together: Counter[tuple[str, ...]] = Counter()  # suffixes of a key that has no other

    def take(self, member: Member, file: BinaryIO) -> None:
        """Look at a member."""
        if member.isdir():
            return
        member.name = member.name.removeprefix("./")
        key, suffix, kind = self._look(member)
        if kind:
            self.left_out.add(kind, member.name)
            return
        sample = self.sample
        if (key, member.archive) != (sample.key, sample.archive):
            self._close()
            if member.archive != sample.archive:
                self._end_archive()
            sample = self.sample = _Sample(key, member.archive)
        if suffix == self.label_suffix:
            if sample.label_name:
                raise self._error(f"{sample.label_name} and {member.shown} label one sample")
            sample.label, sample.label_name = self._label(member, file), member.name
        elif sample.image is None:
            sample.image = member
        elif sample.image.name == member.name:
            raise self._error(f"holds {member.shown} twice; leave one, or rename it")
        else:
            raise self._error(
                f"{sample.image.shown} and {member.shown} are one sample; leave one image per "
                "sample, or say with --image-suffix which it is"
            )

    def _look(self, member: Member) -> tuple[str, str, str]:
        """Return key, suffix, and the kind of what is left out or ""."""
        name = member.name
        if is_hidden_path(name):
            return "", "", HIDDEN_KIND
        if kind := member.unusable_kind:
            return "", "", kind
        key, suffix = (split_name if self.is_cut_first else split_last)(name)
        suffix, wanted = suffix.lower(), self.reading.image_suffix.lower()
        if suffix == self.label_suffix or (suffix == wanted if wanted else is_image(suffix)):
            return key, suffix, ""
        if self.is_cut_first and suffix:
            return "", "", f".{suffix}"
        return "", "", TARS_INSIDE if TAR_NAME.search(name) else suffix_kind(name)

    def _label(self, member: Member, file: BinaryIO) -> int:
        try:
            number = parse_label(content_of(file, member, LABEL_BYTES), self.label_field)
        except LabelError as err:
            what = f"{member.shown} holds {err}, which is no number of a class"
            raise self._error(f"{what}; write the label into it") from err
        if number < 0:
            raise self._error(f"{member.shown} holds {number}; labels count from 0")
        return min(number, MAX_CLASSES)

    def _error(self, what: str) -> ConfigError:
        return ConfigError(f"--input {self.path}: {what}.")

    def _close(self) -> None:
        """Keep the members of the current sample."""
        sample, image = self.sample, self.sample.image
        if image is not None:
            if not self.is_cut_first and (short := companion_key(sample.key)) is not None:
                self.companions[len(self.names)] = short
            self.names.append(image.name.encode("utf-8", "surrogateescape"))
            self.offsets.append(image.offset_data)
            self.sizes.append(image.size)
            self.labels.append(sample.label)
        elif sample.label_name:
            if sample.key in self.waiting:
                other = self.waiting[sample.key][1]
                raise self._error(f"{other} and {sample.label_name} label one sample; leave one")
            self.waiting[sample.key] = (sample.label, sample.label_name)

    def _end_archive(self) -> None:
        """Look at what belongs together in an archive; another may use the same keys again."""
        # Labels may stand anywhere in it.
        for place in range(self.first, len(self.names)) if self.waiting else ():
            if self.labels[place] == _NO_LABEL:
                self.labels[place], _ = self.waiting.pop(self._key(place), (_NO_LABEL, ""))
        self.orphans += [name for _, name in self.waiting.values()]
        self.waiting.clear()
        self._find_companions()
        self.first = len(self.names)

    def _name(self, place: int) -> str:
        return self.names[place].decode("utf-8", "surrogateescape")

    def _key(self, place: int) -> str:
        return (split_name if self.is_cut_first else split_last)(self._name(place))[0]

    def index(self) -> TarIndex:
        """Return what was found, after the last member."""
        self._close()
        self._end_archive()
        self._refuse_several_images()
        kept = np.ones(len(self.names), bool)
        kept[self.beside] = False
        labels = np.frombuffer(self.labels, np.int32)[kept]
        if self.orphans and (labels == _NO_LABEL).any():
            raise self._orphans_error(labels)
        for name in self.orphans:
            self.left_out.add("labels without an image", name)
        return TarIndex(
            Names(compress(self.names, kept.tolist())),
            np.frombuffer(self.offsets, np.int64)[kept],
            np.frombuffer(self.sizes, np.int64)[kept],
            labels,
            self.left_out.entries(),
        )

    def _find_companions(self) -> None:
        """Find the images that stand beside the image of their sample, as a mask does."""
        candidates = {
            place: key
            for place, key in self.companions.items()
            if place >= self.first and self.labels[place] == _NO_LABEL
        }
        if not candidates:
            return
        others = (i for i in range(self.first, len(self.names)) if i not in self.companions)
        mains = set(candidates.values()).intersection(map(self._key, others))
        alone: dict[str, list[str]] = {}
        for place, short in candidates.items():
            suffix = split_name(self._name(place))[1]
            if short in mains:
                self.left_out.add(f".{suffix} beside the image of its key", self._name(place))
                self.beside.append(place)
            else:
                alone.setdefault(short, []).append(suffix)
        self.together.update(tuple(sorted(suffixes)) for suffixes in alone.values())

    def _refuse_several_images(self) -> None:
        """Ask which image of a sample is meant; photographs have such names too, but seldom."""
        for suffixes, count in self.together.items():
            if len(suffixes) > 1 and count > 1:
                raise self._error(
                    f"{count} of its keys have {' and '.join(f'.{name}' for name in suffixes)}; "
                    f"say which is the image, for example --image-suffix {suffixes[0]}"
                    f"{self._label_hint()}"
                )

    def _label_hint(self) -> str:
        """Return the flag that would find the labels whose image was not found."""
        suffix = split_name(self.orphans[0])[1] if self.orphans else self.label_suffix
        return "" if suffix == self.label_suffix else f" --label-suffix {suffix}"

    def _orphans_error(self, labels: np.ndarray) -> ConfigError:
        hint = ""
        if self.companions:
            suffix = split_name(self._name(min(self.companions)))[1]
            hint = f", for example --image-suffix {suffix}{self._label_hint()}"
        first, num_bare = self.orphans[0][:SHOWN_NAME], int((labels == _NO_LABEL).sum())
        return self._error(
            f"{len(self.orphans)} .{self.label_suffix} ({first}, ...) have no image "
            f"beside them, and {count_of(num_bare, 'image', 'have')} no label; give both "
            f"one KEY, or say what follows KEY and a dot with --image-suffix and --label-suffix"
            f"{hint}"
        )
