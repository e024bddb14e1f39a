"""Check, create and read a run directory: what a run was started with, and what it has produced.

config.yaml      the resolved configuration, written before the first step
deepspeed.json   the resolved DeepSpeed configuration
dataset.json     a copy of the data set's manifest (classes, VAE, scaling)
init.json        where the initial weights came from, if they are another model's
starts.jsonl     a line per start; what it refers to is in provenance/
checkpoints.jsonl    a line per checkpoint: saved, failed or found damaged
checkpoints/  tensorboard/  metrics.jsonl  log.txt  samples/  ema_snapshots/  posthoc/
evaluation/  exports/
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from data_tools.errors import ConfigError
from data_tools.files import replace_file
from data_tools.formats import Format, NewerFormatError
from data_tools.shards.manifest import DATASET, MANIFEST_NAME, DatasetManifest
from data_tools.shards.undescribed import held_data
from data_tools.user_files.paths import absence, broken_link
from training.checkpoints.manifest import CHECKPOINT_DIR, latest_checkpoint
from training.config.location import CONFIG_FILE, DEEPSPEED_FILE
from training.config.preset import load_preset
from training.config.tree import Config, differences
from training.run.checkpoint_notes import last_saved_step
from training.run.starts import STARTS_FILE

INIT_FILE = "init.json"
METRICS_FILE = "metrics.jsonl"
SAMPLES_DIR = "samples"
EVALUATION_DIR = "evaluation"  # cards of scores and losses, and the images that were scored
INIT = Format(newest=1)
CARD = Format(newest=1, key="card_version")  # of a score or a loss


def check_run_directory(run_dir: Path, config: Config) -> None:
    """Refuse a directory that holds another run or cannot be written; change nothing."""
    existing = _existing_folder(run_dir)
    if broken_link(folder := run_dir / CHECKPOINT_DIR):  # or the run directory itself
        raise ConfigError(
            f"--run-dir {run_dir}: {absence(folder, run_dir)}; restore what it stood for, or "
            "choose another."
        )
    if (run_dir / CONFIG_FILE).exists():
        changed = differences(load_config(run_dir), config)
        if changed:
            raise ConfigError(
                f"--run-dir {run_dir} was started with another configuration: "
                f"{', '.join(changed)}; repeat the old values, or use a new --run-dir, and "
                f"--init-from {run_dir} to begin with this run's weights."
            )
        # To begin anew, which cuts the metrics back, is not for a run that had got somewhere.
        step = None if latest_checkpoint(run_dir) is not None else last_saved_step(run_dir)
        if step is not None:
            why = checkpoints_are_gone(step)
            raise ConfigError(f"--run-dir {run_dir}: {why}, or choose another.")
    elif any(run_dir.glob(f"{CHECKPOINT_DIR}/step-*")):
        raise ConfigError(
            f"--run-dir {run_dir} holds checkpoints but no {CONFIG_FILE}, so what made them is "
            "unknown; restore the file or choose another --run-dir."
        )
    elif kept := [name for name in (METRICS_FILE, STARTS_FILE) if (run_dir / name).exists()]:
        raise ConfigError(
            f"--run-dir {run_dir} holds {kept[0]} but no {CONFIG_FILE}, so it is of a run that is "
            "not known; restore the file or choose another --run-dir."
        )
    elif data := held_data(run_dir):
        raise ConfigError(
            f"--run-dir {run_dir} holds {data} and no run; choose a folder for this run alone."
        )
    if not os.access(existing, os.W_OK) or os.statvfs(existing).f_flag & os.ST_RDONLY:
        raise ConfigError(f"--run-dir {run_dir}: {existing} is not writable; choose another.")


def checkpoints_are_gone(step: int) -> str:
    """Say that a run has saved checkpoints, the last one at a step, and has none."""
    return (
        f"its checkpoint of step {step} was saved, and now there is none; copy the folder "
        f"{CHECKPOINT_DIR} back"
    )


def check_free_space(run_dir: Path, checkpoint_bytes: int, snapshot_bytes: int) -> None:
    """Refuse to start where not even one checkpoint, with snapshots of averages, would fit."""
    free, wanted = shutil.disk_usage(_existing_folder(run_dir)).free, checkpoint_bytes
    what = "one checkpoint takes"
    if snapshot_bytes:
        what, wanted = "one checkpoint and snapshots of averages take", wanted + snapshot_bytes
    if free < wanted:
        raise ConfigError(
            f"--run-dir {run_dir}: {free / 2**20:,.0f} MiB are free and {what} about "
            f"{wanted / 2**20:,.0f} MiB; free some space or choose another disk."
        )


def _existing_folder(run_dir: Path) -> Path:
    """Return the run directory, or the folder that it would be made in."""
    try:
        existing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    except OSError as err:
        raise ConfigError(f"--run-dir {run_dir}: {err.strerror}; choose another.") from err
    if not existing.is_dir():
        raise ConfigError(f"--run-dir {run_dir}: {existing} is not a folder; choose another.")
    return existing


def create_run_directory(
    run_dir: Path,
    config: Config,
    deepspeed_config: dict[str, Any],
    manifest: DatasetManifest,
    initial_weights: dict[str, Any] | None = None,
) -> None:
    """Write what the run was started with. Only rank 0 calls this.

    Without initial_weights, which are another model's, what is said of them stays.

    Raises:
        OSError: a file cannot be written.
    """
    files = {
        CONFIG_FILE: config.to_yaml(),
        DEEPSPEED_FILE: json.dumps(deepspeed_config, indent=2) + "\n",
        MANIFEST_NAME: DATASET.dumps(manifest.described()) + "\n",
    }
    if initial_weights is not None:
        files[INIT_FILE] = INIT.dumps(initial_weights) + "\n"
    run_dir.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        replace_file(run_dir / name, lambda file, text=text: file.write(text.encode()))


def load_config(run_dir: Path) -> Config:
    """Read the configuration that a run was started with."""
    path = run_dir / CONFIG_FILE
    if not path.exists():
        raise ConfigError(
            f"{run_dir} is no run directory: it has no {CONFIG_FILE}; give the folder of a run."
        )
    try:
        return load_preset(str(path))
    except NewerFormatError as err:
        raise NewerFormatError(str(err).removeprefix("--preset ")) from err
    except ConfigError as err:
        reason = str(err).removeprefix("--preset ").rstrip(".")
        raise ConfigError(
            f"--run-dir {run_dir}: its {CONFIG_FILE} is damaged ({reason}); restore it or choose "
            "another run directory."
        ) from err


def load_manifest(run_dir: Path) -> DatasetManifest:
    """Read a run's copy of the description of its data."""
    try:
        return DatasetManifest.load(run_dir, check_shards=False)
    except NewerFormatError:
        raise
    except ConfigError as err:
        raise ConfigError(
            f"{run_dir / MANIFEST_NAME} is missing or damaged; copy {MANIFEST_NAME} of the data "
            "that the run was trained on there."
        ) from err
