"""Read the tensors of a weight file that somebody else may have written, running nothing of it."""

import argparse
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data_tools.errors import ConfigError
from data_tools.file_kinds import LFS_REASON, is_lfs_pointer_file

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
# Entries under which training scripts save weights, the averaged ones first.
WEIGHT_ENTRIES = ("ema", "model", "state_dict")


def read_state_dict(path: Path, flag: str) -> tuple[dict[str, Tensor], str | None]:
    """Map the tensors of a .safetensors or torch file by name; they are read when they are used.

    Args:
        path: the file.
        flag: what the user typed for it, which begins error messages.

    Returns:
        The tensors, and the entry of the file that they were taken from, None if it holds nothing
        else.
    """
    if not path.exists():
        raise ConfigError(f"{flag}: there is no {path}; give a run, or a file of weights.")
    if is_lfs_pointer_file(path):
        raise ConfigError(f"{flag} {LFS_REASON}.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path), None
        except (OSError, SafetensorError) as err:
            raise ConfigError(
                f"{flag} is damaged or no safetensors file ({err}); copy or download it again."
            ) from err
    if path.suffix not in PICKLE_SUFFIXES or path.is_dir():
        raise ConfigError(
            f"{flag} is neither a run, a diffusers folder nor a file named .safetensors or "
            f"{', '.join(PICKLE_SUFFIXES)}; give one of these."
        )
    return _select_entry(_unpickle(path, flag), flag)


def _unpickle(path: Path, flag: str) -> Any:
    try:
        # DiT's train.py saves its arguments beside the weights; a Namespace runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Files of torch before 1.6 are no zip archives and cannot be mapped.
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as err:
        if objects := _objects_in(path, str(err)):
            raise ConfigError(
                f"{flag} holds {objects} besides tensors and is not opened, because pickled "
                "objects can run programs; if you trust it, keep only its tensors, where that can "
                f'be imported: python -c "import torch; torch.save(torch.load({str(path)!r}, '
                f"weights_only=False)[{WEIGHT_ENTRIES[0]!r}], 'weights.pt')\"."
            ) from err
        raise _damaged(flag, "it is no pickle") from err
    except (OSError, RuntimeError, EOFError, ValueError) as err:
        raise _damaged(flag, str(err).split("\n")[0].rstrip(".")) from err


def _damaged(flag: str, reason: str) -> ConfigError:
    return ConfigError(f"{flag} is damaged or no torch file ({reason}); copy or download it again.")


def _objects_in(path: Path, refusal: str) -> str:
    """Name the Python objects that kept a torch file from being opened; "" if it was not that."""
    if not zipfile.is_zipfile(path):  # before torch 1.6 a file could not be searched for them
        first = re.search(r"Unsupported global: GLOBAL (\S+)", refusal)
        return first[1] if first else ""
    names = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    return ", ".join(sorted(names - {"argparse.Namespace"}))


def _select_entry(content: Any, flag: str) -> tuple[dict[str, Tensor], str | None]:
    if _is_state_dict(content):
        return content, None
    entries = content if isinstance(content, dict) else {}
    for entry in WEIGHT_ENTRIES:
        if _is_state_dict(entries.get(entry)):
            return entries[entry], entry
    held = f"the entries {', '.join(map(str, entries))}" if entries else type(content).__name__
    raise ConfigError(
        f"{flag} holds {held}, but no tensors by name, neither alone nor as "
        f"{', '.join(WEIGHT_ENTRIES)}; save a model's state_dict()."
    )


def _is_state_dict(value: Any) -> bool:
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(item, Tensor) for item in value.values())
