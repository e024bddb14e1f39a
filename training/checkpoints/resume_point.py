"""Choose the checkpoint that a run continues from: the newest whole one, agreed by all ranks."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from data_tools.errors import CONFIG_ERROR_EXIT_CODE, ConfigError
from data_tools.stream.order import ORDER_VERSION
from training.checkpoints.manifest import (
    CheckpointManifest,
    IncompleteCheckpointError,
    Layout,
    checkpoints_up_to,
    latest_checkpoint,
    read_manifest,
    verify_file,
)
from training.checkpoints.unpickling import foreign_objects
from training.ranks.agreement import RunError, agreed_message, from_main

PICKLE_SUFFIX = ".pt"


class ResumePoint(NamedTuple):
    """A checkpoint that a run may continue from."""

    folder: Path
    manifest: CheckpointManifest


class ResumeError(RunError):
    """No checkpoint can be continued from; raised on all ranks."""

    exit_code = CONFIG_ERROR_EXIT_CODE


def newest_point(run_dir: Path) -> ResumePoint | None:
    """Return the newest checkpoint with a manifest, without a look at its thousands of files.

    None before the first one.

    Raises:
        ConfigError: there are checkpoints, but none to continue from.
    """
    first: IncompleteCheckpointError | None = None
    for found in _candidates(run_dir, has_files=False):
        if isinstance(found, ResumePoint):
            return found
        first = first or found
    if first is not None:
        raise first
    return None


def _candidates(
    run_dir: Path, has_files: bool
) -> Iterator[ResumePoint | IncompleteCheckpointError]:
    """Go through the checkpoints, newest first; each is looked at only when it is its turn."""
    newest = latest_checkpoint(run_dir)
    for folder in () if newest is None else reversed(checkpoints_up_to(newest)):
        try:
            yield ResumePoint(folder, read_manifest(folder, has_files))
        except IncompleteCheckpointError as err:
            yield err


def choose_together(
    run_dir: Path, check: Callable[[CheckpointManifest], None]
) -> tuple[ResumePoint | None, list[str]]:
    """Find the newest checkpoint whose files match their checksums. All ranks must call this.

    Rank 0 looks for them, the ranks share the work of reading.

    Args:
        run_dir: that this job holds.
        check: raises ConfigError, on all ranks, for a checkpoint that this job must not continue.

    Returns:
        The checkpoint, None before the first one; and what is wrong with newer ones.

    Raises:
        ResumeError: on all ranks, when there are checkpoints but none to continue from.
    """
    candidates = _candidates(run_dir, has_files=True)
    reasons: list[str] = []
    while True:
        found = None
        if torch.distributed.get_rank() == 0:
            try:
                found = next(candidates, None)
            except ConfigError as err:
                found = ResumeError(str(err))
            if isinstance(found, IncompleteCheckpointError):
                found = found.reason
        found = from_main(found)
        if isinstance(found, ResumeError):
            raise found
        if isinstance(found, str):
            reasons.append(found)
            continue
        if found is None:
            break
        try:
            check(found.manifest)
        except ConfigError as err:
            raise ResumeError(str(err)) from err
        if (reason := verify_together(found)) is None:
            return found, reasons
        reasons.append(reason)
    if reasons:
        raise ResumeError(
            f"{reasons[0]}, and no older checkpoint in {run_dir} is whole; restore the file from a "
            "copy, or choose another --run-dir to start afresh."
        )
    return None, []


def verify_together(point: ResumePoint) -> str | None:
    """Compare all files with their checksums, shared among the ranks. All ranks must call this.

    Those that will be unpickled must hold nothing that could run a program, too.

    Returns:
        On all ranks, what is wrong with the first file that differs; None = nothing.
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    reason = None
    try:
        for name in sorted(point.manifest.files)[rank::world_size]:
            path = point.folder / name
            verify_file(point.manifest, path)
            if path.suffix == PICKLE_SUFFIX and (objects := foreign_objects(path)):
                found = f"{path} holds {objects}, which no checkpoint of this program does"
                raise IncompleteCheckpointError(point.folder, found)
    except IncompleteCheckpointError as err:
        reason = err.reason
    return agreed_message(reason)


def check_resumable(manifest: CheckpointManifest, layout: Layout, data_hash: str) -> None:
    """Refuse to resume in another precision, sample order or on another data set."""
    saved = manifest.layout.precision
    if saved != layout.precision:
        raise ConfigError(
            f"--run-dir: its checkpoint {manifest.tag} was saved with precision {saved}, this "
            f"command has {layout.precision}; change the precision of the --deepspeed file back to "
            f"{saved}, or start another --run-dir."
        )
    if manifest.order_version != ORDER_VERSION:
        raise ConfigError(
            f"--run-dir: its checkpoint {manifest.tag} was trained in sample order version "
            f"{manifest.order_version}, this program has {ORDER_VERSION}; use the program's "
            "version that wrote it, or start another --run-dir."
        )
    if manifest.data_hash != data_hash:
        raise ConfigError(
            f"--data: checkpoint {manifest.tag} of the --run-dir was trained on the data set whose "
            f"dataset.json has sha256 {manifest.data_hash[:12]}, this one has {data_hash[:12]}; "
            "give the original --data, or start another --run-dir."
        )
