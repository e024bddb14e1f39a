"""Images in a data set that Hugging Face `datasets` wrote to disk (`save_to_disk`).

The package maps the Arrow files into memory: an image is read where it lies, nothing is copied.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_tools.errors import ConfigError
from data_tools.file_kinds import refuse_lfs_pointer
from data_tools.images import BadImageError
from data_tools.sources import (
    MAX_CLASSES,
    MAX_IMAGE_BYTES,
    ImageClass,
    ImageSource,
    Names,
    numbered_classes,
    too_large_label,
)

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

_STATE_NAME, _SPLITS_NAME = "state.json", "dataset_dict.json"
# The package trusts a data set's JSON files. RuntimeError: nested too deep, or more than Arrow can.
_UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    RuntimeError,
)
_NUMBER_COLUMNS = ("label", "labels", "cls")  # of class numbers, where no column names its classes


class HuggingFaceSource(ImageSource):
    """Images in a column of an Arrow table.

    An image is called ROW/PATH, with the path that its row has beside the bytes; it only names.
    """

    def __init__(
        self,
        text: str,
        images: "pa.ChunkedArray",
        labels: np.ndarray,
        classes: tuple[ImageClass, ...],
    ) -> None:
        """Describe a column of structs {bytes, path}."""
        super().__init__(text, labels, classes)
        self.images = images
        self.paths = Names(_paths(images))

    def raw_names(self) -> Iterator[bytes]:
        """Go through ROW/PATH in order."""
        for row, path in enumerate(self.paths):
            yield b"%d/%b" % (row, path)

    def raw_name(self, index: int) -> bytes:
        """Return ROW/PATH."""
        return b"%d/%b" % (index, self.paths[index])

    def read(self, index: int) -> bytes:
        """Copy an image's bytes out of the mapped file."""
        buffer = self.images[index]["bytes"].as_buffer()
        if buffer is None:
            raise BadImageError("has no bytes in its row")
        if buffer.size > MAX_IMAGE_BYTES:
            raise BadImageError(f"has {buffer.size:,} bytes, more than {MAX_IMAGE_BYTES:,}")
        return buffer.to_pybytes()

    def num_bytes(self, index: int) -> int:
        """Return how far apart the image's offsets are; -1 for a row without bytes."""
        buffer = self.images[index]["bytes"].as_buffer()
        return -1 if buffer is None else buffer.size


def _paths(images: "pa.ChunkedArray") -> Iterator[bytes]:
    for chunk in images.chunks:
        for path in chunk.field("path").cast("binary").to_pylist():  # may be no UTF-8
            yield path or b""


def is_saved_dataset(folder: Path) -> bool:
    """Tell a folder that `save_to_disk` wrote, of one split or of several, from others.

    Raises:
        OSError: the folder cannot be looked into.
    """
    return _is_split(folder) or (folder / _SPLITS_NAME).is_file()


def _is_split(folder: Path) -> bool:
    return (folder / _STATE_NAME).is_file() and (folder / "dataset_info.json").is_file()


def open_saved_dataset(folder: Path) -> HuggingFaceSource:
    """Open one split.

    Its classes are those of its only ClassLabel column, in the order in which that has them; else
    the numbers in a column called label, labels or cls; without either there are none.
    """
    if not _is_split(folder):
        raise _splits_error(folder)
    try:
        # By name: without the package, a folder datasets/ of ours would be an empty module.
        from datasets import ClassLabel, Dataset, Image
    except ImportError as err:
        raise ConfigError(
            f"--input {folder}: is a data set of Hugging Face datasets, which is not installed; "
            "pip install datasets."
        ) from err
    try:
        # Without files there is nothing to load, which the package takes for an error.
        found = Dataset.load_from_disk(str(folder)) if _has_files(folder) else ()
    except _UNREADABLE as err:
        raise _unreadable_error(folder, err) from err
    if not len(found):
        raise ConfigError(f"--input {folder}: has no rows; give a data set with images.")
    images = _only_column(folder, found, Image)
    if images is None:
        columns = ", ".join(found.column_names)
        raise ConfigError(
            f"--input {folder}: none of its columns ({columns}) is of type Image; cast one with "
            "cast_column(NAME, datasets.Image()) and save the data set again."
        )
    labels = _only_column(folder, found, ClassLabel)
    class_names = found.features[labels].names if labels else None
    labels = labels or next((name for name in _NUMBER_COLUMNS if name in found.features), None)
    if not all(isinstance(name, str) for name in class_names or ()):
        err = ValueError(f"column {labels} has class names that are no text")
        raise _unreadable_error(folder, err)
    table = found.with_format("arrow", columns=[images, *([labels] if labels else [])])[:]
    numbers = _label_numbers(folder, table[labels], labels) if labels else None
    classes = ()
    if numbers is None:
        numbers = np.zeros(len(found), np.int32)
    elif class_names is None:
        classes = numbered_classes(str(folder), numbers)
    else:
        if int(numbers.max()) >= len(class_names):
            raise ConfigError(
                f"--input {folder}: column {labels} has a class above {len(class_names) - 1} and "
                f"names {len(class_names)} classes; correct it and save the data set again."
            )
        counts = np.bincount(numbers, minlength=len(class_names)).tolist()
        classes = tuple(map(ImageClass, range(len(class_names)), class_names, counts))
    return HuggingFaceSource(str(folder), table[images], numbers, classes)


def _has_files(folder: Path) -> bool:
    """Tell whether a split has Arrow files, after checking that they are in its folder.

    Raises:
        ValueError: one is not, so the package would map a file from elsewhere.
        Others of _UNREADABLE: state.json is none of a data set.
    """
    state = json.loads((folder / _STATE_NAME).read_bytes())
    names = [entry["filename"] for entry in state["_data_files"]]
    for name in names:
        if not _is_plain(name) or not (folder / name).is_file():
            raise ValueError(f"{_STATE_NAME} names {name!r}, which is no file in the folder")
        refuse_lfs_pointer("--input", folder / name)
    return bool(names)


def _splits_error(folder: Path) -> ConfigError:
    try:
        splits = json.loads((folder / _SPLITS_NAME).read_bytes())["splits"]
        if not isinstance(splits, list) or not splits or not all(map(_is_plain, splits)):
            raise ValueError(f"{_SPLITS_NAME} has no list of splits")
    except _UNREADABLE as err:
        return _unreadable_error(folder, err)
    return ConfigError(
        f"--input {folder}: holds the splits {', '.join(splits)}; give one of them, such as "
        f"--input {folder / splits[0]}."
    )


def _is_plain(name: object) -> bool:
    is_text = isinstance(name, str) and name.isprintable()
    return is_text and name not in ("", "..") and Path(name).name == name


def _unreadable_error(folder: Path, err: Exception) -> ConfigError:
    return ConfigError(
        f"--input {folder}: cannot be read as a data set of Hugging Face datasets "
        f"({_first_line(err)}); copy or save it again."
    )


def _only_column(folder: Path, found: "datasets.Dataset", kind: type) -> str | None:
    columns = [name for name, feature in found.features.items() if isinstance(feature, kind)]
    if len(columns) > 1:
        raise ConfigError(
            f"--input {folder}: has {len(columns)} columns of type {kind.__name__} "
            f"({', '.join(columns)}); save it again without all but one (remove_columns)."
        )
    return columns[0] if columns else None


def _label_numbers(folder: Path, column: "pa.ChunkedArray", name: str) -> np.ndarray | None:
    """Return int32 (N,); None where no row has a label, as in many test sets (-1 or null)."""
    import pyarrow as pa

    if not pa.types.is_integer(column.type):
        raise ConfigError(
            f"--input {folder}: column {name} holds {column.type} and no class numbers; cast it to "
            "datasets.ClassLabel and save the data set again."
        )
    try:
        values = column.cast("int64").fill_null(-1).to_numpy()
    except pa.ArrowInvalid as err:  # unsigned and beyond it
        raise too_large_label(str(folder)) from err
    is_labelled = values >= 0
    if not is_labelled.any():
        return None
    if not is_labelled.all():
        missing = len(values) - int(is_labelled.sum())
        raise ConfigError(
            f"--input {folder}: {missing} of {len(values)} images (row {int(is_labelled.argmin())},"
            f" ...) have no class in column {name}; give every image one, or none."
        )
    return np.minimum(values, MAX_CLASSES).astype(np.int32)


def _first_line(err: Exception) -> str:
    return str(err).strip().partition("\n")[0] or type(err).__name__
