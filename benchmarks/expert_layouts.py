"""Measure memory and time of experts that are replicated, sharded by ZeRO 3 or shared out.

Shared out means expert parallelism. Real DeepSpeed engines, one process per rank, train small
Switch-DiTs for a few steps. A step is the product's: objective, prior, clipping, AdamW with an
average of the weights.
"""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.measure import peak_growth
from benchmarks.rank_steps import StepJob, measure_steps
from benchmarks.start_ranks import run_on_ranks, slowest
from training.config.preset import load_preset
from training.config.tree import Config
from training.cost.closed_forms import count_parameters, num_averages
from training.cost.memory import model_memory

MIB = 2**20
SAMPLES_PER_RANK = 8
ROUNDS = 2  # through all layouts, so that other load meets them alike
BUCKET = 1_000_000  # numbers; DeepSpeed's own would hide such small models
COLUMNS = (
    f"{'experts':<22} {'ranks':>5}  {'layout':<26} {'states MiB':>10} {'peak MiB':>9} "
    f"{'ms/step':>9}"
)
LEGEND = """
states: weights, gradients, optimizer and the averaged weights of a rank, in closed form; peak: by
how much the resident memory of the largest rank grew, activations and buffers included; ms/step:
the best step, as the slowest rank sees it"""


class Experts(NamedTuple):
    """What the experts of a block are."""

    count: int
    kind: str = "affine"
    hidden_ratio: float = 1.0

    def __str__(self) -> str:
        return f"{self.count} {self.kind}" + (
            f", ratio {self.hidden_ratio:g}" if self.kind == "mlp" else ""
        )


EXPERTS = (
    Experts(3),
    Experts(8),
    Experts(16),
    Experts(8, "mlp", 4.0),
    Experts(16, "mlp", 4.0),
)


class ExpertLayout(NamedTuple):
    """A way to spread experts over ranks."""

    name: str
    stage: int
    is_shared_out: bool


LAYOUTS = (
    ExpertLayout("replicated, ZeRO 2", 2, False),
    ExpertLayout("expert-parallel, ZeRO 2", 2, True),
    ExpertLayout("sharded, ZeRO 3", 3, False),
    ExpertLayout("expert-parallel, ZeRO 3", 3, True),
)


class Row(NamedTuple):
    """One line of the table; times and peaks are measured."""

    experts: Experts
    layout: ExpertLayout
    state_bytes: float
    peak_bytes: float
    best_sec: float


def print_layouts(world_sizes: list[int], num_steps: int, size: str) -> None:
    """Measure and print all layouts of all experts on every number of ranks."""
    model = config_of(size, EXPERTS[0], 1, 1).model
    tokens = (model.latent_size // model.patch_size) ** 2
    print(
        f"size {size}, {tokens} tokens, {SAMPLES_PER_RANK} samples a rank, k = {model.top_k}, "
        f"fp32, one thread a rank\n{COLUMNS}"
    )
    for world_size in world_sizes:
        rows = [row for stage in (2, 3) for row in measure(size, world_size, stage, num_steps)]
        for experts in EXPERTS:
            for layout in LAYOUTS:
                found = [row for row in rows if (row.experts, row.layout) == (experts, layout)]
                print(_line(world_size, experts, layout, found), flush=True)
    print(LEGEND)


def _line(world_size: int, experts: Experts, layout: ExpertLayout, found: list[Row]) -> str:
    head = f"{experts!s:<22} {world_size:>5}  {layout.name:<26}"
    if not found:
        return f"{head} {experts.count} experts do not divide over {world_size} ranks"
    (row,) = found
    return (
        f"{head} {row.state_bytes / MIB:>10.1f} {row.peak_bytes / MIB:>9.1f} "
        f"{1e3 * row.best_sec:>9.0f}"
    )


def config_of(size: str, experts: Experts, world_size: int, group_size: int) -> Config:
    """Return the demo preset at another size and with other experts."""
    config = load_preset("demo")
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model,
            size=size,
            num_experts=experts.count,
            expert_kind=experts.kind,
            expert_hidden_ratio=experts.hidden_ratio,
        ),
        optim=dataclasses.replace(
            config.optim, global_batch_size=SAMPLES_PER_RANK * world_size, warmup_steps=0
        ),
        run=dataclasses.replace(config.run, expert_parallel_size=group_size),
    )


def measure(size: str, world_size: int, stage: int, num_steps: int) -> list[Row]:
    """Train all layouts of a ZeRO stage; stages have processes of their own.

    ZeRO 3 replaces torch's linear layer for the rest of a process.
    """
    cases = [
        (experts, layout)
        for experts in EXPERTS
        for layout in LAYOUTS
        if layout.stage == stage and not (layout.is_shared_out and experts.count % world_size)
    ]
    zero = {"stage": stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
        zero["stage3_prefetch_bucket_size"] = BUCKET
    configs = [
        config_of(size, experts, world_size, world_size if layout.is_shared_out else 1)
        for experts, layout in cases
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "deepspeed.json"
        path.write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
        jobs = [StepJob(config, path) for config in configs]
        measured = run_on_ranks(world_size, train_all, jobs, num_steps)
    return [
        Row(*case, state_bytes(config, stage, world_size), *peak_and_sec)
        for case, config, peak_and_sec in zip(cases, configs, measured, strict=True)
    ]


def train_all(
    rank: int, world_size: int, jobs: list[StepJob], num_steps: int
) -> list[tuple[float, float]]:
    """Train every job; return the peak of memory in bytes and the best step's seconds of each."""
    device = torch.device("cpu")
    peaks, best = [0.0] * len(jobs), [float("inf")] * len(jobs)
    for number in range(ROUNDS):
        for i, job in enumerate(jobs):

            def train(i: int = i, job: StepJob = job) -> None:
                best[i] = min(best[i], *measure_steps(rank, world_size, [job], num_steps))

            peak = slowest(peak_growth(train, device), device)
            # Later ones may find memory that an earlier engine has not given back.
            peaks[i] = peak if number == 0 else max(peaks[i], peak)
    return list(zip(peaks, best, strict=True))


def state_bytes(config: Config, stage: int, world_size: int) -> float:
    """Return the closed form of a rank's memory without activations and buffers."""
    count = count_parameters(config)
    memory = model_memory(
        count.total,
        count.experts,
        stage=stage,
        precision="fp32",
        world_size=world_size,
        expert_parallel_size=config.run.expert_parallel_size,
        num_averages=num_averages(config),
    )
    return sum(memory)
