"""Images in a data set that Hugging Face `datasets` wrote to disk (`save_to_disk`).

The package maps the Arrow files into memory: an image is read where it lies, nothing is copied.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_tools.errors import ConfigError
from data_tools.images import BadImageError
from data_tools.sources import (
    MAX_CLASSES,
    MAX_IMAGE_BYTES,
    ImageClass,
    ImageSource,
    Names,
    numbered_classes,
)

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

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


def _paths(images: "pa.ChunkedArray") -> Iterator[bytes]:
    for chunk in images.chunks:
        for path in chunk.field("path").to_pylist():
            yield (path or "").encode()


def is_saved_dataset(folder: Path) -> bool:
    """Tell a folder that `save_to_disk` wrote, of one split or of several, from others."""
    split = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return split or (folder / "dataset_dict.json").is_file()


def open_saved_dataset(folder: Path) -> HuggingFaceSource:
    """Open one split.

    Its classes are those of its only ClassLabel column, in the order in which that has them; else
    the numbers in a column called label, labels or cls; without either there are none.
    """
    try:
        # By name: without the package, a folder datasets/ of ours would be an empty module.
        from datasets import ClassLabel, DatasetDict, Image, load_from_disk
    except ImportError as err:
        raise ConfigError(
            f"--input {folder}: is a data set of Hugging Face datasets, which is not installed; "
            "pip install datasets."
        ) from err
    try:
        found = load_from_disk(str(folder))
    except IndexError as err:  # it cannot join no tables
        raise ConfigError(f"--input {folder}: has no rows; give a data set with images.") from err
    except (OSError, ValueError, KeyError) as err:  # also what pyarrow raises
        raise ConfigError(
            f"--input {folder}: cannot be read as a data set of Hugging Face datasets "
            f"({_first_line(err)}); copy or save it again."
        ) from err
    if isinstance(found, DatasetDict):
        raise ConfigError(
            f"--input {folder}: holds the splits {', '.join(found)}; give one of them, such as "
            f"--input {folder / next(iter(found), 'train')}."
        )
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
    table = found.with_format("arrow", columns=[images, *([labels] if labels else [])])[:]
    numbers = _label_numbers(folder, table[labels], labels) if labels else None
    classes = ()
    if numbers is None:
        numbers = np.zeros(len(found), np.int32)
    elif class_names is None:
        classes = numbered_classes(str(folder), numbers)
    else:
        if (highest := int(numbers.max())) >= len(class_names):
            raise ConfigError(
                f"--input {folder}: column {labels} has the class {highest} and names "
                f"{len(class_names)} classes; correct it and save the data set again."
            )
        counts = np.bincount(numbers, minlength=len(class_names)).tolist()
        classes = tuple(map(ImageClass, range(len(class_names)), class_names, counts))
    return HuggingFaceSource(str(folder), table[images], numbers, classes)


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
    values = column.fill_null(-1).to_numpy()
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
