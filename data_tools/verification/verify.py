"""Check a data set against its dataset.json: at a glance, or every byte.

Threads share the shards: hashing, reading and numpy's arithmetic all release the interpreter.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_tools.errors import ConfigError
from data_tools.formats import NewerFormatError
from data_tools.shards.manifest import MANIFEST_NAME, DatasetManifest
from data_tools.shards.shard_check import ShardContent
from data_tools.shards.undescribed import run_folder
from data_tools.verification.findings import SETTINGS_NAME, Finding, Verification
from data_tools.verification.full_check import run_full
from data_tools.verification.quick_check import run_quick

MAX_WORKERS = 16


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
        num_workers: threads.
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
        what = (
            str(err).removeprefix(f"--data {folder}: ").removeprefix(f"{folder / MANIFEST_NAME}: ")
        )
        result.findings.append(Finding("manifest", MANIFEST_NAME, what.split("; ")[0]))
        return result
    result.checked.append((MANIFEST_NAME, "well-formed"))
    _list_folder(result, manifest)
    with ThreadPoolExecutor(num_workers, thread_name_prefix="verify") as pool:
        if is_quick:
            run_quick(result, manifest, pool, on_bytes)
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
    with os.scandir(result.folder) as entries:
        names = {entry.name for entry in entries}
    known = {shard.name for shard in manifest.shards}
    for what, strangers in (
        ("is not in dataset.json", {name for name in names if name.endswith(".tar")} - known),
        ("is left over from an interrupted run", {n for n in names if n.endswith(".tmp")}),
    ):
        if strangers:
            more = f" (and {len(strangers) - 1} more)" if len(strangers) > 1 else ""
            result.findings.append(Finding("note", min(strangers), what + more))
