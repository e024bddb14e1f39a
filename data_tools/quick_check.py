"""A look at every shard that reads no more than a few blocks of it: seconds for 50,000 shards."""

import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data_tools.findings import Finding, Verification, expects_sidecars, read_sidecar
from data_tools.manifest import MANIFEST_NAME, DatasetManifest, Shard
from data_tools.records import KEY_DIGITS, TAR_BLOCK, DamagedRecordError
from data_tools.tar_walk import index_name


def run_quick(
    result: Verification,
    manifest: DatasetManifest,
    pool: ThreadPoolExecutor,
    on_bytes: Callable[[int], object],
) -> None:
    """Look at sizes, at both ends of every shard and at the sidecars."""
    with_sidecars = expects_sidecars(result, manifest)
    first_keys = {shard.first_key: shard.name for shard in manifest.shards if shard.num_samples}

    def look(shard: Shard) -> list[Finding]:
        what = _quick_problem(result.folder, shard, manifest, first_keys)
        found = [Finding("shard", shard.name, what)] if what else []
        if with_sidecars:
            sidecar, why = read_sidecar(result.folder, shard)
            if sidecar is None:
                found.append(Finding("sidecar", shard.name.replace(".tar", ".json"), why))
        on_bytes(shard.bytes)
        return found

    for found in pool.map(look, manifest.shards):
        result.findings += found
    num_bad, num_shards = len(result.damaged("shard", "index")), len(manifest.shards)
    good = f"{num_shards - num_bad} of {num_shards} shards"
    result.checked.append(("presence, size, first and last sample", good))
    if with_sidecars:
        num_bad = len(result.damaged("sidecar"))
        result.checked.append(("sidecars", f"{num_shards - num_bad} of {num_shards}"))
    counted = sum(entry.count for entry in manifest.classes)
    if manifest.classes and counted != manifest.num_samples:
        what = f"its classes count {counted} samples, its shards {manifest.num_samples}"
        result.findings.append(Finding("manifest", MANIFEST_NAME, what))
    result.skipped.append(("checksums, values, labels, statistics", "leave --quick out"))


def _quick_problem(
    folder: Path, shard: Shard, manifest: DatasetManifest, first_keys: dict[str, str]
) -> str:
    try:
        with (folder / shard.name).open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return "is no file"
            if status.st_size != shard.bytes:
                verb = "is cut off: has" if status.st_size < shard.bytes else "has"
                return f"{verb} {status.st_size} bytes, dataset.json says {shard.bytes}"
            if not shard.stride:
                index = folder / index_name(shard.name)
                return "" if index.exists() else f"its index {index.name} is missing"
            if not shard.num_samples:
                return ""
            return _ends_problem(file.fileno(), shard, manifest, first_keys)
    except FileNotFoundError:
        return "is missing"
    except OSError as err:
        return f"cannot be read ({err.strerror})"


def _ends_problem(
    descriptor: int, shard: Shard, manifest: DatasetManifest, first_keys: dict[str, str]
) -> str:
    layout = manifest.layout
    label = np.empty((1, layout.label_bytes), np.uint8)
    header = np.empty((1, layout.header_bytes), np.uint8)
    array = np.empty(layout.array_bytes, np.uint8)
    key = shard.first_key.encode()
    for row in sorted({0, shard.num_samples - 1}):
        for use_flip in (False, True) if layout.has_flip else (False,):
            try:
                layout.read(descriptor, row, label[0], header[0], array, use_flip)
                layout.check(label, header, np.array([use_flip]))
            except DamagedRecordError as err:
                return f"{err} (sample {row})"
        found = label[0, :KEY_DIGITS].tobytes()
        if row == 0 and found != key:
            other = first_keys.get(found.decode())
            belongs = f", as {other} should" if other else ""
            return f"begins with sample {found.decode()}{belongs}; dataset.json says {key.decode()}"
    end = os.pread(descriptor, TAR_BLOCK, shard.num_samples * shard.stride)
    return "goes on after its last sample" if any(end) else ""
