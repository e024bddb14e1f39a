"""Look after the output folder: find finished shards, remove leftovers, write dataset.json.

Each shard 00012.tar has a sidecar 00012.json, written after it; dataset.json is written last.
"""

import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_tools.encoding.claims import Claims
from data_tools.encoding.settings import SETTINGS_NAME, EncodingSettings
from data_tools.errors import ConfigError, count_of
from data_tools.files import MalformedError, parse_json
from data_tools.formats import FORMAT_KEY
from data_tools.shards.manifest import (
    DATASET,
    MANIFEST_NAME,
    ClassEntry,
    DatasetManifest,
    Manifest,
    Members,
    SourceList,
)
from data_tools.shards.shard_check import read_shard
from data_tools.shards.sidecar import SIDECAR, Sidecar, label_counts, statistics_of
from data_tools.sources.source import ImageSource

DEMO_LATENTS = Path(__file__).resolve().parents[2] / "datasets" / "demo"  # without --output
CLAIMS_NAME = ".claims"  # folder with the claims of processes at work
INDEXES_NAME = ".sources"  # folder with the indexes of the input's tars
_TOOLS = ("torch", "diffusers", "numpy", "pillow", "webdataset")
_TEMPORARY = re.compile(r"(\d{5,})\.(tar|json)\..*\.tmp")


def shard_name(index: int) -> str:
    """Name a shard's tar file."""
    return f"{index:05d}.tar"


def claim_name(index: int) -> str:
    """Name the claim on a shard."""
    return f"{index:05d}"


def finished_sidecar(output: Path, index: int) -> Sidecar | None:
    """Return the sidecar of a shard that is complete in the output folder.

    Raises:
        NewerFormatError: a later version wrote it.
    """
    tar = output / shard_name(index)
    path = tar.with_suffix(".json")
    try:
        sidecar: Sidecar = SIDECAR.loads(path.read_bytes(), str(path))
        is_complete = tar.stat().st_size == sidecar.shard.bytes
    except (FileNotFoundError, ValueError, MalformedError):
        return None
    return sidecar if is_complete else None


@contextmanager
def nothing_left_by_a_refusal(folder: Path) -> Iterator[None]:
    """Remove what a refused command has made where encoding has not begun: folders, indexes."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except ConfigError:
        if not (folder / SETTINGS_NAME).exists():
            shutil.rmtree(folder / INDEXES_NAME, ignore_errors=True)
            for path in made:
                with suppress(OSError):  # others write there
                    path.rmdir()
        raise


class EncodingOutput:
    """What is done and what is missing of a data set that several processes may be encoding."""

    def __init__(self, folder: Path, settings: EncodingSettings) -> None:
        self.folder, self.settings = folder, settings
        self.missing = dict.fromkeys(range(settings.num_shards))  # in order, quickly removed from
        self.refresh()

    def refresh(self) -> None:
        """Look which shards other processes finished."""
        names = set(os.listdir(self.folder))
        for index in list(self.missing):
            if shard_name(index).replace(".tar", ".json") in names:
                self.is_finished(index)

    def is_finished(self, index: int) -> bool:
        """Look whether a shard is finished."""
        if index in self.missing and finished_sidecar(self.folder, index) is not None:
            del self.missing[index]
        return index not in self.missing

    def restore_sidecars(self) -> None:
        """Write lost sidecars again, of shards that are as dataset.json says.

        Encoding such a shard again might give other bytes on another machine, and no run could
        resume on the data any more.
        """
        manifest = self._stated() if self.missing else None
        names = {shard_name(index): index for index in self.missing}
        for shard in manifest.shards if manifest else ():
            if shard.name not in names:
                continue
            content = read_shard(self.folder, shard, manifest)
            if not content.problems:
                SIDECAR.write(self.folder / shard.sidecar, Sidecar(shard, content.totals))
                self.is_finished(names[shard.name])

    def stated_sha256(self) -> dict[str, str]:
        """Return what dataset.json says of the shards, by name; {} before it is written."""
        manifest = self._stated()
        return {shard.name: shard.sha256 for shard in manifest.shards} if manifest else {}

    def _stated(self) -> DatasetManifest | None:
        try:
            return DatasetManifest.load(self.folder, check_shards=False)
        except ConfigError:  # none yet, or damaged: it is written at the end
            return None

    @property
    def num_images_done(self) -> int:
        """Image files in the shards that are finished."""
        left = sum(self.settings.files_in(index) for index in self.missing)
        return self.settings.num_files - left

    def remove_leftovers(self, claims: Claims) -> None:
        """Remove temporary files of processes that were killed."""
        for name in os.listdir(self.folder):
            path = self.folder / name
            if match := _TEMPORARY.fullmatch(name):
                is_left = not claims.is_live(claim_name(int(match[1])))
            elif name.endswith(".tmp"):  # of the small files, written within a moment
                is_left = path.exists() and claims.age_sec(path) > claims.lease_sec
            else:
                continue
            if is_left:
                path.unlink(missing_ok=True)

    def write_manifest(
        self, source: ImageSource, class_names: dict[str, tuple[str, str]]
    ) -> Manifest:
        """Write dataset.json from all sidecars, unless it says the same already, and return it.

        Args:
            class_names: id and name to write, by the source's id; others get theirs from the id.
        """
        sidecars = [finished_sidecar(self.folder, i) for i in range(self.settings.num_shards)]
        if num_lost := sidecars.count(None):
            raise ConfigError(
                f"--output {self.folder}: {count_of(num_lost, 'finished shard', 'were')} removed "
                "or changed meanwhile; run the same command again."
            )
        manifest = _manifest(self.settings, source, class_names, sidecars)
        path = self.folder / MANIFEST_NAME
        if not _says_the_same(path, manifest):
            DATASET.write(path, manifest)
        return manifest


def _says_the_same(path: Path, manifest: Manifest) -> bool:
    """Compare but for the versions of tools, which are those that did the work.

    What lies beside the images may change later, too, and the number of the format with it.
    """
    DATASET.refuse_newer(path)
    try:
        found = parse_json(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    wanted = json.loads(DATASET.dumps(manifest))
    is_whole = isinstance(found, dict) and "versions" in found
    then = {"versions": {}, "left_out": [], FORMAT_KEY: 0}
    return is_whole and found | then == wanted | then


def _manifest(
    settings: EncodingSettings,
    source: ImageSource,
    class_names: dict[str, tuple[str, str]],
    sidecars: list[Sidecar],
) -> Manifest:
    totals = [sidecar.totals for sidecar in sidecars]
    counts = label_counts(totals)
    shards = [sidecar.shard for sidecar in sidecars]
    num_samples = sum(shard.num_samples for shard in shards)
    num_skipped = sum(len(shard.skipped) for shard in shards)
    if not num_samples:
        raise ConfigError(
            f"--input {source.text}: none of its {num_skipped} files could be decoded; give images."
        )
    _, height, width = settings.latent.shape
    named = [class_names.get(c.id, (c.id, c.id.replace("_", " "))) for c in source.classes]
    return Manifest(
        num_samples=num_samples,
        shards=shards,
        latent=settings.latent,
        members=Members("moments.npy", "flip.npy" if settings.latent.flip else "", "cls"),
        vae=settings.vae,
        statistics=statistics_of(totals, num_samples, height * width),
        image=settings.image,
        source=SourceList(settings.num_files, num_skipped, settings.source),
        order_seed=settings.seed,
        classes=[
            ClassEntry(entry.index, *names, counts[entry.index])
            for entry, names in zip(source.classes, named, strict=True)
        ],
        versions={name: importlib.metadata.version(name) for name in _TOOLS},
        left_out=source.left_out,
    )
