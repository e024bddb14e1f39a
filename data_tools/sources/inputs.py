"""Open what --input names as a source of images, and read --class-names."""

import os
from pathlib import Path

from data_tools.errors import ConfigError, os_errors_as
from data_tools.files import parse_json
from data_tools.sources.huggingface import is_saved_dataset, open_saved_dataset
from data_tools.sources.image_folders import scan_folder
from data_tools.sources.image_list import read_list
from data_tools.sources.image_tars import open_tars
from data_tools.sources.left_out import Tally
from data_tools.sources.reading import Reading
from data_tools.sources.sample_names import HIDDEN_KIND, TAR_NAME, is_hidden, suffix_kind
from data_tools.sources.source import ImageClass, ImageSource
from data_tools.user_files.file_kinds import refuse_lfs_pointer
from data_tools.user_files.place_names import is_address, places_of
from data_tools.user_files.user_text import read_text

_LIST_SUFFIXES = (".txt", ".tsv")
_TABLE_SUFFIXES = (".csv", ".json", ".jsonl", ".xls", ".xlsx")


def open_source(
    *words: str, cache: Path | None = None, reading: Reading | None = None
) -> ImageSource:
    """Open the input: a folder of images or tars, a list, tars with braces, a saved data set.

    Args:
        words: as typed; braces and wildcards are expanded, several names are those of tars.
        cache: folder that keeps the indexes of tars; None = scan and keep nothing.
    """
    text, reading = " ".join(words), reading or Reading()
    if address := next((word for word in words if is_address(word)), ""):
        raise ConfigError(
            f"--input {address}: is an address; images are read from folders of this machine, so "
            "copy them here first."
        )
    places = [place for word in words for place in places_of(word, "--input")]
    path, suffix = Path(places[0]), Path(places[0]).suffix.lower()
    is_saved, tars, beside = False, [], Tally()
    with os_errors_as(f"--input {text}: cannot be read", "give a path that can be"):
        is_folder = path.is_dir()
        if len(places) > 1 or (suffix == ".tar" and not is_folder):
            tars = _tars(places, text)
        elif not is_folder:
            _refuse_packed(places[0])
        elif not (is_saved := is_saved_dataset(path)):
            tars, beside = _tars_in(path)
    if is_saved:
        return open_saved_dataset(path, reading)
    if tars:
        for tar in tars:
            refuse_lfs_pointer("--input", tar)
        return open_tars(text, tars, cache, reading, beside)
    if is_folder or not path.exists():
        return _scan_images(path, reading)
    if path.is_file() and suffix in _LIST_SUFFIXES:
        reading.refuse_others(text, "a list")
        return read_list(path)
    if path.is_file() and suffix in _TABLE_SUFFIXES:
        raise ConfigError(
            f"--input {text}: a {path.suffix} file is no list of images; write a .tsv file with a "
            "path, a tab and a class in each line, without a line of headings."
        )
    raise ConfigError(
        f"--input {text}: is a file, and neither a list (.txt, .tsv) nor a tar (.tar); give a "
        "folder of images, a list or tars."
    )


def _tars_in(folder: Path) -> tuple[list[Path], Tally]:
    """Return the tars that lie in a folder, and what lies beside them."""
    tars, beside = [], Tally()
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if is_hidden(entry.name):
            beside.add(HIDDEN_KIND, entry.name)
        elif entry.name.lower().endswith(".tar"):
            tars.append(folder / entry.name)
        elif entry.is_dir():
            beside.add("folders beside the tars", entry.name)
        else:
            beside.add(suffix_kind(entry.name), entry.name)
    return tars, beside


def _refuse_packed(text: str) -> None:
    """Refuse an archive of another kind, saying how to unpack it."""
    name = text.lower()
    if TAR_NAME.search(name) and not name.endswith(".tar"):
        raise ConfigError(
            f"--input {text}: is a compressed tar, so that no single image can be read from it; "
            f"unpack it once, tar -xf {text} -C FOLDER, and give --input FOLDER."
        )
    if name.endswith((".zip", ".7z", ".rar")):
        raise ConfigError(
            f"--input {text}: is an archive that is not read in place; unpack it once into a "
            "folder and give --input FOLDER."
        )


def _scan_images(folder: Path, reading: Reading) -> ImageSource:
    try:
        return scan_folder(folder, "--input", reading)
    except ConfigError as err:
        if not folder.is_dir():
            raise
        if tables := [*folder.glob("*.parquet"), *folder.glob("data/*.parquet")]:
            refuse_lfs_pointer("--input", min(tables))
            # The hub's format is compressed in blocks: no single image can be read from it.
            raise ConfigError(
                f"--input {folder}: holds Parquet files; write them to disk as Arrow once, with "
                f"datasets.load_dataset({str(folder)!r}, split='train').save_to_disk(FOLDER), and "
                "give --input FOLDER."
            ) from err
        for name in sorted(entry.name for entry in folder.iterdir()):
            if not is_hidden(name):
                _refuse_packed(str(folder / name))
        raise


def _tars(places: list[str], text: str) -> list[Path]:
    other = next((place for place in places if not place.lower().endswith(".tar")), None)
    if other is not None:
        if not os.path.lexists(other):
            raise ConfigError(
                f"--input {text}: {other} does not exist; a path with blanks needs quotes."
            )
        raise ConfigError(
            f"--input {text}: names {len(places)} files and folders, such as {other}, and only "
            "tars can be several; give the one folder that holds them, or a list of images."
        )
    paths = [Path(place) for place in places]
    if missing := [path for path in paths if not path.is_file()]:
        raise ConfigError(
            f"--input {missing[0]}: does not exist ({len(missing)} of {len(paths)} tars); give "
            "tars that are there."
        )
    return paths


def read_class_names(path: Path, classes: tuple[ImageClass, ...]) -> dict[str, tuple[str, str]]:
    """Read what people call the classes.

    Args:
        path: JSON {id: name} or {id: [other id, name]}, as ImageNet's {"0": ["n01440764", "tench"]}
            for classes that the input only numbers; or lines of id, tab, name.
        classes: of the input; each must be named.

    Returns:
        id and name for the manifest, by the input's id.
    """
    try:
        with os_errors_as(f"--class-names {path}: cannot be read", "give a JSON or TSV file"):
            text = read_text(path)
        pairs = parse_json(text) if path.suffix.lower() == ".json" else _from_lines(text)
    except ValueError as err:
        raise ConfigError(
            f"--class-names {path}: is no JSON object and no lines of id, tab, name ({err}); "
            "correct it."
        ) from err
    if not isinstance(pairs, dict):
        raise ConfigError(
            f"--class-names {path}: is JSON and no object; write {{id: name}} or "
            "{id: [id, name]}."
        )
    named: dict[str, tuple[str, str]] = {}
    for key, value in pairs.items():
        entry = value if isinstance(value, list) else [key, value]
        if len(entry) != 2 or not all(isinstance(part, str) and part for part in entry):
            raise ConfigError(
                f"--class-names {path}: {key!r} has {value!r}; write a name, or [id, name]."
            )
        named[key] = (entry[0], entry[1])
    missing = [entry.id for entry in classes if entry.id not in named]
    if missing and named and len(missing) == len(classes):
        raise ConfigError(
            f"--class-names {path}: names {next(iter(named))!r}, ..., while the input calls its "
            f"classes {missing[0]!r}, ...; write the names of the input first in each line or pair."
        )
    if missing:
        raise ConfigError(
            f"--class-names {path}: names {len(classes) - len(missing)} of the {len(classes)} "
            f"classes and not {missing[0]!r}; add the others."
        )
    ids = [named[entry.id][0] for entry in classes]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise ConfigError(f"--class-names {path}: two classes get the id {twice!r}; correct it.")
    return named


def _from_lines(text: str) -> dict[str, str]:
    lines = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if odd := next((i for i, line in lines if "\t" not in line), None):
        raise ValueError(f"line {odd} has no tab")
    parts = (line.partition("\t") for _, line in lines)
    return {key: name.strip() for key, _, name in parts}
