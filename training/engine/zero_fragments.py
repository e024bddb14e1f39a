"""Map ZeRO's flat shards to parameters.

A Fragment is a run of one parameter's values and its place in a rank's flat fp32 tensor, a master.
Values of a parameter are counted through its whole, flattened; of stacked experts through all slots
of all ranks of the expert-parallel group (models/placement.py). So a fragment means the same to a
job of another layout.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.engine.deepspeed_internals import (
    base_optimizer,
    expert_group,
    masters,
    parts,
    unsharded_shape,
)
from training.engine.interface import Engine

EXPERTS = ".deepspeed_moe.experts."  # in the name of every parameter of experts


class Fragment(NamedTuple):
    """`numel` values of parameter `name` from `start` on, at `offset` of master number `master`."""

    name: str
    master: int
    offset: int
    start: int
    numel: int


def states(engine: Engine) -> list[dict[str, Any]]:
    """Return the optimizer's state of every master; empty before the first update."""
    known = base_optimizer(engine).state
    return [dict(known.get(master, {})) for master in masters(engine)]


def fragments(engine: Engine) -> list[Fragment]:
    """List what this rank's masters hold."""
    names = {id(param): name for name, param in engine.module.named_parameters()}
    return [
        Fragment(
            names[id(part.param)],
            part.master,
            part.offset,
            part.start + _first_value(part.param),
            part.numel,
        )
        for part in parts(engine)
    ]


def values_per_slot(param: Tensor) -> int:
    """Return how many values of a stacked parameter belong to one expert."""
    shape = unsharded_shape(param)
    return shape.numel() // shape[0]


def whole_shapes(engine: Engine) -> dict[str, torch.Size]:
    """Return the shape of every parameter, of experts with those of all ranks of a group."""
    shapes = {}
    for name, param in engine.module.named_parameters():
        shape, group = unsharded_shape(param), expert_group(param)
        if group is not None:
            shape = torch.Size((shape[0] * group.size(), *shape[1:]))
        shapes[name] = shape
    return shapes


def _first_value(param: Tensor) -> int:
    """Return where this rank's values of a parameter begin among those of its group's ranks."""
    group = expert_group(param)
    return 0 if group is None else unsharded_shape(param).numel() * group.rank()
