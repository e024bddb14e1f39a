"""Measure what metrics and the watchdog cost, as a share of the training step.

    python benchmarks/metrics_cost.py
    python benchmarks/metrics_cost.py --size XL --device cuda --batch 64 --experts 16
    python benchmarks/metrics_cost.py --size XL --experts 16 --step-sec 0.4

Timed are training's own parts:

    every micro-step  sums are updated on the device
    every interval    the reporter reduces the sums over ranks and writes them to TensorBoard and
                      metrics.jsonl. Here is one rank, as rank 0 of an expert-parallel group of two,
                      at the end of a run as long as the preset's
    with samples      pictures of the experts are drawn
    with checkpoints  a picture of the run is drawn, and one step is profiled for its share of
                      communication
    every step        the loop notes a few phases
    every second      the watchdog's thread tells the job's store where the rank is. Its share of a
                      core is the most that it can take of the step

The step is that of train_step.py, without a process group. With --step-sec it is one that was
measured elsewhere: no model is made then, and no step profiled.
"""

import argparse
import contextlib
import dataclasses
import io
import math
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.measure import best_seconds, describe_machine, synchronise
from benchmarks.sides import DTYPES, Side, config_of, make_batch, our_side
from data_tools.errors import ArgumentParser, ConfigError, exit_on_config_error, refuse_below_one
from data_tools.process.entry_point import enter
from models.diffusion import LossTerms
from models.gate import RoutingPlan, build_plan
from models.switch_dit import MODEL_SIZES
from training.checkpoints.manifest import TrainState
from training.config.tree import Config
from training.engine.build import build_model
from training.monitoring.communication import CommunicationWatch
from training.monitoring.event_files import Monitor, read_metrics
from training.monitoring.expert_load import LoadHistory, exchange_shape
from training.monitoring.interval_sums import MetricSums
from training.monitoring.metric import NUM_RANGES
from training.monitoring.progress import Progress
from training.monitoring.reporter import Reporter, StepTables
from training.monitoring.run_history import RunHistory
from training.ranks.heartbeat import FORWARD, Heartbeat
from training.ranks.process_group import Ranks
from training.ranks.watchdog import Watchdog
from training.run.checkpoint_notes import SAVED, CheckpointNote

GROUP_SIZE = 2
ADDS_PER_TIMING = 20
NOTES_PER_TIMING = 1000
PHASES_PER_STEP = 6  # reading, agreeing, forward, backward, updating, agreeing
WATCH_SEC = 4.0
REPEATS = 5


class Costs(NamedTuple):
    """Seconds that each part takes, once."""

    add: float  # sums of a micro-step
    end: float  # of a logging interval
    pictures: float  # of the experts
    history: float  # of the run, with a checkpoint's note
    num_scalars: int  # of a logging interval


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="demo", choices=tuple(MODEL_SIZES))
    parser.add_argument("--batch", type=int, default=16, help="samples of a step")
    parser.add_argument("--experts", type=int, default=8, help="of a block; an even number")
    parser.add_argument("--dtype", default="fp32", choices=tuple(DTYPES))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument("--step-sec", type=float, help="instead of timing steps")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot run."""
    if args.device not in ("cpu", "cuda"):
        raise ConfigError(f"--device must be cpu or cuda, not {args.device}.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device here; use --device cpu.")
    refuse_below_one(args, "batch", "steps")
    if args.step_sec is not None and not 0 < args.step_sec < math.inf:
        raise ConfigError(f"--step-sec must be positive, not {args.step_sec}.")
    if args.experts < 2 or args.experts % GROUP_SIZE:
        raise ConfigError(f"--experts must be an even number, not {args.experts}.")


def random_gates(config: Config, device: torch.device) -> torch.Tensor:
    """Draw gates (L, S, E)."""
    E, S = config.model.num_experts, config.diffusion.num_timesteps
    generator = torch.Generator().manual_seed(0)
    depth = MODEL_SIZES[config.model.size].depth
    return torch.randn(depth, S, E, generator=generator).softmax(-1).to(device)


def group_plan(config: Config, gates: torch.Tensor, t: torch.Tensor) -> RoutingPlan:
    """Make a plan as on rank 0 of a group of two."""
    return build_plan(gates, t, config.model.top_k, torch.cat((t, t)), 0, GROUP_SIZE)


def measure_reporter(
    config: Config, model: torch.nn.Module, t: torch.Tensor, folder: Path
) -> Costs:
    """Time what training's reporter does, at the end of a run as long as the preset's."""
    device, N, every = t.device, len(t), config.run.log_every
    depth, E = len(model.blocks), config.model.num_experts
    shape = exchange_shape(model, 0, GROUP_SIZE, "fp32")
    sums = MetricSums(depth, E, config.diffusion.num_timesteps, device, shape)
    loads, history = LoadHistory(depth, E), RunHistory([], [])
    engine = SimpleNamespace(
        module=model,
        skipped_steps=0,
        get_global_grad_norm=lambda: 1.0,
        train_micro_batch_size_per_gpu=lambda: N,
    )
    monitor = Monitor(folder)
    progress = Progress(config.run.max_steps, lambda _: None, False, io.StringIO())
    parts = (config, engine, sums, loads, history, monitor, progress, device, Heartbeat(device))
    reporter = Reporter(*parts, is_main=True)
    gates = random_gates(config, device)
    plan, terms = group_plan(config, gates, t), LossTerms(*torch.ones(4, device=device))
    mse, counts = torch.ones(N, device=device), torch.ones(depth, E, NUM_RANGES)
    last = config.run.max_steps
    for step in range(every, last, every):
        loads.add(step, counts)
        history.add_interval(step, {"loss/mse": 1.0})

    def add(step: int = last) -> None:
        sums.add(step, terms, mse, t, plan, 0.0)

    add_sec = best_seconds(add, device, inner=ADDS_PER_TIMING)
    ends, pictures, histories = [], [], []
    for _ in range(REPEATS):
        for step in range(every):
            add(last + step)
        last += every
        synchronise(device)
        started = time.perf_counter()
        reporter.end_interval(TrainState(last, N * last), StepTables(gates, None), 1.0)
        ends.append(time.perf_counter() - started)
        started = time.perf_counter()
        reporter.draw_experts(last, gates)
        pictures.append(time.perf_counter() - started)
        started = time.perf_counter()
        reporter.note_checkpoint(CheckpointNote(last, SAVED))
        histories.append(time.perf_counter() - started)
    monitor.close()
    num_scalars = len(read_metrics(folder)[-1]) - 1  # the step is none
    return Costs(add_sec, min(ends), min(pictures), min(histories), num_scalars)


def measure_look(side: Side, step_sec: float, device: torch.device, folder: Path) -> float:
    """Return the seconds by which a profiled step is longer than another one."""
    monitor, seconds = Monitor(folder), []
    for _ in range(REPEATS):
        watch = CommunicationWatch(monitor, device, every=1, is_wanted=True, first=1)
        started = time.perf_counter()
        with watch.step(1):
            side.step(1)
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    monitor.close()
    return max(min(seconds) - step_sec, watch.cost_sec)


def measure_watchdog(device: torch.device) -> tuple[float, float]:
    """Return the seconds of a note and the share of a core that watching takes."""
    with Watchdog(Ranks(0, 1, 0), device) as watchdog:
        note_sec = best_seconds(
            lambda: watchdog.heartbeat.enter(FORWARD, 1), device, inner=NOTES_PER_TIMING
        )
        thread = next(one for one in threading.enumerate() if one.name == "watchdog")
        clock = time.pthread_getcpuclockid(thread.ident)
        before = time.clock_gettime(clock)
        time.sleep(WATCH_SEC)
        return note_sec, (time.clock_gettime(clock) - before) / WATCH_SEC


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = parse(argv)
    with exit_on_config_error():
        check(args)
    device, preset = torch.device(args.device), config_of(args.size)
    config = dataclasses.replace(
        preset, model=dataclasses.replace(preset.model, num_experts=args.experts)
    )
    batch = make_batch(config, args.batch, device)
    print(describe_machine(device))
    if args.step_sec is None:
        side = our_side(config, batch, DTYPES[args.dtype])
        model = side.model
        side.step(0)
        step_sec = best_seconds(lambda: side.step(1), device, repeats=args.steps)
    else:
        step_sec, side = args.step_sec, None
        with torch.device("meta"):
            model = build_model(config)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, run_dir=name))
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=torch.distributed.TCPStore("127.0.0.1", 0, 1, True),
            rank=0,
            world_size=1,
        )
        with contextlib.redirect_stdout(io.StringIO()):  # what a person would be shown
            costs = measure_reporter(config, model, batch.t, folder)
        look_sec = None if side is None else measure_look(side, step_sec, device, folder)
        note_sec, watch_share = measure_watchdog(device)
        torch.distributed.destroy_process_group()
    run = config.run
    parts = [
        ("sums of a micro-step", costs.add, 1, ""),
        ("end of an interval", costs.end, run.log_every, f", {costs.num_scalars} scalars"),
        ("pictures of the experts", costs.pictures, run.sample_every, ""),
        ("picture of the run", costs.history, run.save_every, ""),
    ]
    if look_sec is not None:
        parts.append(("profiling a step", look_sec, run.save_every, ""))
    timing = "given" if side is None else "measured"
    print(f"{args.size}, {args.experts} experts, {args.batch} samples, {args.dtype}")
    print(f"{'step':26s} {1e3 * step_sec:9.2f} ms, {timing}")
    for what, seconds, every, detail in parts:
        share = seconds / every / step_sec
        print(f"{what:26s} {1e3 * seconds:9.2f} ms{detail}, every {every} step(s): {share:.3%}")
    total = sum(seconds / every for _, seconds, every, _ in parts) / step_sec
    print(
        f"{'share of the step':26s} {total:9.2%}\n"
        f"notes of a step's phases   {1e6 * PHASES_PER_STEP * note_sec:9.2f} us, "
        f"{PHASES_PER_STEP * note_sec / step_sec:.5%} of the step\n"
        f"the watchdog's thread      {watch_share:9.3%} of a core"
    )


if __name__ == "__main__":
    enter(main)
