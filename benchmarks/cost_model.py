"""Predict the time and memory of a training step on many ranks, from sizes and constants.

A step is products at a rate, memory-bound work at the memory's bandwidth, and collectives on links
with a bandwidth and a latency. DeepSpeed 0.19.8 does this: stages 0 and 1 all-reduce the gradients
once a step; stage 2 all-reduces them in every micro-step (each rank keeps its part of the sum);
stage 3 reduce-scatters them in every micro-step and gathers the weights twice; stages 1 and 2
gather the weights after the step. Gradients of experts travel among the W / R ranks that hold the
same experts.

N samples of a micro-batch, T tokens, D width, L blocks, E experts, K experts per sample, W ranks,
R ranks of an expert-parallel group.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from benchmarks.collectives import ALL_GATHER, ALL_REDUCE, Group, Transfer, exchange, group_of, ring
from benchmarks.hardware import GIB, GIGA, MICRO, Machine, shared_machine
from benchmarks.routing_shares import RoutingShares
from models.flops import are_experts_merged, forward_flops, training_flops
from models.network_options import NetworkOptions
from training.cost.memory import FP32_BYTES, WEIGHT_BYTES, activation_bytes, model_memory

# Crossings of the memory bus, in units of the bytes of what is updated or copied.
ACCUMULATION_PASSES = 3  # read the sum and the new gradient, write the sum
BUCKET_PASSES = 5  # into a bucket, divided there, and its part out again
ADAM_PASSES, AVERAGE_PASSES = 7, 3  # weight, gradient, two moments; an average and its weight
MASTER_PASSES = 2  # from fp32 masters to the weights


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is trained; the same for all layouts.

    Attributes:
        network: its options, with experts on one rank.
        num_parameters: of all parameters, all experts included.
        num_in_experts: of those, in experts.
        num_averages: of the weights.
    """

    network: NetworkOptions
    num_parameters: int
    num_in_experts: int
    num_averages: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How it is trained.

    Attributes:
        world_size: W.
        stage: of ZeRO.
        expert_parallel_size: R.
        micro_batch_size: N.
        accumulation: micro-steps of a step.
        precision: "bf16", "autocast" or "fp32".
        gradient_bytes: of a gradient on its way to the other ranks.
        bucket_size: gradients of a collective.
        is_overlapping: gradients travel during the backward pass.
    """

    world_size: int
    stage: int
    expert_parallel_size: int
    micro_batch_size: int
    accumulation: int
    precision: str
    gradient_bytes: int = FP32_BYTES
    bucket_size: float = 5e7
    is_overlapping: bool = True

    @property
    def global_batch_size(self) -> int:
        """Samples of a step."""
        return self.world_size * self.micro_batch_size * self.accumulation


class Prediction(NamedTuple):
    """What the model says about a layout.

    Attributes:
        layout: which.
        parts: seconds of a step by cause; what is hidden behind computing is not in it.
        memory_bytes: of a rank.
        node_bytes: sent by a rank within its node, per step.
        net_bytes: sent by a rank to other nodes, per step.
    """

    layout: Layout
    parts: dict[str, float]
    memory_bytes: float
    node_bytes: float
    net_bytes: float

    @property
    def sec(self) -> float:
        """Of a step."""
        return sum(self.parts.values())

    @property
    def images_per_sec(self) -> float:
        """Over all ranks."""
        return self.layout.global_batch_size / self.sec

    @property
    def bottleneck(self) -> str:
        """The largest part."""
        return max(self.parts, key=self.parts.__getitem__)


def expert_flops(work: Workload, num_samples: int, routing: RoutingShares) -> tuple[float, float]:
    """Count the forward pass of the experts of all blocks on a rank: mean, and slowest rank's."""
    if not work.network.has_experts:
        return 0.0, 0.0
    R = routing.group_size
    merged = are_experts_merged(replace(work.network, expert_parallel_size=R))
    of_rank = replace(
        work.network,
        depth=1,
        num_experts=work.network.num_experts // R,
        top_k=1,
        expert_dispatch="merged" if merged else "dispatched",
    )
    # Merged, a product for each sample that arrives; else one for each use of an expert.
    counts = num_samples * R * (routing.arrivals if merged else routing.uses)  # (L, R)
    per_sample = forward_flops(of_rank, 1)["experts"]
    flops = per_sample * counts
    return float(flops.mean(1).sum()), float(flops.max(1).sum())


def memory_bytes(work: Workload, layout: Layout, routing: RoutingShares) -> float:
    """Return the bytes of a rank: those of training/cost/memory.py and the rows exchanged."""
    model = model_memory(
        work.num_parameters,
        work.num_in_experts,
        stage=layout.stage,
        precision=layout.precision,
        world_size=layout.world_size,
        expert_parallel_size=layout.expert_parallel_size,
        num_averages=work.num_averages,
    )
    network = replace(work.network, expert_parallel_size=layout.expert_parallel_size)
    activations = activation_bytes(network, layout.micro_batch_size, precision=layout.precision)
    return sum(model) + sum(activations) + _exchanged_bytes(work, layout, routing)


def _exchanged_bytes(work: Workload, layout: Layout, routing: RoutingShares) -> float:
    """Count what is kept of the rows that a rank receives: they enter experts, and leave them."""
    if routing.group_size == 1:
        return 0.0
    samples = layout.micro_batch_size * routing.group_size * routing.arrivals.max(1)  # (L,)
    kept = samples.max() if work.network.activation_checkpointing else samples.sum()
    return 2 * float(kept) * _row_bytes(work.network, layout)


def _row_bytes(network: NetworkOptions, layout: Layout) -> int:
    of_number = FP32_BYTES if layout.precision == "fp32" else 2
    return network.num_tokens * network.hidden_size * of_number


def predict(work: Workload, layout: Layout, machine: Machine, routing: RoutingShares) -> Prediction:
    """Predict a step of a layout."""
    machine = shared_machine(machine, layout.world_size)
    parts = _computing(work, layout, machine, routing)
    backward_sec = 2 / 3 * sum(parts.values())
    hiding_sec = machine.overlap * backward_sec
    moved = Transfer()
    if layout.expert_parallel_size > 1:
        # There and back, forward and backward; recomputation goes forward twice.
        ways = 6 if work.network.activation_checkpointing else 4
        rows = exchange(
            _row_bytes(work.network, layout), layout.micro_batch_size, routing, machine
        ).times(ways)
        parts["all-to-all"], moved = rows.sec, rows
    gradients = _gradients(work, layout, machine)
    can_hide = layout.is_overlapping and layout.stage in (1, 2, 3)
    parts["gradients"] = _exposed(gradients.sec, hiding_sec if can_hide else 0.0, machine)
    moved = moved.plus(gradients)
    if layout.stage == 3:
        weights = _weights(work, layout, machine).times(2)
        # Gathered ahead of the block, in the forward pass too, beside the gradients' way.
        left_sec = max(0.0, 1.5 * hiding_sec - (gradients.sec - parts["gradients"]))
        parts["weights"] = _exposed(weights.sec, left_sec, machine)
        parts["weights"] += work.network.depth * machine.gather_overhead_us * MICRO
        moved = moved.plus(weights)
    steps = layout.accumulation
    if layout.stage < 2:  # gradients of all micro-steps travel together
        parts = {k: v * (1 if k == "gradients" else steps) for k, v in parts.items()}
        moved = moved.times(steps).plus(gradients.times(1 - steps))
    else:
        parts, moved = {k: v * steps for k, v in parts.items()}, moved.times(steps)
    parts["optimizer"] = _optimizer_sec(work, layout, machine)
    if layout.stage in (1, 2):
        weights = _weights(work, layout, machine)
        parts["weights"], moved = weights.sec, moved.plus(weights)
    memory = memory_bytes(work, layout, routing)
    return Prediction(layout, parts, memory, moved.node_bytes, moved.net_bytes)


def _exposed(sec: float, hiding_sec: float, machine: Machine) -> float:
    """Return what is left of a transfer's time if its share `overlap` may hide, this long."""
    return sec - min(machine.overlap * sec, hiding_sec)


def _computing(
    work: Workload, layout: Layout, machine: Machine, routing: RoutingShares
) -> dict[str, float]:
    """Return the seconds of a micro-step's forward and backward pass, by cause."""
    network, N = work.network, layout.micro_batch_size
    rate = machine.products_per_sec(layout.precision, network.hidden_size)
    forward = forward_flops(network, N)
    dense = training_flops(network, N) - 3 * forward["experts"]
    on_rank = replace(
        network,
        activation_checkpointing=False,
        expert_parallel_size=layout.expert_parallel_size,
    )
    kept = activation_bytes(on_rank, N, precision=layout.precision).kept
    passes, expert_passes = machine.pointwise_passes, 3
    if work.network.activation_checkpointing:
        dense += sum(flops for part, flops in forward.items() if part.startswith("blocks"))
        passes, expert_passes = 1.5 * passes, 4
    mean, worst = expert_flops(work, N, routing)
    held = _held(work, layout)
    gradient_sec = ACCUMULATION_PASSES * FP32_BYTES * held / (GIGA * machine.memory_gb_per_sec)
    parts = {
        "products": (dense + expert_passes * mean) / rate,
        "imbalance": expert_passes * (worst - mean) / rate,
        "memory-bound": passes * kept / (GIGA * machine.memory_gb_per_sec) + gradient_sec,
    }
    host_sec = network.depth * machine.block_overhead_us * MICRO
    device_sec = sum(parts.values())
    parts["launching"] = host_sec if machine.is_synchronous else max(0.0, host_sec - device_sec)
    return parts


def _held(work: Workload, layout: Layout) -> float:
    """Return the number of parameters that a rank has gradients of."""
    dense = work.num_parameters - work.num_in_experts
    return dense + work.num_in_experts / layout.expert_parallel_size


def _groups(work: Workload, layout: Layout, machine: Machine) -> list[tuple[float, Group]]:
    """Return the parameters that a rank holds, with the ranks that hold the same ones."""
    W, R, per_node = layout.world_size, layout.expert_parallel_size, machine.ranks_per_node
    dense = work.num_parameters - work.num_in_experts
    if R == 1:
        return [(work.num_parameters, group_of(W, 1, per_node))]
    return [
        (dense, group_of(W, 1, per_node)),
        (work.num_in_experts / R, group_of(W, R, per_node)),
    ]


def _gradients(work: Workload, layout: Layout, machine: Machine) -> Transfer:
    """Average the gradients once, with the copies into and out of buckets."""
    if layout.world_size == 1:
        return Transfer()
    passes = ALL_GATHER if layout.stage == 3 else ALL_REDUCE
    total = Transfer()
    for count, group in _groups(work, layout, machine):
        num_buckets = math.ceil(count / layout.bucket_size)
        total = total.plus(ring(layout.gradient_bytes * count, passes, group, machine, num_buckets))
    copied = BUCKET_PASSES * layout.gradient_bytes * _held(work, layout)
    return total._replace(sec=total.sec + copied / (GIGA * machine.memory_gb_per_sec))


def _weights(work: Workload, layout: Layout, machine: Machine) -> Transfer:
    """Gather the weights once: after the step, or under stage 3 block by block."""
    total, size = Transfer(), WEIGHT_BYTES[layout.precision]
    for count, group in _groups(work, layout, machine):
        num_calls = work.network.depth if layout.stage == 3 else 1
        total = total.plus(ring(size * count, ALL_GATHER, group, machine, num_calls))
    return total


def _optimizer_sec(work: Workload, layout: Layout, machine: Machine) -> float:
    """Update weights, moments and averages, in memory-bound passes over this rank's share."""
    sharded = work.num_parameters / layout.world_size
    count = sharded if layout.stage > 0 else _held(work, layout)
    passes = ADAM_PASSES + AVERAGE_PASSES * work.num_averages
    passes += MASTER_PASSES if layout.stage > 0 else 0
    update_sec = passes * FP32_BYTES * count / (GIGA * machine.memory_gb_per_sec)
    return update_sec + machine.step_overhead_us * MICRO


def fits(prediction: Prediction, machine: Machine) -> bool:
    """Tell whether a rank has memory for it."""
    return prediction.memory_bytes <= GIB * (machine.memory_gib - machine.reserved_gib)
