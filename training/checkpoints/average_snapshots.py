"""Store the power-function averages at steps, to make averages of other widths later.

`ema_snapshots/std0.050-step-0001000.safetensors` holds one average at one step, in fp32.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from data_tools.errors import ConfigError
from data_tools.files import MalformedError
from data_tools.formats import FORMAT_KEY, Format
from training.checkpoints.manifest import tag_of
from training.checkpoints.weight_files import (
    NonFiniteWeightsError,
    describe_disk_error,
    write_weights,
)
from training.engine.average_profiles import PowerProfile
from training.engine.deepspeed_internals import base_optimizer
from training.engine.interface import Engine
from training.engine.zero_weights import consolidated_weights
from training.ranks.agreement import agreed_message

SNAPSHOT_DIR = "ema_snapshots"
SNAPSHOT = Format(newest=1)


@dataclass(frozen=True)
class Snapshot:
    """A stored average, as its file describes it."""

    path: Path
    step: int
    num_updates: int  # the average is over; less than the step where updates were skipped
    std: float
    gamma: float


def snapshot_file(profile: PowerProfile, step: int) -> str:
    """Name the file of a profile's average at a step; names sort like steps."""
    return f"{profile.name}-{tag_of(step)}.safetensors"


def save_snapshots(engine: Engine, run_dir: Path, step: int) -> str | None:
    """Write a snapshot of each power-function average. All ranks must call this.

    Returns:
        None, or why one could not be written; those before it are intact. Before the first update
        there is no average, and nothing is written.
    """
    optimizer, folder = base_optimizer(engine), run_dir / SNAPSHOT_DIR
    if optimizer.num_updates == 0:
        return None
    error: Exception | None = None
    for key, profile in optimizer.profiles.items():
        if not isinstance(profile, PowerProfile):
            continue
        weights = consolidated_weights(engine, key)  # collective, whatever the disk says
        if torch.distributed.get_rank() > 0 or error is not None:
            continue
        metadata = {
            FORMAT_KEY: str(SNAPSHOT.newest),
            "step": str(step),
            "num_updates": str(optimizer.num_updates),
            "std": repr(profile.std),
            "gamma": repr(profile.gamma),
        }
        try:
            folder.mkdir(exist_ok=True)
            write_weights(folder / snapshot_file(profile, step), weights, metadata)
        except (OSError, SafetensorError, NonFiniteWeightsError) as err:
            error = err
    return agreed_message(None if error is None else describe_disk_error(error))


def list_snapshots(run_dir: Path) -> list[Snapshot]:
    """Read what a run has stored, in the order of steps; refuse a run without snapshots."""
    found = [_describe(path) for path in (run_dir / SNAPSHOT_DIR).glob("*.safetensors")]
    if not found:
        raise ConfigError(
            f"{run_dir} has no {SNAPSHOT_DIR}; train with --ema-stds 0.05,0.1 and "
            "--ema-snapshot-every to store some."
        )
    return sorted(found, key=lambda snapshot: (snapshot.step, snapshot.std))


def _describe(path: Path) -> Snapshot:
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
        SNAPSHOT.check({FORMAT_KEY: int(about.get(FORMAT_KEY, 1))}, str(path))
        step, updates = int(about["step"]), int(about["num_updates"])
        return Snapshot(path, step, updates, float(about["std"]), float(about["gamma"]))
    except (OSError, SafetensorError, KeyError, ValueError, MalformedError) as err:
        raise ConfigError(
            f"{path} is damaged or no snapshot; restore it from a copy or move it elsewhere, the "
            "others suffice."
        ) from err
