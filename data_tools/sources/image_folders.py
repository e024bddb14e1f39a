"""Folders of image files: one sub-folder per class, flat, or with labels in a dataset.json."""

import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_tools.errors import ConfigError, count_of
from data_tools.files import parse_json
from data_tools.sources.class_names import ClassFolders
from data_tools.sources.images import IMAGE_SUFFIXES
from data_tools.sources.left_out import Tally, sentence
from data_tools.sources.reading import Reading
from data_tools.sources.sample_names import (
    HIDDEN_KIND,
    companion_key,
    is_hidden,
    is_image,
    split_last,
    split_name,
    suffix_kind,
)
from data_tools.sources.source import MAX_CLASSES, Classes, FileSource, Names, numbered_classes
from data_tools.user_files.paths import absence

LABELS_NAME = "dataset.json"  # as the tools of StyleGAN and EDM write it beside images
_COMPANIONS_SHOWN = 2  # kinds


@dataclass
class _BesideImages:
    """What a walk meets beside images."""

    flag: str  # that named the folder
    left_out: Tally = field(default_factory=Tally)
    companions: Tally = field(default_factory=Tally)  # images that may be no images of their own

    def look_for_companions(self, names: list[str], prefix: str) -> None:
        """Count names such as 1.seg.png beside 1.jpg, of one folder."""
        plain: set[str] | None = None  # keys of all, which few folders need
        for name in names:
            key = "" if name.endswith("/") else split_last(name)[0]
            if "." in key and (short := companion_key(key)) is not None:
                if plain is None:
                    plain = {split_last(other)[0] for other in names if not other.endswith("/")}
                if short in plain:
                    self.companions.add(split_name(key)[1], prefix + key)

    def notes(self) -> list[str]:
        """Say what may not be meant."""
        return [
            f"{count_of(entry.count, 'image', 'are')} called as {entry.examples[0]} is, beside "
            f"one without .{entry.kind}: if they are masks or the like, name the images in a list"
            for entry in self.companions.entries()[:_COMPANIONS_SHOWN]
        ]


def _walk(
    folder: str, prefix: str, above: tuple[tuple[int, int], ...], found: _BesideImages
) -> Iterator[str]:
    """Yield image paths relative to the root, in the order of the whole strings."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise ConfigError(
            f"{found.flag} {folder}: is a link to a folder above it; remove the link."
        )
    listed, others = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                others.append((entry.name, HIDDEN_KIND))
            elif entry.is_dir():  # class folders are often links
                # "/" ends a folder's name, so that sorting the parts sorts the paths.
                listed.append(entry.name + "/")
            elif is_image(split_last(entry.name)[1]):
                listed.append(entry.name)
            else:
                others.append((entry.name, suffix_kind(entry.name)))
    for name, kind in sorted(others):
        if prefix or name != LABELS_NAME:
            found.left_out.add(kind, prefix + name)
    found.look_for_companions(listed, prefix)
    for name in sorted(listed):
        if name.endswith("/"):
            inside = os.path.join(folder, name[:-1])
            yield from _walk(inside, prefix + name, (*above, here), found)
        else:
            yield prefix + name


def scan_folder(root: Path, flag: str, reading: Reading | None = None) -> FileSource:
    """List a folder of images: one sub-folder per class, or a flat folder without classes.

    Args:
        root: the folder; a class folder may itself hold folders.
        flag: the option that named the folder, for messages.
        reading: what names the classes; None: the first folder.
    """
    if not root.is_dir():
        state = "is a file" if root.exists() else absence(root)
        raise ConfigError(f"{flag} {root}: {state}; give a folder that holds images.")
    reading = reading or Reading()
    reading.refuse_others(str(root), "a folder of images", "class_from")
    if reading.class_from == "tar":
        raise ConfigError(f"--class-from tar: {flag} {root} holds no tars; leave it out.")
    found, walked = ClassFolders(reading), _BesideImages(flag)
    left_out = walked.left_out

    def paths() -> Iterator[bytes]:
        for path in _walk(str(root), "", (), walked):
            name = os.fsencode(path)
            found.add(name)
            yield name

    try:
        names = Names(paths())
        folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        labels_file = root / LABELS_NAME
        stored = labels_file.read_bytes() if labels_file.is_file() else b""
    except OSError as err:
        raise ConfigError(
            f"{flag} {err.filename or root}: cannot be listed ({err.strerror}); make it readable."
        ) from err
    if not len(names):
        instead = f"; left out: {sentence(left_out.entries())}" if left_out else ""
        raise ConfigError(
            f"{flag} {root}: no image files ({', '.join(sorted(IMAGE_SUFFIXES))}) in it{instead}; "
            "give a folder with one sub-folder per class, or with the images themselves."
        )
    classes = None
    if stored and not reading.class_from:
        classes = _stored_classes(f"{flag} {labels_file}", stored, names, left_out)
    if classes is None:
        if stored:
            left_out.add(suffix_kind(LABELS_NAME), LABELS_NAME)
        with_images = found.first_folders()
        for folder in folders:
            if not is_hidden(folder) and os.fsencode(folder) not in with_images:
                left_out.add("folders without images, which are no classes", folder)
        classes = _folder_classes(found, root, flag, len(names))
        if stored and not reading.class_from:
            classes.notes.append(
                f'{LABELS_NAME} is not used: it holds no {{"labels": [[file, number], ...]}}'
            )
    classes.notes.extend(walked.notes())
    return FileSource(str(root), root, names, classes, left_out.entries())


def _folder_classes(found: ClassFolders, root: Path, flag: str, num_images: int) -> Classes:
    if 0 < found.num_loose < num_images and found.reading.class_from != "none":
        loose = found.first_loose.decode("utf-8", "backslashreplace")
        raise ConfigError(
            f"{flag} {root}: {count_of(found.num_loose, 'image', 'lie')} beside class folders "
            f"({loose}, ...); move them into a class folder, or all images into one flat folder."
        )
    return found.classes(f"{flag} {root}", lambda part: f"give {flag} {root / part}")


def _stored_classes(where: str, content: bytes, names: Names, left_out: Tally) -> Classes | None:
    """Read the labels of a dataset.json; None where it is none of images with labels."""
    try:
        pairs = parse_json(content)["labels"]
        if pairs is None:
            note = f"{LABELS_NAME} says that the images have no classes"
            return Classes.none(len(names), note)
        label_of = {os.fsencode(name): label for name, label in pairs}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    advice = "correct it, or pass --class-from folder or none to leave it unread."
    if odd := [label for label in label_of.values() if type(label) is not int or label < 0]:
        raise ConfigError(f"{where}: has the label {str(odd[0])[:40]}, no class number; {advice}")
    labels, missing, num_missing = array("i"), b"", 0
    for name in names:
        label = label_of.pop(name, None)
        if label is None:
            missing, num_missing = missing or name, num_missing + 1
        else:
            labels.append(min(label, MAX_CLASSES))
    if num_missing:
        raise ConfigError(
            f"{where}: names no label for {num_missing} of {len(names)} images "
            f"({missing.decode('utf-8', 'backslashreplace')}, ...); {advice}"
        )
    for name in label_of:
        left_out.add(f"labels of {LABELS_NAME} without an image", os.fsdecode(name))
    found = np.frombuffer(labels, np.int32)
    note = f"classes are the labels in {LABELS_NAME}"
    return numbered_classes(where.partition(" ")[2], found, note)
