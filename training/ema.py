"""Exponential moving average of the weights, kept as optimizer state.

The average lives beside Adam's moments, one fp32 value per fp32 master weight, so ZeRO shards,
saves and restores it like any other optimizer state, experts included.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

EMA_KEY = "ema"


class EMAAdamW(torch.optim.AdamW):
    """AdamW whose state also holds an average of each parameter under `EMA_KEY`.

    Args:
        params: parameters or groups, as for AdamW.
        ema_decay: weight of the old average per optimizer step.
        ema_warmup: use min(ema_decay, (1 + step) / (10 + step)), so that the random start is
            forgotten early (step counts from 0).
        kwargs: AdamW's.
    """

    def __init__(
        self, params: Any, *, ema_decay: float, ema_warmup: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(params, **kwargs)
        for group in self.param_groups:
            group["ema_decay"], group["ema_warmup"] = ema_decay, ema_warmup
        self.defaults.update(ema_decay=ema_decay, ema_warmup=ema_warmup)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update the parameters, then their averages.

        ZeRO calls this once per parameter group, so the decay is read from each parameter's own
        step count and never from a counter of calls.
        """
        assert closure is None, "DeepSpeed passes no closure"
        touched = [
            (p, group) for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        # Adam initialises only an empty state, so the first average is kept aside until it has.
        first = {p: p.detach().clone() for p, _ in touched if EMA_KEY not in self.state[p]}
        super().step()
        for p, group in touched:
            state = self.state[p]
            if p in first:
                state[EMA_KEY] = first[p]
            state[EMA_KEY].lerp_(p, 1.0 - _decay(group, state["step"]))


def _decay(group: dict[str, Any], steps_done: Tensor) -> float:
    if not group["ema_warmup"]:
        return group["ema_decay"]
    step = int(steps_done) - 1
    return min(group["ema_decay"], (1 + step) / (10 + step))


@contextmanager
def ema_weights(engine: Any) -> Iterator[None]:
    """Let the engine's module compute with the averaged weights. All ranks must enter and leave.

    fp32 masters and optimizer state stay untouched; afterwards the weights are bit-identical to
    before. Must not be entered before the first optimizer step, nor around a checkpoint.
    """
    stage = engine.zero_optimization_stage()
    swap = {0: _swap_stage_0, 3: _swap_stage_3}.get(stage, _swap_stage_1_2)
    with torch.no_grad():
        yield from swap(engine.optimizer)


def _swap_stage_0(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [p.detach().clone() for p in params]
    for p in params:
        p.copy_(optimizer.state[p][EMA_KEY])
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
        optimizer.checkpoint_event_prologue()  # partitions parameters that were kept whole
        for i, (master, value) in enumerate(zip(masters, values, strict=True)):
            master.data.copy_(value)
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        optimizer.checkpoint_event_epilogue()

    kept = [master.detach().clone() for master in masters]
    install([optimizer.optimizer.state[master][EMA_KEY] for master in masters])
    try:
        yield
    finally:
        install(kept)


def consolidated_weights(engine: Any, *, ema: bool) -> dict[str, Tensor]:
    """Gather full fp32 weights, averaged or raw, experts in global order. All ranks must call this.

    Returns:
        On rank 0 every parameter by its own name on the CPU (experts stacked: (E, D, D)); empty on
        the other ranks. Names are those of a model built without expert parallelism.
    """
    from deepspeed.moe.utils import is_moe_param
    from deepspeed.utils import groups

    optimizer = engine.optimizer
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        # DeepSpeed links states to parameters once, after the first group's step, and so leaves
        # later groups (the experts) unlinked; linking again is harmless.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    weights = {}
    is_main = torch.distributed.get_rank() == 0
    for name, param in engine.module.named_parameters():
        value = _full_value(engine, param, ema)
        if is_moe_param(param):
            group = groups._get_expert_parallel_group(param.group_name)
            parts = [torch.empty_like(value) for _ in range(group.size())]
            torch.distributed.all_gather(parts, value, group=group)
            value = torch.cat(parts)
        if is_main:
            weights[name] = value.detach().to("cpu", torch.float32, copy=True)
    return weights


def _full_value(engine: Any, param: Tensor, ema: bool) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.zero_optimization_stage() == 0:
        value = engine.optimizer.state[param][EMA_KEY] if ema else param.detach()
    elif ema:
        value = safe_get_full_optimizer_state(param, EMA_KEY)
    else:
        value = safe_get_full_fp32_param(param)
    return value.float().contiguous()
