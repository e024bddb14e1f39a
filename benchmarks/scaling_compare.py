"""Compare predicted with measured steps on this machine's CPU: every layout, 2 and 4 processes."""

import argparse
import dataclasses
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks import hardware, rank_steps
from benchmarks.cost_model import Prediction, predict
from benchmarks.hardware import Machine
from benchmarks.layouts import Search, layout_of, workload_of
from benchmarks.link_fit import fit_cpu
from benchmarks.measure import describe_machine
from benchmarks.rank_steps import StepJob
from benchmarks.routing_shares import RoutingShares, configured_shares, prior_shares
from benchmarks.start_ranks import run_on_ranks
from data_tools.errors import ConfigError
from training.config.command_line import parse_command_line
from training.config.deepspeed_config import merge_deepspeed, stage_of
from training.config.tree import Config
from training.config.validation import validate
from training.engine.build import build_model

# Small enough for two cores; what is typed comes after it and counts. Experts for four ranks.
SMALL_RUN = ["--num-experts", "4", "--global-batch-size", "32"]
WORLD_SIZES = (2, 4)
GROUP_SIZES = [1, 2, 4]
NUM_STEPS = 6


class Comparison(NamedTuple):
    """A layout's step, predicted and measured."""

    prediction: Prediction
    measured_sec: float

    @property
    def error(self) -> float:
        """Error of the prediction, relative to the measurement."""
        return self.prediction.sec / self.measured_sec - 1


def run(args: argparse.Namespace, rest: list[str]) -> None:
    """Fit this CPU's constants, print them and, if asked to, compare.

    Args:
        args: of scaling.py.
        rest: the configuration's flags.
    """
    config = parse_command_line([*SMALL_RUN, *rest]).config
    search = Search(args.deepspeed, args.expert_parallel_size or GROUP_SIZES)
    plans = {}
    for world_size in args.gpus or WORLD_SIZES:
        plans[world_size] = jobs_of(config, world_size, search)
        if args.compare and not plans[world_size]:
            raise ConfigError(f"--gpus {world_size}: none of the layouts can be trained on it.")
    print(describe_machine(torch.device("cpu")))
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > cores / 2:
        print(
            f"warning: other work is running (load {load:.1f} on {cores} cores), and it changes "
            "while this measures; the error below is then that of the measurement"
        )
    machine = hardware.overridden(fit_cpu(config), args)
    print(hardware.describe(machine), flush=True)
    if args.compare:
        compare(machine, plans)


def jobs_of(config: Config, world_size: int, search: Search) -> list[StepJob]:
    """List the layouts that training accepts; ZeRO 3 last."""
    jobs = []
    for path in search.files:
        for size in search.group_sizes:
            # Clipping at stage 0 is refused with shared experts, and costs next to nothing.
            one = dataclasses.replace(
                config,
                run=dataclasses.replace(config.run, expert_parallel_size=size),
                optim=dataclasses.replace(config.optim, gradient_clipping=0.0),
            )
            try:
                validate(one, path, world_size)
            except ConfigError:
                continue
            jobs.append(StepJob(one, path))
    return sorted(jobs, key=lambda job: stage_of(merged_of(job, world_size)))


def merged_of(job: StepJob, world_size: int) -> dict:
    """Return the DeepSpeed configuration of a job."""
    return merge_deepspeed(Path(job.deepspeed), job.config, world_size)


def compare(machine: Machine, plans: dict[int, list[StepJob]]) -> None:
    """Measure all layouts and print them beside their predictions."""
    print(f"\n{'ranks':>5} {'ZeRO':>4} {'EP':>3} {'predicted':>10} {'measured':>9} {'error':>6}")
    rows = []
    for world_size, jobs in plans.items():
        seconds = run_on_ranks(world_size, rank_steps.measure_steps, jobs, NUM_STEPS)
        for job, measured_sec in zip(jobs, seconds, strict=True):
            row = Comparison(predict_job(job, machine, world_size), measured_sec)
            layout = row.prediction.layout
            print(
                f"{world_size:>5} {layout.stage:>4} {layout.expert_parallel_size:>3} "
                f"{1e3 * row.prediction.sec:>7.1f} ms {1e3 * measured_sec:>6.1f} ms "
                f"{row.error:>+6.0%}",
                flush=True,
            )
            rows.append(row)
    errors = np.abs([row.error for row in rows])
    print(
        f"\nerror: median {np.median(errors):.0%}, largest {errors.max():.0%} of {len(rows)} "
        f"layouts; load now {os.getloadavg()[0]:.2f}.\nThe routing is that of the untrained gates, "
        "on both sides. Ranks are processes of one thread that share the cores, the memory bus "
        "and,\nthrough gloo, the processors that do the work of a network: errors on GPUs may "
        "differ."
    )


def predict_job(job: StepJob, machine: Machine, world_size: int) -> Prediction:
    """Predict a job with the routing of the gates that it is measured with."""
    layout = layout_of(job.config, merged_of(job, world_size), world_size)
    routing = fresh_shares(job.config, layout.expert_parallel_size)
    return predict(workload_of(job.config), layout, machine, routing)


def fresh_shares(config: Config, group_size: int) -> RoutingShares:
    """Return the expected routing of a configuration's untrained gates."""
    if group_size == 1:
        return prior_shares(config, 1)
    model = build_model(config)
    with torch.no_grad():
        table = model.gate(model.t_embedder(torch.arange(model.options.num_timesteps)))
    return configured_shares(config, table, group_size)
