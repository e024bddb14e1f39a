"""Images in a data set that Hugging Face `datasets` wrote to disk (`save_to_disk`).

The package maps the Arrow files into memory: an image is read where it lies, nothing is copied.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_tools.errors import ConfigError, first_line
from data_tools.files import parse_json
from data_tools.sources.images import BadImageError
from data_tools.sources.reading import Reading
from data_tools.sources.source import (
    MAX_CLASSES,
    MAX_IMAGE_BYTES,
    Classes,
    ImageClass,
    ImageSource,
    Names,
    classes_of,
    numbered_classes,
    too_large_label,
)
from data_tools.user_files.file_kinds import refuse_lfs_pointer

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

_STATE_NAME, _SPLITS_NAME = "state.json", "dataset_dict.json"
# The package trusts a data set's JSON files. RuntimeError: nested too deep, or more than Arrow can.
_BAD_JSON = (AttributeError, LookupError, OverflowError, TypeError, ValueError)
_UNREADABLE = (OSError, RuntimeError, *_BAD_JSON)
_LOOKED_AT = 100_000  # rows whose values are counted for a hint
_NUMBER_COLUMNS = ("label", "labels", "cls")  # of class numbers, where no column names its classes


class HuggingFaceSource(ImageSource):
    """Images in a column of an Arrow table, of structs {bytes, path}.

    An image is called ROW/PATH. PATH is what its row says beside the bytes, and is never opened.
    """

    def __init__(self, text: str, images: "pa.ChunkedArray", classes: Classes) -> None:
        super().__init__(text, classes)
        self.images = images
        # May be no UTF-8.
        paths = (chunk.field("path").cast("binary").to_pylist() for chunk in images.chunks)
        self.paths = Names(path or b"" for chunk in paths for path in chunk)

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


def is_saved_dataset(folder: Path) -> bool:
    """Tell a folder that `save_to_disk` wrote, of one split or of several, from others.

    Raises:
        OSError: the folder cannot be looked into.
    """
    return _is_split(folder) or (folder / _SPLITS_NAME).is_file()


def _is_split(folder: Path) -> bool:
    return (folder / _STATE_NAME).is_file() and (folder / "dataset_info.json").is_file()


def open_saved_dataset(folder: Path, reading: Reading) -> HuggingFaceSource:
    """Open one split.

    Its classes are those of its only ClassLabel column, in the order in which that has them; else
    the numbers in a column called label, labels or cls; without either there are none. Any other
    column has to be chosen.
    """
    reading.refuse_others(str(folder), "a data set of Hugging Face datasets", "label_column")
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
        raise _unreadable_error(folder, first_line(err)) from err
    if not len(found):
        raise ConfigError(f"--input {folder}: has no rows; give a data set with images.")
    advice = "save it again without all but one (remove_columns)"
    images = _only_column(folder, found, Image, advice)
    if images is None:
        columns = ", ".join(found.column_names)
        raise ConfigError(
            f"--input {folder}: none of its columns ({columns}) is of type Image; cast one with "
            "cast_column(NAME, datasets.Image()) and save the data set again."
        )
    labels = (
        reading.label_column
        or _only_column(folder, found, ClassLabel, "choose one, --label-column {}")
        or next((name for name in _NUMBER_COLUMNS if name in found.features), None)
    )
    others = [name for name in found.column_names if name != images]
    if labels and labels not in others:
        raise ConfigError(
            f"--label-column {labels}: is no column of labels of --input {folder}, which has "
            f"{', '.join(others) or 'none'}; give one of them."
        )
    table = found.with_format("arrow", columns=[images, *([labels] if labels else [])])[:]
    classes = Classes.none(len(found))
    if labels:
        kind = found.features[labels]
        names = kind.names if isinstance(kind, ClassLabel) else None
        classes = _column_classes(folder, table[labels], labels, names, bool(reading.label_column))
    if not classes.classes:
        classes.notes.extend(_unused(found, [name for name in others if name != labels]))
    return HuggingFaceSource(str(folder), table[images], classes)


def _unused(found: "datasets.Dataset", names: list[str]) -> list[str]:
    """Name the columns that may be meant as classes: text or numbers that occur again."""
    import pyarrow as pa
    import pyarrow.compute

    parts = []
    first = found.select(range(min(len(found), _LOOKED_AT)))
    for name in names:
        column = first.with_format("arrow", columns=[name])[:][name]
        if _is_value(column.type) or pa.types.is_integer(column.type):
            count = pa.compute.count_distinct(column).as_py()
            if count < len(column):
                parts.append(f"{name} ({column.type}, {count} values)")
    advice = "add --label-column NAME if one holds classes"
    return [f"columns that are not used: {', '.join(parts)}; {advice}"] if parts else []


def _column_classes(
    folder: Path,
    column: "pa.ChunkedArray",
    name: str,
    class_names: list[str] | None,
    is_chosen: bool,
) -> Classes:
    """Make classes of a column: named numbers, numbers, or where it was chosen other values."""
    if not all(isinstance(text, str) for text in class_names or ()):
        raise _unreadable_error(folder, f"column {name} has class names that are no text")
    if _is_value(column.type):
        if not is_chosen:
            raise ConfigError(
                f"--input {folder}: column {name} holds {column.type} and no class numbers; add "
                f"--label-column {name} to make each of its values a class."
            )
        return _value_classes(folder, column.cast("string"), name)
    numbers = _label_numbers(folder, column, name)
    if numbers is None:
        return Classes.none(len(column))
    if class_names is None:
        return numbered_classes(str(folder), numbers)
    if int(numbers.max()) >= len(class_names):
        raise ConfigError(
            f"--input {folder}: column {name} has a class above {len(class_names) - 1} and "
            f"names {len(class_names)} classes; correct it and save the data set again."
        )
    counts = np.bincount(numbers, minlength=len(class_names)).tolist()
    return Classes(numbers, tuple(map(ImageClass, range(len(class_names)), class_names, counts)))


def _is_value(kind: "pa.DataType") -> bool:
    """Tell columns of which each value can be a class."""
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_boolean(kind)


def _value_classes(folder: Path, column: "pa.ChunkedArray", name: str) -> Classes:
    """Make each value a class, in the order of the values."""
    import pyarrow as pa

    encoded = column.combine_chunks().dictionary_encode()
    if encoded.null_count:
        raise _unlabelled_error(folder, name, encoded.is_valid().to_numpy(zero_copy_only=False))
    ids = encoded.dictionary.cast(pa.binary()).to_pylist()
    if len(ids) > MAX_CLASSES or b"" in ids:
        what = "an empty value" if b"" in ids else f"{len(ids):,} values"
        raise ConfigError(
            f"--label-column {name}: has {what}, which can be no classes; choose another column."
        )
    texts = [value.decode("utf-8", "backslashreplace") for value in ids]
    return classes_of(texts, encoded.indices.to_numpy())


def _has_files(folder: Path) -> bool:
    """Tell whether a split has Arrow files, after checking that they are in its folder.

    Raises:
        ValueError: one is not, so the package would map a file from elsewhere.
        Others of _UNREADABLE: state.json is none of a data set.
    """
    state = parse_json((folder / _STATE_NAME).read_bytes())
    names = [entry["filename"] for entry in state["_data_files"]]
    for name in names:
        if not _is_plain(name) or not (folder / name).is_file():
            raise ValueError(f"{_STATE_NAME} names {name!r}, which is no file in the folder")
        refuse_lfs_pointer("--input", folder / name)
    return bool(names)


def _splits_error(folder: Path) -> ConfigError:
    try:
        splits = parse_json((folder / _SPLITS_NAME).read_bytes())["splits"]
        if not isinstance(splits, list) or not splits or not all(map(_is_plain, splits)):
            raise ValueError(f"{_SPLITS_NAME} has no list of splits")
    except _UNREADABLE as err:
        return _unreadable_error(folder, first_line(err))
    return ConfigError(
        f"--input {folder}: holds the splits {', '.join(splits)}; give one of them, such as "
        f"--input {folder / splits[0]}."
    )


def _is_plain(name: object) -> bool:
    is_text = isinstance(name, str) and name.isprintable()
    return is_text and name not in ("", "..") and Path(name).name == name


def _unreadable_error(folder: Path, why: str) -> ConfigError:
    return ConfigError(
        f"--input {folder}: cannot be read as a data set of Hugging Face datasets ({why}); copy "
        "or save it again."
    )


def _only_column(folder: Path, found: "datasets.Dataset", kind: type, advice: str) -> str | None:
    columns = [name for name, feature in found.features.items() if isinstance(feature, kind)]
    if len(columns) > 1:
        raise ConfigError(
            f"--input {folder}: has {len(columns)} columns of type {kind.__name__} "
            f"({', '.join(columns)}); {advice.format(columns[0])}."
        )
    return columns[0] if columns else None


def _label_numbers(folder: Path, column: "pa.ChunkedArray", name: str) -> np.ndarray | None:
    """Return int32 (N,); None where no row has a label, as in many test sets (-1 or null)."""
    import pyarrow as pa

    if pa.types.is_nested(column.type):
        raise ConfigError(
            f"--input {folder}: column {name} holds {column.type}, several values for an image; "
            "write one class for each into a column of its own and save the data set again."
        )
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
        raise _unlabelled_error(folder, name, is_labelled)
    return np.minimum(values, MAX_CLASSES).astype(np.int32)


def _unlabelled_error(folder: Path, name: str, is_labelled: np.ndarray) -> ConfigError:
    missing = len(is_labelled) - int(is_labelled.sum())
    return ConfigError(
        f"--input {folder}: {missing} of {len(is_labelled)} images (row "
        f"{int(is_labelled.argmin())}, ...) have no class in column {name}; give every image one, "
        "or none."
    )
