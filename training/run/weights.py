"""Find the weights of a run: those of a checkpoint, raw or averaged, or a file beside it.

Averages are called by their profile, as in `checkpoints/step-0001000/ema-std0.050.safetensors`.
"""

from pathlib import Path

from data_tools.errors import ConfigError
from training.checkpoints.manifest import (
    CHECKPOINT_DIR,
    RAW_FILE,
    latest_checkpoint,
    read_manifest,
    verify_file,
)
from training.checkpoints.weight_files import average_file, check_weights
from training.config.tree import Config
from training.config.wording import did_you_mean
from training.engine.average_profiles import profiles_of
from training.run.checkpoint_notes import last_saved_step
from training.run.directory import checkpoints_are_gone


def find_weights(
    run_dir: Path,
    config: Config,
    *,
    checkpoint: str | None = None,
    ema: str | None = None,
    is_raw: bool = False,
    file: Path | None = None,
) -> Path:
    """Locate the weights of a run that a command asks for, and check that they are whole.

    Args:
        checkpoint: --checkpoint, such as step-0001000; None = the latest.
        ema: --ema, the name of an average's profile; None = the first.
        is_raw: --raw, the weights that are trained.
        file: --weights, any file of this model instead of a checkpoint's.
    """
    given = [
        flag
        for flag, value in (("--ema", ema), ("--raw", is_raw or None), ("--weights", file))
        if value is not None
    ]
    if len(given) > 1:
        raise ConfigError(f"{given[0]} and {given[1]} both choose the weights; give one of them.")
    if file is not None:
        if checkpoint is not None:
            raise ConfigError("--weights and --checkpoint both choose the weights; give one.")
        check_weights(file, config)
        return file
    path = find_checkpoint(run_dir, checkpoint) / _file_of(config, ema, is_raw)
    verify_file(read_manifest(path.parent), path)
    return path


def _file_of(config: Config, ema: str | None, is_raw: bool) -> str:
    if is_raw:
        return RAW_FILE
    keys = {profile.name: key for key, profile in profiles_of(config.optim).items()}
    if ema is not None and ema not in keys:
        raise ConfigError(f"--ema: the run has no average '{ema}'{did_you_mean(ema, keys)}")
    return average_file(next(iter(keys.values())) if ema is None else keys[ema])


def find_checkpoint(run_dir: Path, tag: str | None) -> Path:
    """Locate a checkpoint by its name; None = the latest."""
    if tag is None and (latest := latest_checkpoint(run_dir)) is not None:
        return latest
    folders = {path.name: path for path in sorted((run_dir / CHECKPOINT_DIR).glob("step-*"))}
    if tag is None or not folders:
        step = last_saved_step(run_dir)
        if step is None:
            raise ConfigError(f"{run_dir} has no checkpoint yet; train first.")
        raise ConfigError(f"{run_dir}: {checkpoints_are_gone(step)}.")
    if tag not in folders:  # not a path either, such as ".."
        raise ConfigError(f"--checkpoint: no '{tag}'{did_you_mean(tag, folders)}")
    return folders[tag]
