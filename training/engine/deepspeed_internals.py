"""Everything that rests on the insides of DeepSpeed 0.19.8: names that it does not document.

No other file of training/engine and above knows such a name. When the pin in requirements.txt
changes, tests/training/engine/test_deepspeed_internals.py says which of them has moved.

ZeRO packs parts of parameters into flat fp32 tensors, the masters. Adam's moments and the averages
lie beside them, as tensors of the same shape, in the state of our optimizer.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from training.engine.interface import Engine
from training.engine.optimizer import IS_MATRIX, EMAAdamW

# Classes of DeepSpeed's whose objects are pickled in its checkpoint files.
PICKLED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon, which it wants to know of and we never use, without Inductor.

    Muon compiles functions when it is imported. That imports the whole compiler: seconds at the
    start of every process.
    """
    from deepspeed.runtime import compiler

    compile_as_usual = compiler.compile
    compiler.compile = lambda *_args, **_kwargs: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compile_as_usual


def silence_memory_lines() -> None:
    """Keep ZeRO 1 in bf16 from printing a dozen lines of memory while an engine is built."""
    from deepspeed.runtime import bf16_optimizer

    bf16_optimizer.see_memory_usage = lambda *_, **__: None


def expert_group(param: Tensor) -> ProcessGroup | None:
    """Return the ranks that share a parameter's experts out; None if every rank has all of it."""
    from deepspeed.moe.utils import is_moe_param
    from deepspeed.utils import groups

    return groups._get_expert_parallel_group(param.group_name) if is_moe_param(param) else None


class Part(NamedTuple):
    """`numel` values of a parameter from `start` on, at `offset` of master number `master`."""

    param: Tensor
    master: int
    offset: int
    start: int  # within this rank's values of the parameter: all of it, or of its experts
    numel: int


def base_optimizer(engine: Engine) -> EMAAdamW:
    """Return our optimizer, from inside ZeRO's."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def masters(engine: Engine) -> list[Tensor]:
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


def holds_matrices(engine: Engine) -> list[bool]:
    """Tell for each of the masters whether Muon updates it; equal on all ranks."""
    groups = base_optimizer(engine).param_groups
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [bool(group.get(IS_MATRIX)) for group in groups for _ in group["params"]]
    numbers = engine.optimizer.sub_group_to_group_id if stage == 3 else range(len(groups))
    return [bool(groups[numbers[i]].get(IS_MATRIX)) for i in range(len(masters(engine)))]


def master_groups(engine: Engine) -> list[ProcessGroup | None]:
    """Return, for each of the masters, the ranks that share it; None if this rank has all of it."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        return [None] * len(masters(engine))
    if stage == 3:
        groups = optimizer.fp16_groups
    else:
        groups = getattr(optimizer, "bit16_groups", None) or optimizer.bf16_groups
    return [sharding_group(group[0]) for group in groups]


def parts(engine: Engine) -> Iterator[Part]:
    """List what this rank's masters hold."""
    find = {0: _whole, 3: _of_stage_3}.get(engine.zero_optimization_stage(), _of_stages_1_2)
    return find(engine)


def _whole(engine: Engine) -> Iterator[Part]:
    for i, param in enumerate(masters(engine)):
        yield Part(param, i, 0, 0, param.numel())


def _of_stages_1_2(engine: Engine) -> Iterator[Part]:
    optimizer = engine.optimizer
    groups = getattr(optimizer, "bit16_groups", None) or optimizer.bf16_groups
    for i, group in enumerate(groups):
        for param in group:
            if (mapping := param._hp_mapping) is not None:  # else other ranks have all of it
                there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield Part(param, i, here.start, there.start, there.numel)


def _of_stage_3(engine: Engine) -> Iterator[Part]:
    for i, group in enumerate(engine.optimizer.fp16_groups):
        offset = 0
        for param in group:
            share = param.ds_tensor.ds_numel
            start = share * torch.distributed.get_rank(group=param.ds_process_group)
            numel = min(share, param.ds_numel - start)
            if numel > 0:  # the last ranks' parts may be padding only
                yield Part(param, i, offset, start, numel)
            offset += share


def unsharded_shape(param: Tensor) -> torch.Size:
    """Return the shape of this rank's values of a parameter, which ZeRO 3 leaves empty."""
    return getattr(param, "ds_shape", param.shape)


def sharding_group(param: Tensor) -> ProcessGroup | None:
    """Return the ranks that hold the parts of a parameter; None if this rank holds all of it."""
    return getattr(param, "ds_process_group", None) or getattr(param, "_dp_group", None)


def make_steps_lean(engine: Engine) -> None:
    """Do at once for all parameters what ZeRO 1 and 2 do for one after the other.

    On a GPU every operation is a launch, and DeepSpeed's ZeRO 2 needs 5,800 for a step of XL. What
    replaces them computes the same numbers. ZeRO 1 in bf16 is another class, and left as it is, and
    so is an optimizer in the host's memory.
    """
    optimizer = engine.optimizer
    if not hasattr(optimizer, "single_partition_of_fp32_groups") or optimizer.cpu_offload:
        return
    # It looks for NaN and inf in every gradient. Their norm is not finite exactly then, and
    # DeepSpeed looks at it next.
    optimizer.check_overflow = lambda partition_gradients=True: None
    optimizer.get_grad_norm_direct = partial(_norm_of_all, optimizer)
    optimizer.unscale_and_clip_grads = partial(_clip, optimizer)
    usual = optimizer.allreduce_and_copy_with_multiple_ranks
    optimizer.allreduce_and_copy_with_multiple_ranks = partial(_average_and_add, optimizer, usual)


@torch.no_grad()
def _norm_of_all(
    optimizer: Any, gradients: list[Tensor], _params: list[Tensor], norm_type: int = 2
) -> Tensor:
    """Return the norm of a group's gradients over all ranks, -1 if it is not finite.

    Args:
        optimizer: ZeRO's.
        gradients: this rank's and zeros between them; in bf16 views of one flat tensor.
        norm_type: 2.
    """
    assert norm_type == 2, "DeepSpeed uses no other"
    flat = getattr(gradients, "flat_partition", None)
    parts = list(gradients) if flat is None else [flat]
    norms = torch._foreach_norm(parts, 2, dtype=torch.float64)
    total = torch.stack(norms).square().sum().float()
    torch.distributed.all_reduce(total, group=optimizer.dp_process_group)
    norm = total.sqrt()
    return torch.where(norm.isfinite(), norm, -1.0)


@torch.no_grad()
def _clip(optimizer: Any, gradients: list[Tensor], total_norm: Tensor) -> None:
    """Scale gradients down to the greatest norm that is allowed; the norm is finite.

    DeepSpeed would ask for that a second time, for which the host waits.
    """
    assert optimizer.loss_scale == 1.0, "only fp16 scales losses"
    if optimizer.clip_grad > 0:
        ratio = torch.clamp((total_norm + 1e-6) / optimizer.clip_grad, min=1.0)
        torch._foreach_mul_(gradients, 1.0 / ratio)


def _average_and_add(
    optimizer: Any, usual: Callable[..., None], bucket: list[Tensor], dtype: torch.dtype, **how: Any
) -> None:
    """Average gradients over ranks, and add those of this rank to what it has accumulated.

    Args:
        optimizer: ZeRO's.
        usual: what DeepSpeed does instead.
        bucket: the gradients.
        dtype: in which they are sent.
        how: for `usual`. Of each gradient, `bucket_ranks` are the ranks that need it, and
            `output_bucket` is what this rank adds it to, None on other ranks.
    """
    ranks, sums = how.pop("bucket_ranks"), how.pop("output_bucket", None) or [None] * len(bucket)
    rank = torch.distributed.get_rank(group=how["process_group"])
    if any(into is None and rank in needed for needed, into in zip(ranks, sums, strict=True)):
        usual(bucket, dtype, bucket_ranks=ranks, output_bucket=sums, **how)
        return
    averages = optimizer.unflatten(optimizer.allreduce_bucket(bucket, dtype, **how), bucket)
    pairs = [(into, new) for into, new in zip(sums, averages, strict=True) if into is not None]
    if pairs:
        torch._foreach_add_(*map(list, zip(*pairs, strict=True)))


@torch.no_grad()
def renew_weights(engine: Engine) -> None:
    """Make all weights from their fp32 masters, which were set. All ranks must call this."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        optimizer.checkpoint_event_prologue()  # partitions parameters that were kept whole
        for i in range(len(masters(engine))):
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        optimizer.checkpoint_event_epilogue()
    elif stage > 0:
        optimizer.update_lp_params()


def drop_skipped_gradients(engine: Engine) -> None:
    """Forget the gradients of a step that ZeRO left out.

    With an offloaded optimizer in bf16, ZeRO 2 keeps them after such a step and adds the next ones
    to them, so that no later step is finite either.
    """
    partitions = getattr(engine.optimizer, "averaged_gradients", None)
    if partitions and hasattr(engine.optimizer, "accumulated_grads_in_cpu"):
        for group in partitions:
            partitions[group] = None


def save_through(
    engine: Engine,
    save: Callable[[str, dict[str, Any]], None],
    tag: str,
    client_state: dict[str, Any],
) -> None:
    """Have the engine save a checkpoint, and write nothing. All ranks must call this.

    Args:
        engine: the DeepSpeed engine.
        save: takes the name of each file of this rank and its content.
        tag: of the checkpoint.
        client_state: what else is in it.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    class Saver(TorchCheckpointEngine):
        def save(self, state_dict: dict[str, Any], path: str) -> None:
            save(Path(path).name, state_dict)

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            pass

        def preserves_storage_sharing(self) -> bool:
            return False  # DeepSpeed need not copy parts of larger tensors first: `save` does

    engine._copy_recovery_script = lambda save_path: None  # two scripts that cannot read experts
    with _checkpoint_engine(engine, Saver()):
        engine.save_checkpoint("unused", tag=tag, client_state=client_state, save_latest=False)


def load_through(engine: Engine, load: Callable[[Path, Any], Any], folder: Path) -> dict[str, Any]:
    """Have the engine load a checkpoint of its own layout. All ranks must call this.

    Args:
        engine: the DeepSpeed engine.
        load: reads a file, with torch's `map_location`.
        folder: of the checkpoint.

    Returns:
        The client state.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    class Loader(TorchCheckpointEngine):
        def load(self, path: str, map_location: Any = None) -> Any:
            return load(folder / Path(path).name, map_location)

    with _checkpoint_engine(engine, Loader()), _plain_name(folder.parent) as parent:
        path, client_state = engine.load_checkpoint(parent, tag=folder.name)
    assert path is not None, f"DeepSpeed loaded nothing from {folder}"
    return client_state


@contextmanager
def _checkpoint_engine(engine: Engine, ours: Any) -> Iterator[None]:
    """Let DeepSpeed's engine read and write checkpoints by another object for a while."""
    previous, engine.checkpoint_engine = engine.checkpoint_engine, ours
    try:
        yield
    finally:
        engine.checkpoint_engine = previous


@contextmanager
def _plain_name(folder: Path) -> Iterator[str]:
    """Give a folder a name without brackets for a while: DeepSpeed takes paths for patterns."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
