"""Check a few blocks of every shard: sizes, first and last sample; seconds for 50,000 shards."""

import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data_tools.errors import count_of
from data_tools.shards.foreign_tar import index_name
from data_tools.shards.manifest import MANIFEST_NAME, DatasetManifest, Shard
from data_tools.shards.records import KEY_DIGITS, TAR_BLOCK, DamagedRecordError, RecordLayout
from data_tools.user_files.file_kinds import HEAD_BYTES, LFS_REASON, is_lfs_pointer
from data_tools.verification.findings import Finding, Verification, expects_sidecars, read_sidecar

_AT_ONCE = 64  # shards per task of a thread


def run_quick(
    result: Verification,
    manifest: DatasetManifest,
    pool: ThreadPoolExecutor,
    on_bytes: Callable[[int], object],
) -> None:
    """Look at sizes, at both ends of every shard and at the sidecars."""
    with_sidecars = expects_sidecars(result, manifest)
    # Tars of others have no common layout; then no shard below asks for it.
    layout = manifest.latent.record_layout if manifest.has_own_layout else None
    first_keys = {shard.first_key: shard.name for shard in manifest.shards if shard.num_samples}

    def look(shard: Shard) -> list[Finding]:
        what = _quick_problem(result.folder, shard, layout, first_keys)
        found = [Finding("shard", shard.name, what)] if what else []
        if with_sidecars:
            _, why = read_sidecar(result.folder, shard, False)
            if why:
                found.append(Finding("sidecar", shard.name.replace(".tar", ".json"), why))
        on_bytes(shard.bytes)
        return found

    shards = manifest.shards
    pieces = [shards[start : start + _AT_ONCE] for start in range(0, len(shards), _AT_ONCE)]
    for found in pool.map(lambda piece: [f for shard in piece for f in look(shard)], pieces):
        result.findings += found
    num_bad, num_shards = len(result.damaged("shard", "index")), len(manifest.shards)
    good = f"{num_shards - num_bad} of {count_of(num_shards, 'shard')}"
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
    folder: Path, shard: Shard, layout: RecordLayout | None, first_keys: dict[str, str]
) -> str:
    try:
        with (folder / shard.name).open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return "is no file"
            if status.st_size != shard.bytes:
                if is_lfs_pointer(file.read(HEAD_BYTES)):
                    return LFS_REASON
                verb = "is cut off: has" if status.st_size < shard.bytes else "has"
                return f"{verb} {status.st_size} bytes, dataset.json says {shard.bytes}"
            if layout is None:
                index = folder / index_name(shard.name)
                return "" if index.exists() else f"its index {index.name} is missing"
            if not shard.num_samples:
                return ""
            return _ends_problem(file.fileno(), shard, layout, first_keys)
    except FileNotFoundError:
        return "is missing"
    except OSError as err:
        return f"cannot be read ({err.strerror})"


def _ends_problem(
    descriptor: int, shard: Shard, layout: RecordLayout, first_keys: dict[str, str]
) -> str:
    """Look at the headers of the first and the last sample, and behind it."""
    flips = (False, True) if layout.has_flip else (False,)
    parts = [(row, use_flip) for row in (0, shard.num_samples - 1) for use_flip in flips]
    heads = np.empty((len(parts), layout.head_bytes), np.uint8)
    for i, (row, use_flip) in enumerate(parts):
        start = row * layout.stride
        offset = start + (layout.flip_offset if use_flip else layout.moments_offset)
        os.preadv(descriptor, [heads[i, : layout.label_bytes]], start)
        os.preadv(descriptor, [heads[i, layout.label_bytes :]], offset)
    try:
        layout.check(heads, np.array([use_flip for _, use_flip in parts]))
    except DamagedRecordError as err:
        return f"{err}, at its beginning or end"
    found = heads[0, :KEY_DIGITS].tobytes().decode()
    if found != shard.first_key:
        other = first_keys.get(found)
        belongs = f", as {other} should" if other else ""
        return f"begins with sample {found}{belongs}; dataset.json says {shard.first_key}"
    end = os.pread(descriptor, TAR_BLOCK, shard.num_samples * shard.stride)
    return "goes on after its last sample" if any(end) else ""
