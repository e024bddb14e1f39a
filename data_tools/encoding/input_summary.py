"""Summarise the input before encoding begins: its classes, doubts, and what is left out."""

import statistics
from collections.abc import Sequence

from data_tools.errors import ConfigError, some
from data_tools.shards.manifest import ClassEntry
from data_tools.sources.left_out import sentence
from data_tools.sources.source import ImageClass, ImageSource

_CLASSES_SHOWN = 20
_FIRST_SHOWN = 3  # of more classes
_MAX_EMPTY = 0.9  # of the numbers of classes


def summary(source: ImageSource) -> list[str]:
    """Return lines about the classes that were found and about what was not used."""
    return [
        *class_lines(source.classes),
        *source.notes,
        *([f"left out: {sentence(source.left_out)}"] if source.left_out else []),
    ]


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
    if not all(entry.id.isdigit() for entry in source.classes):
        return  # the input names them
    if empty <= _MAX_EMPTY * len(source.classes):
        return
    used = [entry.id for entry in source.classes if entry.count]
    raise ConfigError(
        f"--input {source.text}: {empty:,} of {len(source.classes):,} classes have no image, only "
        f"{some(used, _FIRST_SHOWN)} have; number the classes from 0 without gaps, or "
        "pass --allow-empty-classes if the others come later."
    )
