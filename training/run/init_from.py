"""Find what --init-from names: a run, one of its checkpoints, or a file of weights.

training/checkpoints/warm_start.py compares it with the model and loads it.
"""

import os
import re
from dataclasses import replace
from pathlib import Path

from data_tools.errors import ConfigError
from training.checkpoints.manifest import (
    CHECKPOINT_DIR,
    LATEST_FILE,
    MANIFEST_FILE,
    RAW_FILE,
    latest_checkpoint,
)
from training.checkpoints.warm_start import WarmStart, compare_source
from training.config.tree import Config
from training.run.directory import CONFIG_FILE, load_config
from training.run.weights import find_weights

DEEPSPEED_FILES = re.compile(r".*mp_rank_\d+_(model|optim)_states\.pt")
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
DIFFUSERS_FOLDERS = ("", "transformer")  # of the model alone, of a pipeline


def check_is_elsewhere(config: Config) -> None:
    """Refuse a run that would start from itself."""
    source, run_dir = config.run.init_from, Path(config.run.run_dir)
    if source is None:
        return
    path = _split_tag(source)[0].resolve()
    if run_dir.resolve() in (path, *path.parents):
        raise ConfigError(
            f"--init-from {source} is --run-dir {run_dir} itself; to continue that run leave "
            "--init-from as it was, to start another from it choose a new --run-dir."
        )


def with_own_origin(config: Config) -> tuple[Config, str]:
    """Give a run that goes on the source that it began with, which is not read again.

    That source may be left out, or have moved. Another one is left to be refused.

    Returns:
        the configuration, and what should be said of a source that has moved.
    """
    run_dir, given = Path(config.run.run_dir), config.run.init_from
    # os.path, which never raises, of whatever name.
    if not os.path.exists(run_dir / CONFIG_FILE) or latest_checkpoint(run_dir) is None:
        return config, ""
    first = load_config(run_dir).run.init_from
    if first is None or first == given:
        return config, ""
    note, before = "", _split_tag(first)[0]
    if given is not None:
        now = _split_tag(given)[0]
        if before.exists() and before.resolve() != now.resolve():
            return config, ""
        note = (
            f"--init-from {given}: is not read; {run_dir} goes on from its own checkpoint and "
            f"began with {first}; to begin with other weights use a new --run-dir."
        )
    return replace(config, run=replace(config.run, init_from=first)), note


def check_initial_weights(config: Config) -> WarmStart | None:
    """Check what a run begins with; None if it initialises all its weights, or is resumed."""
    is_resumed = latest_checkpoint(Path(config.run.run_dir)) is not None
    return None if config.run.init_from is None or is_resumed else check_warm_start(config)


def check_warm_start(config: Config) -> WarmStart:
    """Find what --init-from names and compare it with the model; change nothing.

    Raises:
        ConfigError: it cannot be read, or no block of the model is in it.
    """
    return compare_source(*_locate(config.run.init_from), config)


def _split_tag(source: str) -> tuple[Path, str | None]:
    """Split RUN:TAG, unless a path has this very name."""
    folder, colon, tag = source.rpartition(":")
    if not colon or Path(source).exists():
        return Path(source), None
    return Path(folder), tag


def _locate(source: str) -> tuple[Path, Config | None]:
    """Return a file of weights, and the configuration of the run that it belongs to."""
    if "://" in source:
        raise ConfigError(
            f"--init-from {source}: URLs are not fetched; download the file and give its path."
        )
    path, tag = _split_tag(source)
    if (path / CONFIG_FILE).exists():
        return _averaged_weights(path, tag, source)
    if tag is not None:
        raise ConfigError(f"--init-from {source}: {path} is no run directory; give RUN:TAG or RUN.")
    if (path / MANIFEST_FILE).exists():  # a checkpoint's folder
        return _averaged_weights(path.parents[1], path.name, source)
    _check_is_no_part(path, source)
    for folder in DIFFUSERS_FOLDERS:
        if (path / folder / DIFFUSERS_FILE).exists():
            return path / folder / DIFFUSERS_FILE, None
    return path, None


def _check_is_no_part(path: Path, source: str) -> None:
    """Refuse what lies in a run but is not its weights; say what to give instead."""
    folder = path.parent if path.name == LATEST_FILE else path
    if folder.name == CHECKPOINT_DIR and (folder.parent / CONFIG_FILE).exists():
        raise ConfigError(
            f"--init-from {source} is a part of a run; give the run, {folder.parent}, or one of "
            f"its checkpoints, {folder.parent}:TAG."
        )
    if DEEPSPEED_FILES.fullmatch(path.name) and path.exists():
        whole = path.with_name(RAW_FILE)
        advice = f"give {whole}" if whole.exists() else "make one of it by DeepSpeed's zero_to_fp32"
        raise ConfigError(
            f"--init-from {source} is DeepSpeed's own file for resuming, not a model's weights in "
            f"one file; {advice}."
        )


def _averaged_weights(run_dir: Path, tag: str | None, source: str) -> tuple[Path, Config]:
    try:
        config = load_config(run_dir)
        return find_weights(run_dir, config, checkpoint=tag), config
    except ConfigError as err:
        reason = str(err).removeprefix("--checkpoint: ").removeprefix("--run-dir ")
        raise ConfigError(f"--init-from {source}: {reason}") from err
