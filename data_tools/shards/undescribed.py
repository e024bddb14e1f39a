"""Explain a place that was named as a data set and has no dataset.json: what it is, what to do."""

import os
import re
import shlex
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from data_tools.errors import some
from data_tools.sources.images import IMAGE_SUFFIXES
from data_tools.sources.sample_names import is_hidden
from data_tools.sources.tar_members import BadTarError, walk
from data_tools.user_files.file_kinds import HEAD_BYTES, content_kind
from data_tools.user_files.paths import absence, broken_link

MANIFEST_NAME = "dataset.json"
SETTINGS_NAME = "encoding.json"  # beside it, of a set that encode_latents.py made
_MAX_LOOKED_AT = 2000  # files and folders; a set of images may have millions
_MAX_MEMBERS = 20  # of a tar
_SHOWN = 3  # names in a message
_LIST_SUFFIXES = (".txt", ".tsv", ".csv")
_ADDRESS = re.compile(r"[a-z][a-z0-9]+:")  # of a server, or a command
_ENCODE = "python data_tools/encode_latents.py"


def explain(place: Path) -> str:
    """Say what a place without a dataset.json is and what to do, in one clause each."""
    try:
        if broken_link(place):
            return f"{absence(place)}; restore what it stood for, or name another"
        if not place.exists():
            if _ADDRESS.match(str(place)):
                return "is an address; this reads folders of this machine, so copy the data set"
            return f"{absence(place)}; make it: {_ENCODE} --output {_typed(place)}"
        return _explain_file(place) if place.is_file() else _explain_folder(place)
    except OSError as err:
        return f"cannot be looked into ({err.strerror}); make it readable"


def _explain_file(path: Path) -> str:
    if path.name == MANIFEST_NAME:
        return f"is the description itself; name its folder, {path.parent}"
    if path.suffix == ".tar":
        return _explain_tars([path], path)
    if path.suffix.lower() in _LIST_SUFFIXES:
        return f"is a file and no data set; if it lists images, {_encode_advice(path)}"
    return "is not a folder; name one with a dataset.json"


def _explain_folder(folder: Path) -> str:
    if said := run_folder(folder):
        return said
    if (folder / SETTINGS_NAME).exists():
        return (
            f"no {MANIFEST_NAME}, encoding did not finish; run {_ENCODE} --output "
            f"{_typed(folder)} with the same flags again (it resumes)"
        )
    names = sorted(islice(os.listdir(folder), _MAX_LOOKED_AT))
    within = [name for name in names if (folder / name / MANIFEST_NAME).is_file()]
    if within:
        several = "" if len(within) == 1 else f", all of them as {_typed(folder)}/*"
        there = f"{folder / within[0]}{several}"
        return f"no {MANIFEST_NAME} in it but in {some(within, _SHOWN)}; name {there}"
    if tars := [folder / name for name in names if name.endswith(".tar")]:
        return _explain_tars(tars, folder)
    if {"dataset_dict.json", "state.json"} & set(names) or _first(folder, (".parquet", ".arrow")):
        return f"holds a table of images, not latents; {_encode_advice(folder)}"
    if image := _first(folder, IMAGE_SUFFIXES):
        return f"holds images ({image}, ...), not latents; {_encode_advice(folder)}"
    if array := _first(folder, (".npy", ".npz", ".pt", ".safetensors")):
        return (
            f"holds {array} and no {MANIFEST_NAME}; put latents as .npy files into tars and index "
            "these (python data_tools/index_shards.py --help)"
        )
    if not names:
        return f"is empty; {_encode_advice(None, folder)}"
    return f"holds no {MANIFEST_NAME}, only {some(names, _SHOWN)}; name a folder that was encoded"


def run_folder(folder: Path) -> str:
    """Say what a run's folder is, which has a copy of dataset.json and no shards; "": no run's."""
    config = folder / "config.yaml"
    is_run = any((folder / name).exists() for name in ("checkpoints", "starts.jsonl"))
    if not (is_run and config.is_file()) or any(folder.glob("*.tar")):
        return ""
    return f"is the folder of a run, no data set; name the data that the run reads, see {config}"


def held_data(folder: Path) -> str:
    """Say what data a folder holds, images or a data set; "" if neither is at its top."""
    if not folder.is_dir():
        return ""
    if (folder / MANIFEST_NAME).exists() and any(folder.glob("*.tar")):
        return "a data set"
    image = _first(folder, IMAGE_SUFFIXES, within=1)
    return image and f"images ({image}, ...)"


def _explain_tars(tars: list[Path], place: Path) -> str:
    try:
        with tars[0].open("rb") as file:
            kind = content_kind(file.read(HEAD_BYTES))
            members = [member.name for member in islice(walk(file), _MAX_MEMBERS)]
    except BadTarError as err:
        if kind is None:
            return f"no {MANIFEST_NAME}, and {tars[0].name} {err}"
        return (
            f"no {MANIFEST_NAME}, and {tars[0].name} is no tar but {kind}; name a folder that was "
            "encoded"
        )
    suffixes = sorted({Path(name).suffix.lower() for name in members} - {""})
    if image := next((name for name in members if Path(name).suffix.lower() in IMAGE_SUFFIXES), ""):
        return f"holds tars of images ({image}, ...), not latents; {_encode_advice(place)}"
    if any(name.endswith(".moments.npy") for name in members):
        return (
            f"has shards ({tars[0].name}) but no {MANIFEST_NAME}; copy it from where the shards "
            "came from"
        )
    if ".npy" in suffixes:
        return (
            f"holds tars of latents that are not indexed ({some(members, _SHOWN)}); index them: "
            f"python data_tools/index_shards.py --input {_typed(place)} --array ... --vae ..."
        )
    kinds = some(suffixes, _SHOWN) or "nothing"
    return f"holds tars of {kinds}, neither latents nor images; name another"


def _encode_advice(images: Path | None, output: Path | None = None) -> str:
    """Say how to encode; never into the folder of the images."""
    if output is None:
        output = images.with_name(f"{images.resolve().name.partition('.')[0]}-latents")
    shown = "IMAGES" if images is None else _typed(images)
    return f"encode first: {_ENCODE} --input {shown} --output {_typed(output)}"


def _typed(path: Path) -> str:
    return shlex.quote(str(path))


def _first(
    folder: Path, suffixes: frozenset[str] | tuple[str, ...], within: int = _MAX_LOOKED_AT
) -> str:
    """Return the first file with one of the suffixes, of those that are looked at; or "".

    Args:
        suffixes: in small letters.
        within: levels of folders below it.
    """
    files = islice(_files(folder), _MAX_LOOKED_AT)
    near = (name for name in files if name.count("/") <= within)
    return next((name for name in near if Path(name).suffix.lower() in suffixes), "")


def _files(folder: Path) -> Iterator[str]:
    """Go through a tree's files without hidden ones; folders of classes are often links."""
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not is_hidden(name))[:_MAX_LOOKED_AT]
        if Path(place) != folder and len(Path(place).relative_to(folder).parts) > 3:
            folders.clear()  # a loop of links, or a tree of another kind
        for name in sorted(files):
            if not is_hidden(name):
                yield os.path.relpath(os.path.join(place, name), folder)
