"""Write and read files of consolidated weights: fp32, experts in global order, in safetensors.

training/run/weights.py finds the file that a command asks for.
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
from training.checkpoints.manifest import MANIFEST_FILE, read_manifest
from training.config.tree import Config
from training.config.validation import lacks_compiler
from training.engine.build import build_model


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


def describe_disk_error(error: Exception) -> str:
    """Return one line; what the system said, where torch's zip writer hides it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror + (f" ({cause.filename})" if cause.filename else "")
        cause = cause.__context__
    return (str(error) or type(error).__name__).splitlines()[0]


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
