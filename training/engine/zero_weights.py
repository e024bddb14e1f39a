"""The weights of a running engine, raw or averaged, on every ZeRO stage.

Before the first update, and after none but skipped ones, there are no averages yet. The average of
no steps is the start, so the raw weights stand in.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from training.engine.average_profiles import EMA_KEY
from training.engine.deepspeed_internals import (
    base_optimizer,
    expert_group,
    masters,
    parts,
    renew_weights,
    sharding_group,
    unsharded_shape,
)
from training.engine.interface import Engine

EXCHANGED_VALUES = 1 << 24  # at once, which is what exchanging needs memory for


@contextmanager
def ema_weights(engine: Engine) -> Iterator[None]:
    """Let the engine's module compute with the first average. All ranks must enter and leave.

    Meanwhile masters and first averages are exchanged, so this must not be entered around a
    checkpoint. Afterwards all of them, and the weights, are bit-identical to before.
    """
    if not base_optimizer(engine).has_averages:
        yield
        return
    _exchange_averages(engine)
    try:
        yield
    finally:
        _exchange_averages(engine)


@torch.no_grad()
def _exchange_averages(engine: Engine) -> None:
    state = base_optimizer(engine).state
    for master in masters(engine):
        # One that never had a gradient has no average: it is its own.
        average = state.get(master, {}).get(EMA_KEY, master)
        flat = (tensor.detach().view(-1) for tensor in (master, average))
        for a, b in zip(*(tensor.split(EXCHANGED_VALUES) for tensor in flat), strict=True):
            kept = a.clone()
            a.copy_(b)
            b.copy_(kept)
    renew_weights(engine)


def consolidated_weights(engine: Engine, key: str | None = None) -> dict[str, Tensor]:
    """Gather full fp32 weights, experts in global order. All ranks must call this.

    Args:
        engine: the DeepSpeed engine.
        key: of an average (`EMAAdamW.profiles`); None = the raw weights.

    Returns:
        On rank 0 every parameter by its own name on the CPU (experts stacked: (E, D, D)); empty on
        the other ranks. Names are those of a model built without expert parallelism.
    """
    if not base_optimizer(engine).has_averages:
        key = None
    weights = {}
    is_main = torch.distributed.get_rank() == 0
    for name, param in engine.module.named_parameters():
        value = full_value(engine, param, key)
        if expert_group(param) is not None:
            slots = engine.module.gate.slots[block_of(name)]
            value = gathered_slots(value, param)[slots]
        if is_main:
            weights[name] = value.to("cpu", torch.float32, copy=True)
    return weights


def block_of(name: str) -> int:
    """Return the number of the block that a parameter is in, from its name: blocks.I.anything."""
    return int(name.split(".")[1])


def gathered_slots(value: Tensor, param: Tensor) -> Tensor:
    """Put the slots of all ranks of a group together, (E, ...). All of its ranks must call this.

    Args:
        value: (E / R, ...) of this rank.
        param: the experts' parameter that it is of.
    """
    group = expert_group(param)
    slots = [torch.empty_like(value) for _ in range(group.size())]
    torch.distributed.all_gather(slots, value, group=group)
    return torch.cat(slots)


@torch.no_grad()
def full_value(engine: Engine, param: Tensor, key: str | None) -> Tensor:
    """Put this rank's values of a parameter together, in fp32. All ranks must call this.

    Args:
        engine: the DeepSpeed engine.
        param: of its module.
        key: of the optimizer's state; None = the fp32 master.

    Returns:
        A copy, of the parameter's shape before ZeRO took it apart: under expert parallelism the
        experts of this rank.
    """
    state = base_optimizer(engine).state
    value = torch.zeros(unsharded_shape(param), dtype=torch.float32, device=engine.device)
    for whole, master, place in _pieces(engine, param, value):
        stored = master if key is None else state[master].get(key, master)
        whole.copy_(stored.view(-1)[place])
    if (group := sharding_group(param)) is not None:
        # All ranks but one have zeros at a place. As bits: added to 0.0, -0.0 would be lost.
        torch.distributed.all_reduce(value.view(torch.int32), group=group)
    return value


@torch.no_grad()
def set_full_value(engine: Engine, param: Tensor, key: str | None, value: Tensor) -> None:
    """Set this rank's part of what `full_value` puts together; weights follow `renew_weights`."""
    state = base_optimizer(engine).state
    for whole, master, place in _pieces(engine, param, value):
        stored = master if key is None else state[master][key]
        stored.view(-1)[place].copy_(whole)


def _pieces(engine: Engine, param: Tensor, value: Tensor) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """List what this rank stores of a parameter: values, and the master and place that hold them.

    Args:
        engine: the DeepSpeed engine.
        param: of its module.
        value: the whole parameter, of which views are given.
    """
    own, flat = masters(engine), value.flatten()  # a view where it is to be written to
    for part in parts(engine):
        if part.param is param:
            whole = flat[part.start : part.start + part.numel]
            yield whole, own[part.master], slice(part.offset, part.offset + part.numel)
