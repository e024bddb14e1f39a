"""Count what a configuration amounts to: parameters, FLOPs, memory per rank, steps per epoch.

In closed form: nothing is allocated, whatever the size.
"""

import json
from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from data_tools.errors import count_of
from data_tools.shards.manifest import DatasetManifest
from models.flops import forward_flops, training_flops
from models.matrices import matrix_shapes
from models.network_options import NetworkOptions
from models.switch_dit import MODEL_NAMES
from training.config.deepspeed_config import plan_batch, stage_of
from training.config.network import network_options
from training.config.precision import PRECISION_NAMES, precision_of
from training.config.tree import Config
from training.cost.memory import (
    FP32_BYTES,
    NUM_ADAM_MOMENTS,
    Memory,
    activation_bytes,
    model_memory,
    muon_traffic,
)
from training.engine.build import WIRE_DTYPES, build_model

GIB = 2**30
GIGA = 1e9


class ParameterCount(NamedTuple):
    """Numbers of parameters of the whole model, all experts included."""

    total: int
    trainable: int
    active: int  # with k of E experts, as one sample uses them
    experts: int
    matrices: int  # that Muon would update
    expert_matrices: int  # of them in experts
    parts: dict[str, int]  # by top-level module, experts apart


def count_parameters(config: Config) -> ParameterCount:
    """Count on the meta device: nothing is allocated, whatever the size."""
    parts: Counter[str] = Counter()
    trainable = 0
    with torch.device("meta"):
        named = dict(build_model(config).named_parameters())
    in_matrices = matrix_shapes({name: tuple(param.shape) for name, param in named.items()})
    matrices = {name: named[name].numel() for name in in_matrices}
    for name, param in named.items():
        parts["experts" if ".experts." in name else name.split(".")[0]] += param.numel()
        trainable += param.numel() if param.requires_grad else 0
    experts = parts["experts"]
    idle = experts - experts // config.model.num_experts * config.model.top_k
    return ParameterCount(
        parts.total(),
        trainable,
        active=parts.total() - idle,
        experts=experts,
        matrices=sum(matrices.values()),
        expert_matrices=sum(n for name, n in matrices.items() if ".experts." in name),
        parts=dict(parts),
    )


def num_averages(config: Config) -> int:
    """Return how many averages of the weights a run keeps."""
    return len(config.optim.ema_decays) + len(config.optim.ema_stds)


def checkpoint_bytes(config: Config) -> int:
    """Return an upper estimate of one checkpoint's bytes, over all ranks.

    DeepSpeed writes fp32 weights, masters, moments and averages; the weights and their averages
    are written once more, consolidated.
    """
    averages = num_averages(config)
    num_copies = 2 + NUM_ADAM_MOMENTS + averages + 1 + averages
    return num_copies * FP32_BYTES * count_parameters(config).total


def snapshot_bytes(config: Config) -> int:
    """Return the bytes of the snapshots of averages that one step stores."""
    count = len(config.optim.ema_stds) if config.optim.ema_snapshot_every else 0
    return count * FP32_BYTES * count_parameters(config).total


def describe(
    config: Config,
    deepspeed_config: dict[str, Any],
    world_size: int,
    manifest: DatasetManifest | None = None,
    found: str | None = None,
) -> str:
    """Return the text of --dry-run.

    Args:
        config: the resolved configuration.
        deepspeed_config: from `merge_deepspeed`.
        world_size: number of ranks.
        manifest: the data's description; None = the data is not there (yet).
        found: a line for each data set.
    """
    data = _describe_data(config, manifest)
    return join_sections(
        {"configuration": config.to_yaml().rstrip()}
        | cost_sections(config, deepspeed_config, world_size)
        | {
            "data": data if found is None else f"{found}\n{data}",
            "DeepSpeed": json.dumps(deepspeed_config, indent=2),
        }
    )


def cost_sections(
    config: Config, deepspeed_config: dict[str, Any], world_size: int
) -> dict[str, str]:
    """Describe parameters, FLOPs and memory, one text by title; arguments as in `describe`."""
    count, options = count_parameters(config), network_options(config)
    micro_batch_size = plan_batch(config, world_size).micro_batch_size
    return {
        "model": _describe_model(config, count),
        "FLOPs": _describe_flops(config, options, micro_batch_size),
        "memory per rank": _describe_memory(config, deepspeed_config, world_size, count, options),
    }


def join_sections(sections: dict[str, str]) -> str:
    """Return texts as one, each below its title."""
    return "\n\n".join(f"# {title}\n{text}" for title, text in sections.items())


def _describe_model(config: Config, count: ParameterCount) -> str:
    model = config.model
    lines = [
        f"{MODEL_NAMES[model.routing]}-{model.size}/{model.patch_size}: {count.total:,} "
        f"parameters, {count.trainable:,} of them trainable, {count.experts:,} in experts"
    ]
    if count.experts:
        lines.append(
            f"active per sample ({model.top_k} of {count_of(model.num_experts, 'expert')}): "
            f"{count.active:,}"
        )
    lines += [f"  {part:<12} {number:>13,}" for part, number in count.parts.items()]
    return "\n".join(lines)


def _describe_flops(config: Config, options: NetworkOptions, batch_size: int) -> str:
    """Describe FLOPs per image; those of the gate table are shared by the micro-batch."""
    ways = {"": options}
    if options.has_experts and options.expert_kind == "affine":
        ways = {
            f", experts {way}": replace(options, expert_dispatch=way)
            for way in ("merged", "dispatched")
        }
    lines = [f"GFLOP per image, in micro-batches of {batch_size} (2 per multiply-add)"]
    for way, chosen in ways.items():
        forward = forward_flops(chosen, batch_size).total()
        training = training_flops(chosen, batch_size)
        lines.append(
            f"  forward {forward / batch_size / GIGA:,.2f}, forward and backward "
            f"{training / batch_size / GIGA:,.2f}{way}"
        )
    if config.model.activation_checkpointing:
        lines.append("  one forward more, recomputed for activation checkpointing, on top")
    for part, flops in forward_flops(options, batch_size).items():
        lines.append(f"  {part:<26} {flops / batch_size / GIGA:>10,.3f} forward")
    return "\n".join(lines)


def _describe_memory(
    config: Config,
    deepspeed_config: dict[str, Any],
    world_size: int,
    count: ParameterCount,
    options: NetworkOptions,
) -> str:
    stage, precision = stage_of(deepspeed_config), precision_of(deepspeed_config)
    expert_parallel_size = config.run.expert_parallel_size
    is_muon = config.optim.optimizer == "muon"
    memory = model_memory(
        count.total,
        count.experts,
        stage=stage,
        precision=precision,
        world_size=world_size,
        expert_parallel_size=expert_parallel_size,
        num_averages=num_averages(config),
        num_in_matrices=count.matrices if is_muon else 0,
        num_in_expert_matrices=count.expert_matrices if is_muon else 0,
    )
    lines = [
        f"{world_size} rank(s), ZeRO stage {stage}, {PRECISION_NAMES[precision]}, "
        f"expert-parallel size {expert_parallel_size}, averages: {num_averages(config)}"
    ]
    lines += _memory_lines(memory, deepspeed_config.get("zero_optimization", {}))
    lines += _activation_lines(
        config, options, plan_batch(config, world_size).micro_batch_size, precision
    )
    if is_muon:
        sent = sum(
            muon_traffic(
                number,
                stage=stage,
                num_sharing=sharing,
                wire_bytes=WIRE_DTYPES[config.optim.muon_wire].itemsize,
            )
            for number, sharing in (
                (count.matrices - count.expert_matrices, world_size),
                (count.expert_matrices, world_size // expert_parallel_size),
            )
        )
        lines.append(
            f"Muon updates {count.matrices:,} parameters; for it a rank sends at "
            f"most {sent / GIB:.3f} GiB per step"
        )
    lines.append("Communication buckets, the loss's own tensors and the framework come on top.")
    return "\n".join(lines)


def _memory_lines(memory: Memory, zero: dict[str, Any]) -> list[str]:
    keys = {
        "weights": "offload_param",
        "gradients": "offload_optimizer",
        "optimizer": "offload_optimizer",
    }
    lines = []
    for part, size in memory._asdict().items():
        is_offloaded = (zero.get(keys[part]) or {}).get("device", "none") != "none"
        place = " (offloaded from the accelerator)" if is_offloaded else ""
        lines.append(f"  {part:<12} {size / GIB:>9.3f} GiB{place}")
    lines.append(f"  {'sum':<12} {sum(memory) / GIB:>9.3f} GiB")
    return lines


def _activation_lines(
    config: Config, options: NetworkOptions, batch_size: int, precision: str
) -> list[str]:
    lines = [f"activations of a micro-batch of {batch_size}, uncompiled (* = as configured)"]
    for is_recomputing, name in ((False, "kept"), (True, "with activation checkpointing")):
        chosen = replace(options, activation_checkpointing=is_recomputing)
        size = activation_bytes(chosen, batch_size, precision=precision)
        mark = "*" if chosen == options else " "
        lines.append(f"{mark} {name:<30} {sum(size) / GIB:>9.3f} GiB")
    return lines


def _describe_data(config: Config, manifest: DatasetManifest | None) -> str:
    batch, max_steps = config.optim.global_batch_size, config.run.max_steps
    if manifest is None:
        return f"{config.data.data} is not there yet: steps per epoch unknown, {max_steps:,} steps"
    steps = manifest.num_samples / batch
    return (
        f"together {manifest.num_samples:,} samples, {count_of(manifest.num_classes, 'class')}; "
        f"{steps:,.1f} steps of {batch} per epoch, {max_steps:,} steps = "
        f"{max_steps / steps:,.1f} epochs"
    )
