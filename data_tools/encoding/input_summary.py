"""Summarise the input before encoding begins, and compare it with what is encoded already."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_tools.encoding.encoder import SPLIT
from data_tools.encoding.output import EncodingOutput
from data_tools.encoding.settings import EncodingSettings
from data_tools.errors import ConfigError, some
from data_tools.permutations import permutation
from data_tools.shards.manifest import ClassEntry
from data_tools.sources.left_out import sentence
from data_tools.sources.source import FileSource, ImageClass, ImageSource

_CLASSES_SHOWN = 20
_FIRST_SHOWN = 3  # of more classes
NAMES_SHOWN = 5
_MAX_EMPTY = 0.9  # of the numbers of classes


def summary(source: ImageSource) -> list[str]:
    """Return lines about the classes that were found and about what was not used."""
    left_out = [f"left out: {sentence(source.left_out)}"] if source.left_out else []
    return [*class_lines(source.classes), *source.notes, *left_out]


def class_lines(classes: Sequence[ImageClass | ClassEntry]) -> list[str]:
    """Return lines about classes: how many images each has, and which have none."""
    if not classes:
        return ["no classes: train with --num-classes 0"]
    counts = [entry.count for entry in classes]
    shown = classes if len(classes) <= _CLASSES_SHOWN else classes[:_FIRST_SHOWN]
    lines = ["images per class: " + ", ".join(f"{entry.id} {entry.count}" for entry in shown)]
    if len(shown) < len(classes):
        lines[0] += (
            f", ...; {min(counts)} to {max(counts)} in each, median {statistics.median(counts):g}"
        )
    empty = [entry.id for entry in classes if not entry.count]
    if empty == ["0"] and len(classes) > 1:
        lines.append("class 0 has no image; do the labels begin at 1?")
    elif empty:
        verb = "has" if len(empty) == 1 else "have"
        lines.append(
            f"{len(empty)} of {len(classes)} classes {verb} no image: {some(empty, _FIRST_SHOWN)}"
        )
    return lines


def refuse_mostly_empty(source: ImageSource) -> None:
    """Ask before numbers with large gaps become classes, each of which the network would learn."""
    empty = sum(not entry.count for entry in source.classes)
    is_named = not all(entry.id.isdigit() for entry in source.classes)
    if is_named or empty <= _MAX_EMPTY * len(source.classes):
        return
    used = [entry.id for entry in source.classes if entry.count]
    raise ConfigError(
        f"--input {source.text}: {empty:,} of {len(source.classes):,} classes have no image, only "
        f"{some(used, _FIRST_SHOWN)} have; number the classes from 0 without gaps, or "
        "pass --allow-empty-classes if the others come later."
    )


def check_files_exist(source: ImageSource, sizes: list[int]) -> None:
    """Refuse names without files before encoding begins: later, others are another data set."""
    if not isinstance(source, FileSource):
        return
    places = zip(source.sized_places(), sizes, strict=True)
    if missing := [source.name(place) for place, size in places if size < 0]:
        is_expanded = missing[0].startswith(("~", "$"))
        hint = "names stand for themselves in a list, without ~ and $NAME; " if is_expanded else ""
        raise ConfigError(
            f"--input {source.text}: {len(missing)} of {len(sizes)} files do not exist "
            f"({some(missing, NAMES_SHOWN)}); {hint}bring them or leave their names out, and run "
            "the same command again."
        )


def edited_images(
    output: Path, begun: EncodingSettings, source: ImageSource, sizes: list[int]
) -> list[str]:
    """Name images of finished shards whose files, now of `sizes`, had others in the beginning."""
    places = source.edited(begun.sizes, sizes)
    if not places:
        return []
    missing = EncodingOutput(output, begun).missing
    shard_of = np.empty(begun.num_files, np.int64)
    order = permutation(begun.num_files, begun.seed, SPLIT)
    shard_of[order] = np.arange(begun.num_files) // begun.shard_size
    return [source.name(place) for place in places if int(shard_of[place]) not in missing]
