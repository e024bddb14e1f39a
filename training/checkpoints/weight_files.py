"""Files of consolidated weights: written whole or not at all, found by what they hold.

Averages are called by their profile, as in `checkpoints/step-0001000/ema-std0.050.safetensors`.
"""

import os
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_tools.errors import ConfigError
from data_tools.user_files.file_kinds import refuse_lfs_pointer
from models.switch_dit import SwitchDiT
from training.checkpoints.manifest import (
    CHECKPOINT_DIR,
    MANIFEST_FILE,
    RAW_FILE,
    latest_checkpoint,
    read_manifest,
    verify_file,
)
from training.config.tree import Config
from training.config.validation import lacks_compiler
from training.config.wording import did_you_mean
from training.engine.average_profiles import profiles_of
from training.engine.build import build_model
from training.run.checkpoint_notes import last_saved_step
from training.run.directory import checkpoints_are_gone


class NonFiniteWeightsError(ValueError):
    """The weights to save hold NaN or infinity."""


def average_file(key: str) -> str:
    """Name the file of an average by the key of its optimizer state."""
    return f"{key}.safetensors"


def write_weights(
    path: Path, weights: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file to the disk under its name, complete.

    Raises:
        NonFiniteWeightsError: there is nothing worth keeping.
        OSError: the disk.
        SafetensorError: the disk, as safetensors reports it.
    """
    for name, value in weights.items():
        if not value.isfinite().all():
            raise NonFiniteWeightsError(f"{name} holds values that are not finite")
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(weights, temporary, metadata)
        with temporary.open("rb") as file:  # safetensors does not flush it to the disk
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
        run_dir: the run.
        config: the run's configuration.
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


def load_model(config: Config, path: Path, device: torch.device) -> SwitchDiT:
    """Build a run's network with the weights of a file, ready to sample from."""
    if lacks_compiler(config, device):  # trained elsewhere; compiling only saves time
        config = replace(config, model=replace(config.model, compile_blocks=False))
    model = build_model(config)
    model.load_state_dict(load_file(path))
    return model.to(device).eval()


def is_same_file(path: Path, other: Path) -> bool:
    """Tell whether two files of weights are one, or copies by the manifests beside them."""
    if path.resolve() == other.resolve():
        return True
    sha256 = recorded_sha256(path)
    return sha256 is not None and sha256 == recorded_sha256(other)


def recorded_sha256(path: Path) -> str | None:
    """Return what a checkpoint's manifest says of a file; None if it is in no checkpoint."""
    if not (path.parent / MANIFEST_FILE).exists():  # not of a checkpoint
        return None
    record = read_manifest(path.parent).files.get(path.name)
    return None if record is None else record.sha256


def _file_of(config: Config, ema: str | None, is_raw: bool) -> str:
    if is_raw:
        return RAW_FILE
    keys = {profile.name: key for key, profile in profiles_of(config.optim).items()}
    if ema is not None and ema not in keys:
        raise ConfigError(f"--ema: the run has no average '{ema}'{did_you_mean(ema, keys)}")
    return average_file(next(iter(keys.values())) if ema is None else keys[ema])


def find_checkpoint(run_dir: Path, tag: str | None) -> Path:
    """Locate a checkpoint by its name; None = the latest."""
    if tag is None:
        folder = latest_checkpoint(run_dir)
        if folder is None:
            raise ConfigError(_say_no_checkpoint(run_dir))
        return folder
    folders = {path.name: path for path in sorted((run_dir / CHECKPOINT_DIR).glob("step-*"))}
    if not folders:
        raise ConfigError(_say_no_checkpoint(run_dir))
    if tag not in folders:  # not a path either, such as ".."
        raise ConfigError(f"--checkpoint: no '{tag}'{did_you_mean(tag, folders)}")
    return folders[tag]


def _say_no_checkpoint(run_dir: Path) -> str:
    step = last_saved_step(run_dir)
    if step is None:
        return f"{run_dir} has no checkpoint yet; train first."
    return f"{run_dir}: {checkpoints_are_gone(step)}."


def check_weights(path: Path, config: Config) -> None:
    """Refuse a file that does not hold the weights of the configuration's model."""
    with torch.device("meta"):
        wanted = {name: list(p.shape) for name, p in build_model(config).named_parameters()}
    if not path.is_file():
        raise ConfigError(f"--weights {path}: there is no such file; give a .safetensors file.")
    refuse_lfs_pointer("--weights", path)
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as err:
        raise ConfigError(
            f"--weights {path} is damaged or no safetensors file ({err}); give another."
        ) from err
    for name in (*wanted, *found):
        if wanted.get(name) != found.get(name):
            raise ConfigError(
                f"--weights {path} is of another model: {name} has shape {found.get(name)} there "
                f"and {wanted.get(name)} in the run; give a file of this run."
            )
