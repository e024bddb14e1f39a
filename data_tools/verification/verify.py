"""Check a data set against its dataset.json: at a glance, or every byte.

A glance, at a few blocks of every shard, takes seconds for 50,000 shards. Threads share the shards:
hashing, reading and numpy's arithmetic all release the interpreter.
"""

import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data_tools.errors import ConfigError
from data_tools.formats import NewerFormatError
from data_tools.shards.foreign_tar import index_name
from data_tools.shards.manifest import MANIFEST_NAME, DatasetManifest, Shard
from data_tools.shards.records import KEY_DIGITS, TAR_BLOCK, DamagedRecordError, RecordLayout
from data_tools.shards.shard_check import ShardContent
from data_tools.shards.undescribed import SETTINGS_NAME, run_folder
from data_tools.user_files.file_kinds import HEAD_BYTES, LFS_REASON, is_lfs_pointer
from data_tools.verification.findings import Finding, Verification, expects_sidecars, read_sidecar
from data_tools.verification.full_check import run_full

MAX_WORKERS = 16
_AT_ONCE = 64  # shards per task of a thread


def verify(
    folder: Path,
    *,
    is_quick: bool,
    num_workers: int,
    on_bytes: Callable[[int], object] = lambda count: None,
    known: dict[str, ShardContent] | None = None,
) -> Verification:
    """Check a data set.

    Args:
        folder: of dataset.json and the shards.
        is_quick: look at sizes and at the first and last sample's headers only.
        on_bytes: called with the number of bytes just checked, from any thread.
        known: contents from an earlier full check; those that had no problems are taken over
            without being read again, where dataset.json still says the same of them.
    """
    result = Verification(folder, is_quick)
    if run_folder(folder) or not _is_data_set(folder):
        DatasetManifest.load(folder)  # says what it is instead
    try:
        manifest = result.manifest = DatasetManifest.load(folder, check_shards=False)
    except NewerFormatError:  # whatever there is to say, it is not damaged
        raise
    except ConfigError as err:
        what = str(err)
        for place in (folder / MANIFEST_NAME, f"--data {folder}"):
            what = what.removeprefix(f"{place}: ")
        result.add("manifest", MANIFEST_NAME, what.split("; ")[0])
        return result
    result.checked.append((MANIFEST_NAME, "well-formed"))
    _list_folder(result, manifest)
    with ThreadPoolExecutor(num_workers, thread_name_prefix="verify") as pool:
        if is_quick:
            _run_quick(result, manifest, pool, on_bytes)
        else:
            run_full(result, manifest, pool, on_bytes, known or {})
    return result


def _is_data_set(folder: Path) -> bool:
    """Tell a damaged data set from a folder that never was one."""
    return any((folder / name).exists() for name in (MANIFEST_NAME, SETTINGS_NAME)) or any(
        folder.glob("[0-9]*.json")
    )


def default_workers() -> int:
    """Threads that keep the cores that this process may use, or its disk, busy."""
    return min(MAX_WORKERS, len(os.sched_getaffinity(0)))


def _list_folder(result: Verification, manifest: DatasetManifest) -> None:
    """Look for files that dataset.json does not name."""
    names = set(os.listdir(result.folder))
    known = {shard.name for shard in manifest.shards}
    for what, strangers in (
        ("is not in dataset.json", {name for name in names if name.endswith(".tar")} - known),
        ("is left over from an interrupted run", {n for n in names if n.endswith(".tmp")}),
    ):
        if strangers:
            more = f" (and {len(strangers) - 1} more)" if len(strangers) > 1 else ""
            result.add("note", min(strangers), what + more)


def _run_quick(
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
        _, why = read_sidecar(result.folder, shard, False) if with_sidecars else (None, "")
        if why:
            found.append(Finding("sidecar", shard.sidecar, why))
        on_bytes(shard.bytes)
        return found

    shards = manifest.shards
    pieces = [shards[start : start + _AT_ONCE] for start in range(0, len(shards), _AT_ONCE)]
    for found in pool.map(lambda piece: [f for shard in piece for f in look(shard)], pieces):
        result.findings += found
    result.count_sound("presence, size, first and last sample", with_sidecars)
    counted = sum(entry.count for entry in manifest.classes)
    if manifest.classes and counted != manifest.num_samples:
        what = f"its classes count {counted} samples, its shards {manifest.num_samples}"
        result.add("manifest", MANIFEST_NAME, what)
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
    for head, (row, use_flip) in zip(heads, parts, strict=True):
        start = row * layout.stride
        offset = start + (layout.flip_offset if use_flip else layout.moments_offset)
        os.preadv(descriptor, [head[: layout.label_bytes]], start)
        os.preadv(descriptor, [head[layout.label_bytes :]], offset)
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
