"""Read the tensors of a weight file from anybody, without running code that is in it."""

import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from data_tools.errors import ConfigError
from data_tools.user_files.file_kinds import LFS_REASON, is_lfs_pointer_file
from data_tools.user_files.paths import absence, broken_link
from training.checkpoints.weight_entries import Entry, entries_of

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
MAX_CLASSES = 100  # of objects in a file; a checkpoint has a few


class StoredObject:
    """Stands for an object in a torch file, whatever its class: keeps nothing, runs nothing."""

    def __init__(self, *_args: Any, **_values: Any) -> None:
        """Take what the object would be made of."""

    def __setstate__(self, _state: Any) -> None:
        """Take what the object held."""


def read_state_dict(path: Path, flag: str) -> list[Entry]:
    """Map the tensors of a .safetensors or torch file by name; they are read when they are used.

    Return the models in it, first the one to take. Messages begin with `flag`, as it was typed.
    """
    if not path.exists():
        missing = absence(path) if broken_link(path) else f"there is no {path}"
        raise ConfigError(f"{flag}: {missing}; give a run, or a file of weights.")
    if is_lfs_pointer_file(path):
        raise ConfigError(f"{flag} {LFS_REASON}.")
    if path.suffix == ".safetensors":
        try:
            return entries_of(load_file(path))
        except (OSError, SafetensorError) as err:
            raise ConfigError(
                f"{flag} is damaged or no safetensors file ({err}); copy or download it again."
            ) from err
    if path.suffix not in PICKLE_SUFFIXES or path.is_dir():
        raise ConfigError(
            f"{flag} is neither a run, a diffusers folder nor a file named .safetensors or "
            f"{', '.join(PICKLE_SUFFIXES)}; give one of these."
        )
    content = _unpickle(path, flag)
    found = entries_of(content)
    if not found:
        held = torch.typename(type(content))
        if isinstance(content, dict) and content:
            held = f"the entries {', '.join(map(str, content))}"
        raise ConfigError(
            f"{flag} holds {held}, but no tensors by name; save a model's state_dict()."
        )
    return found


def _unpickle(path: Path, flag: str) -> Any:
    """Read a torch file with stand-ins for all that is no tensor and no plain value."""
    stands_for: dict[str, type] = {}
    for _ in range(MAX_CLASSES):
        known = [_stand_in(name, kind) for name, kind in stands_for.items()]
        try:
            with torch.serialization.safe_globals(known):
                # Files of torch before 1.6 are no zip archives and cannot be mapped.
                is_zip = zipfile.is_zipfile(path)
                return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        except pickle.UnpicklingError as err:
            name, kind = _missing(str(err))
            if name is None or stands_for.get(name) is kind:
                raise _refused(flag, str(err)) from err
            stands_for[name] = kind
        except (OSError, RuntimeError, EOFError, ValueError, TypeError, AttributeError) as err:
            raise _damaged(flag, str(err).split("\n")[0].rstrip(".")) from err
    raise _refused(flag, "too many classes")


def _missing(reason: str) -> tuple[str | None, type]:
    """Tell which class's stand-in is missing, or of the wrong kind, when torch gives a reason."""
    if unknown := re.search(r"Unsupported global: GLOBAL (\S+) was not", reason):
        return unknown[1], StoredObject
    if filled := re.search(r"Can only (SETITEMS?|append|extend) .* but got <class '(.+)'>", reason):
        return filled[2], OrderedDict if filled[1].startswith("SET") else list
    return None, StoredObject


def _stand_in(name: str, kind: type) -> tuple[type, str]:
    """Put a stand-in in place of a class or function, which is never looked up.

    What is filled like a dictionary or a list is one, so that its content is kept.
    """
    module, _, short = name.rpartition(".")
    own: dict[str, Any] = {"__module__": module or "builtins"}
    if kind is not StoredObject:
        own["__new__"] = lambda _cls, *_args, **_values: kind()
    return type(short, (StoredObject,), own), name if module else f"builtins.{name}"


def _refused(flag: str, reason: str) -> ConfigError:
    if blocked := re.search(r"unsupported GLOBAL (\S+) whose module", reason):
        return ConfigError(
            f"{flag} asks for {blocked[1]} when it is opened, which no file of weights needs; do "
            "not use it."
        )
    return _damaged(flag, "it is no pickle of tensors and values")


def _damaged(flag: str, reason: str) -> ConfigError:
    return ConfigError(f"{flag} is damaged or no torch file ({reason}); copy or download it again.")
