"""Publish a finished checkpoint: move it out of staging, point `latest` at it, delete old ones.

Old ones are those that `--keep-last` no longer keeps. Whatever appears or disappears is moved out
of the job's staging folder (run/lock.py) or into it. Where another job has removed that folder,
moving fails: nothing can be published, replaced or deleted any more.
"""

import contextlib
import errno
import os
import shutil
from pathlib import Path

from data_tools.exit_codes import CONFIG_ERROR_EXIT_CODE
from data_tools.files import replace_file
from training.checkpoints.manifest import LATEST_FILE, MANIFEST_FILE, checkpoints_up_to, step_of
from training.ranks.agreement import RunError


class TakenOverError(RunError):
    """Another job writes to the run directory now; raised on all ranks."""

    exit_code = CONFIG_ERROR_EXIT_CODE  # to be started again would take it back


class CheckpointError(RunError):
    """The last checkpoint of a run could not be written; raised on all ranks."""


def is_taken_over(staging: Path) -> bool:
    """Tell whether another job has removed this one's staging folder."""
    try:
        os.stat(staging)
    except OSError as err:
        return err.errno in (errno.ENOENT, errno.ESTALE)  # as a network file system puts it
    return False


def publish(complete: Path, final: Path, manifest: str) -> None:
    """Give a checkpoint in the staging folder its manifest, its name, and name it in `latest`.

    Raises:
        OSError: another job has taken over, or the disk.
    """
    staging = complete.parent
    _write_durably(complete / MANIFEST_FILE, manifest, staging / MANIFEST_FILE)
    _sync(complete)
    if final.exists():  # of a line that was left, or damaged
        _discard(final, staging)
    os.rename(complete, final)
    _sync(final.parent)
    name_latest(final, staging)


def prune(newest: Path, staging: Path, keep_last: int, keep_every: int) -> None:
    """Delete the checkpoints that are not to be kept.

    Later ones are of a line that was left by resuming from an older one: they do not push out this
    line's, and are overwritten when their step is reached.
    """
    for old in checkpoints_up_to(newest)[:-keep_last]:
        if not (keep_every and step_of(old.name) % keep_every == 0):
            with contextlib.suppress(OSError):  # it is tried again next time
                _discard(old, staging)


def _discard(folder: Path, staging: Path) -> None:
    """Delete a checkpoint: nobody sees half of one."""
    removed = staging / f"removed-{folder.name}"
    os.rename(folder, removed)
    shutil.rmtree(removed, ignore_errors=True)  # what is left goes with the staging folder


def name_latest(folder: Path, staging: Path) -> None:
    """Make a complete checkpoint the one that everybody finds.

    Raises:
        OSError: another job has taken over, or the disk.
    """
    pointer = folder.parent / LATEST_FILE
    _write_durably(pointer, folder.name + "\n", staging / LATEST_FILE)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    """Make a folder's entries survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_durably(path: Path, text: str, temporary: Path) -> None:
    """Replace a small file so that a reader sees the old one or the new one."""
    replace_file(path, lambda file: file.write(text.encode("ascii")), temporary)
