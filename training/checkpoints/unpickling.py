"""Read DeepSpeed's checkpoint files, which are pickles, without running what is pickled in them.

Beside tensors and plain values they hold objects of a few classes of DeepSpeed's. A file with any
other is refused: unpickling an object can run a program.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from training.engine.deepspeed_internals import PICKLED_CLASSES


def foreign_objects(path: Path) -> str:
    """Name the objects that keep a file from being read, "" if there are none.

    Raises:
        ValueError: it is no file of torch's.
    """
    found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return ", ".join(sorted(set(found) - set(PICKLED_CLASSES)))


def unpickle(path: Path, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """Read a file that has no foreign objects; with mmap, tensors when they are used."""
    paths = (path.rpartition(".") for path in PICKLED_CLASSES)
    classes = [getattr(import_module(module), name) for module, _, name in paths]
    with torch.serialization.safe_globals(classes):
        return torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
