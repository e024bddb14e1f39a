"""List the layouts with which a number of ranks can train a configuration, the fastest first."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cost_model import Layout, Prediction, Workload, fits, predict
from benchmarks.hardware import GIB, Machine
from benchmarks.routing_shares import prior_shares
from data_tools.errors import ConfigError
from training.config.deepspeed_config import merge_deepspeed, plan_batch, stage_of
from training.config.network import network_options
from training.config.precision import Hardware, precision_of
from training.config.tree import Config
from training.config.validation import validate
from training.cost.closed_forms import count_parameters, num_averages
from training.cost.memory import WEIGHT_BYTES

BYTES_OF = {"fp32": 4, "fp16": 2, "bf16": 2, "bfp16": 2}  # communication_data_type
DEFAULT_BUCKET = 5e8  # DeepSpeed's


class Search(NamedTuple):
    """What may be chosen.

    Attributes:
        files: DeepSpeed JSON files.
        group_sizes: expert-parallel sizes; None = all that divide the experts and the ranks.
        images_per_gpu: the global batch over the ranks; None = the configuration's global batch.
    """

    files: list[Path]
    group_sizes: list[int] | None = None
    images_per_gpu: int | None = None


class Outcome(NamedTuple):
    """The layouts that a number of ranks can use, or why there are none."""

    predictions: list[Prediction]  # that fit into memory, the fastest first
    problem: str  # why there are none


def workload_of(config: Config) -> Workload:
    """Return what the cost model needs of a configuration."""
    count = count_parameters(config)
    return Workload(
        network=network_options(config),
        num_parameters=count.total,
        num_in_experts=count.experts,
        num_averages=num_averages(config),
    )


def explore(
    config: Config, work: Workload, world_size: int, machine: Machine, search: Search
) -> Outcome:
    """Predict every layout of a number of ranks.

    Args:
        config: the configuration.
        work: what the cost model needs of the configuration.
        world_size: ranks.
        machine: on which they run.
        search: what may be chosen.
    """
    given = config
    if search.images_per_gpu is not None:
        batch = search.images_per_gpu * world_size
        config = _replace(config, "optim", global_batch_size=batch)
    fitting, least, refusal = [], None, ""
    for path in search.files:
        for size in search.group_sizes or _divisors(config.model.num_experts):
            one = _replace(config, "run", expert_parallel_size=size)
            try:
                validate(one, path, world_size)
                plan_batch(config, world_size)
            except ConfigError as err:
                refusal = refusal or str(err)
                continue
            for layout in layouts_of(one, path, world_size, machine):
                prediction = predict(work, layout, machine, prior_shares(given, size))
                if fits(prediction, machine):
                    fitting.append(prediction)
                elif least is None or prediction.memory_bytes < least:
                    least = prediction.memory_bytes
    fitting.sort(key=lambda prediction: prediction.sec)
    problem = refusal
    if least is not None:
        problem = (
            f"needs at least {least / GIB:.1f} GiB of {machine.memory_gib:g} GiB, "
            f"{machine.reserved_gib:g} of them reserved"
        )
    return Outcome(fitting, "" if fitting else problem)


def layouts_of(config: Config, path: Path, world_size: int, machine: Machine) -> Iterator[Layout]:
    """List the micro-batches that a valid configuration can be trained with.

    Args:
        config: the configuration; its micro-batch size, if it states one, is the only one.
        path: the DeepSpeed JSON file.
        world_size: ranks.
        machine: decides what "auto" precision is.
    """
    local = config.optim.global_batch_size // world_size
    sizes = [config.optim.micro_batch_size] if config.optim.micro_batch_size else _divisors(local)
    for micro in sizes:
        one = _replace(config, "optim", micro_batch_size=micro)
        merged = merge_deepspeed(path, one, world_size, Hardware(machine.name, machine.has_bf16))
        yield layout_of(one, merged, world_size)


def layout_of(config: Config, merged: dict[str, Any], world_size: int) -> Layout:
    """Return what the cost model needs of a merged DeepSpeed configuration."""
    zero, precision, stage = merged["zero_optimization"], precision_of(merged), stage_of(merged)
    plan = plan_batch(config, world_size)
    dtype = merged.get("communication_data_type")
    # bf16 at stage 1 is DeepSpeed's BF16_Optimizer, which reduces after the backward pass.
    is_late = stage == 0 or (stage == 1 and precision == "bf16")
    return Layout(
        world_size=world_size,
        stage=stage,
        expert_parallel_size=config.run.expert_parallel_size,
        micro_batch_size=plan.micro_batch_size,
        accumulation=plan.gradient_accumulation_steps,
        precision=precision,
        gradient_bytes=BYTES_OF[dtype] if dtype else WEIGHT_BYTES[precision],
        bucket_size=zero.get("reduce_bucket_size", DEFAULT_BUCKET),
        is_overlapping=not is_late and zero.get("overlap_comm", stage == 3) is not False,
    )


def best_of_each_kind(predictions: list[Prediction]) -> list[Prediction]:
    """Keep the fastest micro-batch of every stage and expert-parallel size."""
    best: dict[tuple[int, int], Prediction] = {}
    for prediction in predictions:  # the fastest come first
        kind = (prediction.layout.stage, prediction.layout.expert_parallel_size)
        best.setdefault(kind, prediction)
    return list(best.values())


def _divisors(number: int) -> list[int]:
    return [i for i in range(1, number + 1) if number % i == 0]


def _replace(config: Config, section: str, **changes: Any) -> Config:
    part = dataclasses.replace(getattr(config, section), **changes)
    return dataclasses.replace(config, **{section: part})
