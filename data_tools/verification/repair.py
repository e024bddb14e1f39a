"""Repair a damaged data set: make shards from the images, and small files from the shards.

A shard is encoded into a scratch folder first and takes its place only if it has the bytes that
dataset.json asks for; so a repair on another machine, or from changed images, harms nothing.
"""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from data_tools.encoding.command import reopen
from data_tools.encoding.encoder import ShardEncoder
from data_tools.encoding.output import EncodingOutput, finished_sidecar, shard_name
from data_tools.encoding.settings import disk_errors_as_config_errors
from data_tools.errors import ConfigError, count_of
from data_tools.shards.manifest import DATASET, MANIFEST_NAME, DatasetManifest, Shard
from data_tools.shards.sidecar import SIDECAR, Sidecar
from data_tools.verification.findings import Verification
from data_tools.verification.full_check import class_counts, computed_statistics

_SCRATCH = "repair-"  # begins the scratch folder's name, inside the data set's folder


def repair_shards(
    result: Verification,
    say: Callable[[str], object],
    inputs: Sequence[str] | None,
    vae: str | None,
    device: str | None,
    accepts_new_bytes: bool,
) -> list[str]:
    """Encode what is damaged again, and dataset.json from the sidecars if it is missing.

    Args:
        result: of a full check.
        inputs: --input as given; None: only small files can be repaired.
        vae: where the VAE is, if not where encoding.json says.
        accepts_new_bytes: put a shard in place although its bytes are not the former ones.

    Returns:
        what was done, one clause per file.
    """
    folder, manifest = result.folder, result.manifest
    broken = result.damaged("shard")
    if manifest is not None and not broken:
        return []
    if manifest is not None and not manifest.has_own_layout:
        raise ConfigError(
            f"--repair: {', '.join(broken[:3])} of {folder} were written by others and cannot be "
            "encoded again; fetch them again from where they came."
        )
    if inputs is None:
        what = count_of(len(broken), "shard") if manifest is not None else MANIFEST_NAME
        raise ConfigError(
            f"--repair: {what} of {folder} can only be made again from the images; name them with "
            "--input, or copy the files again from another copy of the data set."
        )
    encoder = reopen(folder, inputs, vae, device)
    with disk_errors_as_config_errors(folder):
        if manifest is None:
            return _make_manifest(folder, encoder, say)
        return _encode_again(folder, manifest, broken, encoder, say, accepts_new_bytes)


def _make_manifest(folder: Path, encoder: ShardEncoder, say: Callable[[str], object]) -> list[str]:
    settings, done = encoder.settings, []
    for index in range(settings.num_shards):
        if finished_sidecar(folder, index) is None:
            say(f"encoding {shard_name(index)}")
            encoder.encode(index)
            done.append(f"{shard_name(index)}: encoded, it had no sidecar")
    EncodingOutput(folder, settings).write_manifest(encoder.source, class_names={})
    return [*done, f"{MANIFEST_NAME}: written from the {settings.num_shards} sidecars"]


def _encode_again(
    folder: Path,
    manifest: DatasetManifest,
    broken: list[str],
    encoder: ShardEncoder,
    say: Callable[[str], object],
    accepts_new_bytes: bool,
) -> list[str]:
    place = {shard_name(index): index for index in range(encoder.settings.num_shards)}
    if strange := [name for name in broken if name not in place]:
        raise ConfigError(
            f"--repair: {strange[0]} is none of the {len(place)} shards that encoding.json of "
            f"{folder} describes; the two files belong to different data sets, copy both again."
        )
    stated = {shard.name: shard for shard in manifest.shards}
    done, changed = [], []
    scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=folder))
    try:
        encoder.output = scratch
        for number, name in enumerate(broken):
            say(f"encoding {name} ({number + 1} of {len(broken)})")
            sidecar = encoder.encode(place[name])
            if sidecar.shard != stated[name]:
                if not accepts_new_bytes:
                    raise _other_bytes_error(sidecar.shard, stated[name], manifest)
                changed.append(sidecar.shard)
            for new in (name, sidecar.shard.sidecar):
                (scratch / new).replace(folder / new)
            same = "to other bytes" if sidecar.shard in changed else "the same bytes as before"
            done.append(f"{name}: encoded again, {same}")
    finally:
        shutil.rmtree(scratch)
        if changed:
            shards = list((stated | {shard.name: shard for shard in changed}).values())
            total = sum(shard.num_samples for shard in shards)
            _write_manifest(folder, manifest, shards=shards, num_samples=total)
    if changed:
        done.append(f"{MANIFEST_NAME}: describes the new shards; runs cannot resume on this data")
    return done


def _other_bytes_error(new: Shard, old: Shard, manifest: DatasetManifest) -> ConfigError:
    made_by = ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items()))
    return ConfigError(
        f"--repair: {new.name} encodes to other bytes here (sha256 {new.sha256[:12]}, not "
        f"{old.sha256[:12]}), because the images, the device, its number of threads or the "
        f"versions ({made_by}) are not those of the first time; repair where it was encoded, or "
        "pass --accept-new-bytes, and no run on this data can resume."
    )


def _write_manifest(folder: Path, manifest: DatasetManifest, **changes: object) -> None:
    DATASET.write(folder / MANIFEST_NAME, replace(manifest.described(), **changes))


def repair_small_files(result: Verification) -> list[str]:
    """Write damaged sidecars, and wrong counts and statistics in dataset.json, from the shards.

    Args:
        result: of a full check that found every shard sound.

    Returns:
        what was done, one clause per file.
    """
    manifest, done = result.manifest, []
    assert manifest is not None and not result.damaged("shard")
    with disk_errors_as_config_errors(result.folder):
        names = set(result.damaged("sidecar"))
        for shard in manifest.shards:
            if shard.sidecar in names:
                content = Sidecar(shard, result.contents[shard.name].totals)
                SIDECAR.write(result.folder / shard.sidecar, content)
                done.append(f"{shard.sidecar}: written from {shard.name}")
        if result.damaged("manifest"):
            counts = class_counts(result)
            classes = [replace(entry, count=counts[entry.index]) for entry in manifest.classes]
            statistics = computed_statistics(result)
            _write_manifest(result.folder, manifest, classes=classes, statistics=statistics)
            done.append(f"{MANIFEST_NAME}: counts and statistics written from the shards")
    return done
