"""What do the metrics and the watchdog cost, as a share of the training step?

    python benchmarks/metrics_cost.py
    python benchmarks/metrics_cost.py --size XL --device cuda --batch 64 --experts 16

Per micro-step sums are updated on the device; per logging interval they are reduced over ranks
(here one, as rank 0 of an expert-parallel group of two), described, and written to TensorBoard and
metrics.jsonl. Per step the loop notes a few phases, and each second the watchdog's thread tells
the job's store where the rank is: what that takes of a core is the most it can take of the step.
The step is that of train_step.py, without a process group.
"""

import argparse
import dataclasses
import sys
import tempfile
import threading
import time
from pathlib import Path

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.measure import best_seconds, describe_machine, synchronise
from benchmarks.sides import DTYPES, config_of, make_batch, our_side
from data_tools.errors import ArgumentParser, ConfigError, exit_on_config_error
from models.diffusion import LossTerms
from models.gate import RoutingPlan, build_plan
from models.switch_dit import MODEL_SIZES
from training.config import Config
from training.expert_load import LoadHistory, exchange_shape
from training.heartbeat import FORWARD
from training.metrics import MetricSums
from training.monitor import Monitor
from training.processes import Ranks
from training.watchdog import Watchdog

GROUP_SIZE = 2
ADDS_PER_TIMING = 20
NOTES_PER_TIMING = 1000
PHASES_PER_STEP = 6  # reading, agreeing, forward, backward, updating, agreeing
WATCH_SEC = 4.0


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
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot run."""
    if args.device not in ("cpu", "cuda"):
        raise ConfigError(f"--device must be cpu or cuda, not {args.device}.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device here; use --device cpu.")
    for flag, value in (("--batch", args.batch), ("--steps", args.steps)):
        if value < 1:
            raise ConfigError(f"{flag} must be at least 1, not {value}.")
    if args.experts < 2 or args.experts % GROUP_SIZE:
        raise ConfigError(f"--experts must be an even number, not {args.experts}.")


def group_plan(config: Config, t: torch.Tensor) -> RoutingPlan:
    """Make a plan as on rank 0 of a group of two."""
    E, S = config.model.num_experts, config.diffusion.num_timesteps
    generator = torch.Generator().manual_seed(0)
    depth = MODEL_SIZES[config.model.size].depth
    table = torch.randn(depth, S, E, generator=generator).softmax(-1).to(t.device)
    return build_plan(table, t, config.model.top_k, torch.cat((t, t)), 0, GROUP_SIZE)


def measure_metrics(
    config: Config, model: torch.nn.Module, t: torch.Tensor, folder: Path
) -> tuple[float, float, int]:
    """Return the seconds of a micro-step's sums and of an interval's end, and the scalars."""
    device, N = t.device, len(t)
    depth, E = len(model.blocks), config.model.num_experts
    shape = exchange_shape(model, 0, GROUP_SIZE, "fp32")
    sums = MetricSums(depth, E, config.diffusion.num_timesteps, device, shape)
    history, monitor = LoadHistory(depth, E), Monitor(folder)
    plan, terms = group_plan(config, t), LossTerms(*torch.ones(4, device=device))
    mse = torch.ones(N, device=device)

    def add() -> None:
        sums.add(0, terms, mse, t, plan, 0.0)

    add_sec = best_seconds(add, device, inner=ADDS_PER_TIMING)
    intervals, num_scalars = [], 0
    for step in range(1, 6):
        add()
        synchronise(device)
        started = time.perf_counter()
        interval = sums.reduce()
        metrics = interval.metrics | history.add(interval.expert_count)[0]
        monitor.scalars(step, metrics)
        intervals.append(time.perf_counter() - started)
        num_scalars = len(metrics)
    monitor.close()
    return add_sec, min(intervals), num_scalars


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
    side = our_side(config, batch, DTYPES[args.dtype])
    print(describe_machine(device))
    side.step(0)
    step_sec = best_seconds(lambda: side.step(1), device, repeats=args.steps)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=torch.distributed.TCPStore("127.0.0.1", 0, 1, True),
            rank=0,
            world_size=1,
        )
        add_sec, end_sec, num_scalars = measure_metrics(config, side.model, batch.t, folder)
        note_sec, watch_share = measure_watchdog(device)
        torch.distributed.destroy_process_group()
    every = config.run.log_every
    share = (add_sec + end_sec / every) / step_sec
    print(
        f"{args.size}, {args.experts} experts, {args.batch} samples, {args.dtype}\n"
        f"step                       {1e3 * step_sec:9.2f} ms\n"
        f"sums of a micro-step       {1e3 * add_sec:9.2f} ms\n"
        f"end of an interval         {1e3 * end_sec:9.2f} ms, {num_scalars} scalars, every "
        f"{every} steps\n"
        f"share of the step          {share:9.2%}\n"
        f"notes of a step's phases   {1e6 * PHASES_PER_STEP * note_sec:9.2f} us, "
        f"{PHASES_PER_STEP * note_sec / step_sec:.5%} of the step\n"
        f"the watchdog's thread      {watch_share:9.3%} of a core"
    )


if __name__ == "__main__":
    main()
