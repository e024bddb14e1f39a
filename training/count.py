"""What a configuration amounts to: parameters, memory per rank, steps per epoch (--dry-run)."""

import json
from collections import Counter
from typing import Any, NamedTuple

import torch

from training.config import Config
from training.deepspeed_config import stage_of
from training.engine import build_model
from training.precision import PRECISION_NAMES, precision_of
from training.validation import Dataset

FP32_BYTES = 4
WEIGHT_BYTES = {"fp32": 4, "autocast": 4, "bf16": 2}
NUM_ADAM_STATES = 3  # two moments and the averaged weights, fp32
GIB = 2**30


class ParameterCount(NamedTuple):
    """Numbers of parameters of the whole model, all experts included."""

    total: int
    trainable: int
    experts: int
    parts: dict[str, int]  # by top-level module, experts apart


def count_parameters(config: Config) -> ParameterCount:
    """Count on the meta device: nothing is allocated, whatever the size."""
    with torch.device("meta"):
        model = build_model(config)
    parts: Counter[str] = Counter()
    trainable = 0
    for name, param in model.named_parameters():
        parts["experts" if ".experts." in name else name.split(".")[0]] += param.numel()
        trainable += param.numel() if param.requires_grad else 0
    return ParameterCount(parts.total(), trainable, parts["experts"], dict(parts))


class Memory(NamedTuple):
    """Bytes of a rank that grow with the model: no activations, no communication buckets."""

    weights: float
    gradients: float
    optimizer: float  # fp32 masters, Adam's moments, averaged weights


def memory_per_rank(
    count: ParameterCount,
    *,
    stage: int,
    precision: str,
    world_size: int,
    expert_parallel_size: int,
) -> Memory:
    """Compute what ZeRO leaves on each rank.

    With D dense and X expert parameters, W ranks and expert-parallel size R, a rank holds
    D + X / R parameters. What ZeRO shards, it shards over W ranks (dense) or over the W / R ranks
    that hold the same experts: (D + X) / W either way. Stage 1 shards the optimizer, 2 also the
    gradients, 3 also the weights. Gradients accumulate in fp32. ZeRO keeps fp32 masters apart
    from the weights even when those are fp32; stage 0 has fp32 weights and no others.

    Args:
        count: of the whole model.
        stage: ZeRO stage.
        precision: "bf16", "autocast" or "fp32".
        world_size: W.
        expert_parallel_size: R.
    """
    held = (count.total - count.experts) + count.experts / expert_parallel_size
    shard = count.total / world_size
    num_fp32_states = NUM_ADAM_STATES + (1 if stage > 0 else 0)
    return Memory(
        weights=WEIGHT_BYTES[precision] * (shard if stage >= 3 else held),
        gradients=FP32_BYTES * (shard if stage >= 2 else held),
        optimizer=FP32_BYTES * num_fp32_states * (shard if stage >= 1 else held),
    )


def checkpoint_bytes(config: Config) -> int:
    """Return about how many bytes one checkpoint takes, over all ranks and at most.

    fp32 weights, masters, two moments and the average as DeepSpeed writes them, and the weights
    and their average once more, consolidated.
    """
    return (2 + 1 + NUM_ADAM_STATES + 1) * FP32_BYTES * count_parameters(config).total


def describe(
    config: Config,
    deepspeed_config: dict[str, Any],
    world_size: int,
    manifest: Dataset | None = None,
) -> str:
    """Return the text of --dry-run.

    Args:
        config: the resolved configuration.
        deepspeed_config: from `merge_deepspeed`.
        world_size: number of ranks.
        manifest: the data's description; None = the data is not there (yet).
    """
    count = count_parameters(config)
    sections = {
        "configuration": config.to_yaml().rstrip(),
        "model": _describe_model(config, count),
        "memory per rank": _describe_memory(config, deepspeed_config, world_size, count),
        "data": _describe_data(config, manifest),
        "DeepSpeed": json.dumps(deepspeed_config, indent=2),
    }
    return "\n\n".join(f"# {title}\n{text}" for title, text in sections.items())


def _describe_model(config: Config, count: ParameterCount) -> str:
    lines = [
        f"Switch-DiT-{config.model.size}/{config.model.patch_size}: {count.total:,} parameters, "
        f"{count.trainable:,} of them trainable, {count.experts:,} in experts"
    ]
    lines += [f"  {part:<12} {number:>13,}" for part, number in count.parts.items()]
    return "\n".join(lines)


def _describe_memory(
    config: Config, deepspeed_config: dict[str, Any], world_size: int, count: ParameterCount
) -> str:
    stage, precision = stage_of(deepspeed_config), precision_of(deepspeed_config)
    zero = deepspeed_config.get("zero_optimization", {})
    expert_parallel_size = config.run.expert_parallel_size
    memory = memory_per_rank(
        count,
        stage=stage,
        precision=precision,
        world_size=world_size,
        expert_parallel_size=expert_parallel_size,
    )
    offloaded = {
        "weights": _is_offloaded(zero, "offload_param"),
        "gradients": _is_offloaded(zero, "offload_optimizer"),
        "optimizer": _is_offloaded(zero, "offload_optimizer"),
    }
    lines = [
        f"{world_size} rank(s), ZeRO stage {stage}, {PRECISION_NAMES[precision]}, "
        f"expert-parallel size {expert_parallel_size}"
    ]
    for part, size in memory._asdict().items():
        place = " (offloaded from the accelerator)" if offloaded[part] else ""
        lines.append(f"  {part:<12} {size / GIB:>9.3f} GiB{place}")
    lines.append(f"  {'sum':<12} {sum(memory) / GIB:>9.3f} GiB")
    lines.append("Activations, communication buckets and the framework itself come on top.")
    return "\n".join(lines)


def _is_offloaded(zero: dict[str, Any], key: str) -> bool:
    return (zero.get(key) or {}).get("device", "none") != "none"


def _describe_data(config: Config, manifest: Dataset | None) -> str:
    batch, max_steps = config.optim.global_batch_size, config.run.max_steps
    if manifest is None:
        return f"{config.data.data} is not there yet: steps per epoch unknown, {max_steps:,} steps"
    steps = manifest.num_samples / batch
    return (
        f"{config.data.data}: {manifest.num_samples:,} samples, {manifest.num_classes} classes; "
        f"{steps:,.1f} steps of {batch} per epoch, {max_steps:,} steps = "
        f"{max_steps / steps:,.1f} epochs"
    )
