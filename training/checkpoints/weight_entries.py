"""Find the weights of a model in what a training script has saved, however it wrapped them.

A file holds dictionaries of tensors, nested under entries that every trainer calls otherwise
("ema", "model_state_dict", "state_dict/ema_model"), and wrappers put prefixes before the names.
No list of them is kept here: a model is where the names of its blocks are.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from models.import_weights import models_in

MAX_DEPTH = 8  # of dictionaries in each other
# Words of the names of entries. A running average is better than the weights that are trained.
AVERAGES = {"ema", "emas", "swa", "avg", "average", "averaged", "shadow"}
TRAINED = {"online", "raw"}  # beside an average, in ema_pytorch and alike
OPTIMIZER = {"opt", "optim", "optimizer", "optimizers", "exp", "momentum", "grad", "grads"}
CONDITIONING = re.compile(r"\.(adaLN_modulation|norm1)\.")  # in a block that sees the timestep


class Entry(NamedTuple):
    """The weights of one model in a file."""

    name: str  # of the entries that lead to them, "" if the file holds them directly
    weights: dict[str, Tensor]  # without wrappers' prefixes
    outside: list[str]  # names of tensors beside them that are of no model


def entries_of(content: Any) -> list[Entry]:
    """List the models in a file's content, the one to take first.

    An average is taken before the weights that are trained; of several, the one with most tensors;
    of several alike, the first. What is no diffusion transformer is listed if there is none.
    """
    found = [entry for path, tensors in _tables(content) for entry in _models(path, tensors)]
    found.sort(key=_rank)
    is_transformer = found and _sees_timesteps(found[0])
    return [entry for entry in found if _sees_timesteps(entry) == is_transformer]


def _tables(content: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict]]:
    """Yield every dictionary that holds tensors by name, with the entries that lead to it."""
    if len(path) > MAX_DEPTH or OPTIMIZER.intersection(_words("/".join(path))):
        return
    if isinstance(content, list | tuple):
        content = dict(enumerate(content))
    if not isinstance(content, dict):
        return
    named = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if named:
        yield path, named
    for name, value in content.items():
        yield from _tables(value, (*path, str(name)))


def _models(path: tuple[str, ...], tensors: dict[str, Tensor]) -> Iterator[Entry]:
    models, outside = models_in(tensors)
    for prefix, weights in models.items():
        yield Entry("/".join((*path, *filter(None, [prefix]))), weights, outside)


def _rank(entry: Entry) -> tuple[bool, int, int]:
    words = _words(entry.name)
    is_averaged = sum(word in AVERAGES for word in words)
    is_trained = sum(word in TRAINED for word in words)
    return not _sees_timesteps(entry), 2 * is_trained - is_averaged, -len(entry.weights)


def _sees_timesteps(entry: Entry) -> bool:
    return any(CONDITIONING.search(name) for name in entry.weights)


def _words(name: str) -> list[str]:
    return re.split(r"[^a-z]+", name.lower())
