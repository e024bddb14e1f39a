"""Which part of every parameter a rank holds in fp32, on every ZeRO stage, in the same terms.

ZeRO packs parts of parameters into flat tensors, the masters, with Adam's moments and the averages
beside them as tensors of the same shape. A fragment says where a part lies in both worlds. Values
of a parameter are counted through its whole, flattened; of stacked experts through all slots of all
ranks of the expert-parallel group (models/placement.py). So a fragment means the same to a job of
another layout.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.engine.zero_weights import base_optimizer

EXPERTS = ".deepspeed_moe.experts."  # in the name of every parameter of experts


class Fragment(NamedTuple):
    """`numel` values of parameter `name` from `start` on, at `offset` of master number `master`."""

    name: str
    master: int
    offset: int
    start: int
    numel: int


def masters(engine: Any) -> list[Tensor]:
    """Return this rank's fp32 masters, flat, as the optimizer knows them: its state's keys."""
    optimizer = engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [param for group in optimizer.param_groups for param in group["params"]]
    if stage == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):  # ZeRO 1 and 2
        return list(optimizer.single_partition_of_fp32_groups)
    return list(optimizer.fp32_groups_flat_partition)  # BF16_Optimizer: ZeRO 1 in bf16


def states(engine: Any) -> list[dict[str, Any]]:
    """Return the optimizer's state of every master; empty before the first update."""
    known = base_optimizer(engine).state
    return [dict(known.get(master, {})) for master in masters(engine)]


def fragments(engine: Any) -> list[Fragment]:
    """List what this rank's masters hold."""
    names = {id(param): name for name, param in engine.module.named_parameters()}
    find = {0: _whole, 3: _of_stage_3}.get(engine.zero_optimization_stage(), _of_stages_1_2)
    return [
        Fragment(name, master, offset, start + _first_value(param, name), numel)
        for param, master, offset, start, numel in find(engine)
        for name in (names[id(param)],)
    ]


def values_per_slot(param: Tensor) -> int:
    """Return how many values of a stacked parameter belong to one expert."""
    shape = getattr(param, "ds_shape", param.shape)  # ZeRO 3 leaves the parameter empty
    return shape.numel() // shape[0]


def whole_shapes(engine: Any) -> dict[str, torch.Size]:
    """Return the shape of every parameter, of experts with those of all ranks of a group."""
    from deepspeed.moe.utils import is_moe_param
    from deepspeed.utils import groups

    shapes = {}
    for name, param in engine.module.named_parameters():
        shape = getattr(param, "ds_shape", param.shape)
        if EXPERTS in name and is_moe_param(param):
            num_ranks = groups._get_expert_parallel_world_size(param.group_name)
            shape = torch.Size((shape[0] * num_ranks, *shape[1:]))
        shapes[name] = shape
    return shapes


_Part = tuple[Tensor, int, int, int, int]  # parameter, then as of Fragment, start within this rank


def _whole(engine: Any) -> Iterator[_Part]:
    for i, param in enumerate(masters(engine)):
        yield param, i, 0, 0, param.numel()


def _of_stages_1_2(engine: Any) -> Iterator[_Part]:
    optimizer = engine.optimizer
    groups = getattr(optimizer, "bit16_groups", None) or optimizer.bf16_groups
    for i, group in enumerate(groups):
        for param in group:
            if (mapping := param._hp_mapping) is not None:  # else other ranks have all of it
                there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield param, i, here.start, there.start, there.numel


def _of_stage_3(engine: Any) -> Iterator[_Part]:
    for i, group in enumerate(engine.optimizer.fp16_groups):
        offset = 0
        for param in group:
            share = param.ds_tensor.ds_numel
            start = share * torch.distributed.get_rank(group=param.ds_process_group)
            numel = min(share, param.ds_numel - start)
            if numel > 0:  # the last ranks' parts may be padding only
                yield param, i, offset, start, numel
            offset += share


def _first_value(param: Tensor, name: str) -> int:
    """Return where this rank's values of a parameter begin among those of its group's ranks."""
    from deepspeed.moe.utils import is_moe_param
    from deepspeed.utils import groups

    if not (EXPERTS in name and is_moe_param(param)):
        return 0
    numel = getattr(param, "ds_shape", param.shape).numel()
    return numel * groups._get_expert_parallel_rank(param.group_name)
