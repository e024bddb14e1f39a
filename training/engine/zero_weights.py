"""The weights of a running engine, raw or averaged, whatever ZeRO and the ranks have made of them.

Before the first update, and after none but skipped ones, there are no averages yet. The average of
no steps is the start, so the raw weights stand in.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from training.engine.average_profiles import EMA_KEY, EMAAdamW


def base_optimizer(engine: Any) -> EMAAdamW:
    """Return our optimizer, from inside ZeRO's."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def has_averages(engine: Any) -> bool:
    """Tell whether an update has been made. Every rank knows: they update and skip together."""
    return any(EMA_KEY in state for state in base_optimizer(engine).state.values())


def num_updates(engine: Any) -> int:
    """Return how many updates the averages are over: the steps done without the skipped ones."""
    states = base_optimizer(engine).state.values()
    return max((int(state["step"]) for state in states if "step" in state), default=0)


@contextmanager
def ema_weights(engine: Any) -> Iterator[None]:
    """Let the engine's module compute with the first average. All ranks must enter and leave.

    fp32 masters and optimizer state stay untouched; afterwards the weights are bit-identical to
    before. Must not be entered around a checkpoint.
    """
    if not has_averages(engine):
        yield
        return
    stage = engine.zero_optimization_stage()
    swap = {0: _swap_stage_0, 3: _swap_stage_3}.get(stage, _swap_stage_1_2)
    with torch.no_grad():
        yield from swap(engine.optimizer)


def _swap_stage_0(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [p.detach().clone() for p in params]
    for p in params:
        p.copy_(optimizer.state[p].get(EMA_KEY, p))
    try:
        yield
    finally:
        for p, old in zip(params, kept, strict=True):
            p.copy_(old)


def _swap_stage_1_2(optimizer: Any) -> Iterator[None]:
    from deepspeed.runtime.utils import all_gather_dp_groups

    if hasattr(optimizer, "single_partition_of_fp32_groups"):  # ZeRO 1 and 2
        masters = optimizer.single_partition_of_fp32_groups
        partitions, flat = optimizer.parallel_partitioned_bit16_groups, optimizer.bit16_groups_flat
    else:  # BF16_Optimizer: ZeRO 1 with bf16 weights and fp32 gradient accumulation
        masters = optimizer.fp32_groups_flat_partition
        partitions, flat = optimizer.bf16_partitioned_groups, optimizer.bf16_groups_flat
    for i, master in enumerate(masters):
        mine = torch.distributed.get_rank(group=optimizer.real_dp_process_group[i])
        partitions[i][mine].data.copy_(optimizer.state[master][EMA_KEY])
    all_gather_dp_groups(
        groups_flat=flat,
        partitioned_param_groups=partitions,
        dp_process_group=optimizer.real_dp_process_group,
        start_alignment_factor=optimizer.nccl_start_alignment_factor,
        allgather_bucket_size=optimizer.allgather_bucket_size,
    )
    try:
        yield
    finally:
        optimizer.update_lp_params()


def _swap_stage_3(optimizer: Any) -> Iterator[None]:
    masters = optimizer.fp32_partitioned_groups_flat

    def install(values: list[Tensor]) -> None:
        for master, value in zip(masters, values, strict=True):
            master.data.copy_(value)
        _reassign_stage_3(optimizer)

    kept = [master.detach().clone() for master in masters]
    install([optimizer.optimizer.state[master][EMA_KEY] for master in masters])
    try:
        yield
    finally:
        install(kept)


def _reassign_stage_3(optimizer: Any) -> None:
    optimizer.checkpoint_event_prologue()  # partitions parameters that were kept whole
    for i in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(i)
    optimizer.checkpoint_event_epilogue()


def consolidated_weights(engine: Any, key: str | None = None) -> dict[str, Tensor]:
    """Gather full fp32 weights, experts in global order. All ranks must call this.

    Args:
        engine: the DeepSpeed engine.
        key: of an average (`EMAAdamW.profiles`); None = the raw weights.

    Returns:
        On rank 0 every parameter by its own name on the CPU (experts stacked: (E, D, D)); empty on
        the other ranks. Names are those of a model built without expert parallelism.
    """
    from deepspeed.moe.utils import is_moe_param

    if not has_averages(engine):
        key = None
    link_states(engine)
    weights = {}
    is_main = torch.distributed.get_rank() == 0
    for name, param in engine.module.named_parameters():
        value = full_value(engine, param, key)
        if is_moe_param(param):
            slots = engine.module.gate.slots[block_of(name)]
            value = gathered_slots(value, param)[slots]
        if is_main:
            weights[name] = value.to("cpu", torch.float32, copy=True)
    return weights


def block_of(name: str) -> int:
    """Return the number of the block that a parameter is in, from its name: blocks.I.anything."""
    return int(name.split(".")[1])


def gathered_slots(value: Tensor, param: Tensor) -> Tensor:
    """Put the slots of all ranks of a group together, (E, ...); all of them must call this.

    Args:
        value: (E / R, ...) of this rank.
        param: the experts' parameter that it is of.
    """
    from deepspeed.utils import groups

    group = groups._get_expert_parallel_group(param.group_name)
    parts = [torch.empty_like(value) for _ in range(group.size())]
    torch.distributed.all_gather(parts, value, group=group)
    return torch.cat(parts)


def link_states(engine: Any) -> None:
    """Let `full_value` find the optimizer state of every parameter.

    DeepSpeed links states to parameters once, after the first group's step, and so leaves later
    groups (the experts) unlinked; linking again is harmless.
    """
    optimizer = engine.optimizer
    if has_averages(engine) and hasattr(optimizer, "_hp_optimizer_states_linked"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def full_value(engine: Any, param: Tensor, key: str | None) -> Tensor:
    """Put together what ZeRO has taken apart, in fp32; all ranks must call this.

    Args:
        engine: the DeepSpeed engine, after `link_states`.
        param: of its module.
        key: of the optimizer's state; None = the parameter itself.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.zero_optimization_stage() == 0:
        value = param if key is None else engine.optimizer.state[param].get(key, param)
    elif key is None:
        value = safe_get_full_fp32_param(param)
    else:
        value = safe_get_full_optimizer_state(param, key)
    return value.detach().float().contiguous()


@torch.no_grad()
def set_full_value(engine: Any, param: Tensor, key: str | None, value: Tensor) -> None:
    """Set this rank's part of what `full_value` puts together; weights follow `renew_weights`.

    Args:
        engine: the DeepSpeed engine, after `link_states`.
        param: of its module.
        key: of the optimizer's state; None = the fp32 master.
        value: whole, fp32.
    """
    from deepspeed import utils

    if engine.zero_optimization_stage() == 0:
        (param if key is None else engine.optimizer.state[param][key]).copy_(value)
        return
    set_master, set_state = utils.safe_set_full_fp32_param, utils.safe_set_full_optimizer_state
    if hasattr(param, "ds_id"):
        # Under ZeRO 3 the last rank's part is padded, which DeepSpeed's own split does not do.
        share = param.ds_tensor.ds_numel
        # Experts that are shared out are sharded over the ranks that hold the same ones.
        rank = torch.distributed.get_rank(group=param.ds_process_group)
        flat = value.flatten()[rank * share :][:share]
        value = torch.nn.functional.pad(flat, (0, share - len(flat)))
        set_master, set_state = (
            utils.safe_set_local_fp32_param,
            utils.safe_set_local_optimizer_state,
        )
    if key is None:
        set_master(param, value)
    else:
        set_state(param, value, key)


@torch.no_grad()
def renew_weights(engine: Any) -> None:
    """Make all weights from their fp32 masters, which were set. All ranks must call this."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        _reassign_stage_3(optimizer)
    elif stage > 0:
        optimizer.update_lp_params()
