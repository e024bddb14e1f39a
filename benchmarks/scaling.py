"""Predict how fast a configuration trains on 1 to 512 GPUs, and with which layout.

    python benchmarks/scaling.py --preset xl --num-experts 8 --global-batch-size 1024
    python benchmarks/scaling.py --preset xl --images-per-gpu 32 --plot scaling.png
    python benchmarks/scaling.py --machine a100 --preset xl --num-experts 16 --every-layout
    python benchmarks/scaling.py --fit                 # this machine's constants, on its CPU
    python benchmarks/scaling.py --compare             # predicted and measured, 2 and 4 processes

A small cost model (benchmarks/cost_model.py) predicts every layout that training would accept, and
the fastest one that fits is printed. Every flag of training/main.py is understood. --deepspeed
takes several files, --expert-parallel-size several sizes; with --images-per-gpu the global batch
grows with the GPUs. The constants of a GPU are a vendor's numbers and stated assumptions. Those of
the CPU are measured on this machine, by --fit, --compare and --machine cpu, and not stored.
"""

import argparse
import os
import sys
from pathlib import Path

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import hardware
from benchmarks.cost_model import Prediction
from benchmarks.hardware import GIB, GIGA, MACHINES, Machine
from benchmarks.layouts import Outcome, Search, best_of_each_kind, explore, workload_of
from benchmarks.routing_shares import prior_shares
from benchmarks.scaling_plot import draw_scaling
from data_tools.errors import ArgumentParser, ConfigError, exit_on_config_error
from data_tools.process.entry_point import enter
from data_tools.user_files.paths import typed_path
from training.config.command_line import parse_command_line
from training.config.tree import Config
from training.config.validation import validate
from training.sampling.image_files import save_png

CPU = "cpu"
GPU_COUNTS = [2**i for i in range(10)]
CPU_COUNTS = [1, 2, 4]
STAGE_FILES = [Path(f"ds_configs/zero{stage}.json") for stage in range(4)]
COLUMNS = (
    f"{'ranks':>5} {'ZeRO':>4} {'EP':>3} {'micro':>9} {'ms/step':>9} {'images/s':>10} "
    f"{'effic.':>6} {'GiB':>6} {'MB in node':>10} {'MB between':>10}  largest part"
)
LEGEND = """
EP: expert-parallel size; micro: samples of a forward pass x passes of a step; effic.: images/s
per rank, over those with {base} rank(s); GiB: of a rank, without buckets and framework;
MB: what a rank sends in a step to ranks of its node and to other nodes.

Assumed: gates follow the diffusion prior, so the routing is that of models/gate.py for its map; a
ring or tree at the link's rate; all-to-alls wait for their slowest rank; data, logging, checkpoints
and the host's matching of the prior cost nothing. Against 2 and 4 CPU processes the error is what
--compare prints; no cluster has been measured."""


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Read the flags of this program; return the others, which are the configuration's."""
    parser = ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--machine", default="h100", choices=(*MACHINES, CPU), help="what runs (default: h100)"
    )
    parser.add_argument("--gpus", nargs="+", type=int, default=None, metavar="N", help="ranks")
    parser.add_argument("--images-per-gpu", type=int, default=None, metavar="N", help="see above")
    parser.add_argument(
        "--deepspeed",
        nargs="+",
        type=typed_path,
        default=STAGE_FILES,
        metavar="JSON",
        help="to try",
    )
    parser.add_argument(
        "--expert-parallel-size", nargs="+", type=int, default=None, metavar="N", help="to try"
    )
    parser.add_argument("--every-layout", action="store_true", help="print not only the best")
    parser.add_argument(
        "--plot", type=typed_path, default=None, metavar="PNG", help="draw the table"
    )
    parser.add_argument("--fit", action="store_true", help="measure this CPU's constants and stop")
    parser.add_argument(
        "--compare", action="store_true", help="measure, predict and compare on this CPU"
    )
    hardware.add_flags(parser)
    return parser.parse_known_args(argv)


def check(args: argparse.Namespace) -> None:
    """Refuse numbers and names that make no sense."""
    counts = {"--gpus": args.gpus, "--expert-parallel-size": args.expert_parallel_size}
    counts["--images-per-gpu"] = args.images_per_gpu and [args.images_per_gpu]
    for flag, values in counts.items():
        for value in values or []:
            if value < 1:
                raise ConfigError(f"{flag} must be at least 1, not {value}.")
    if args.plot is not None and args.plot.suffix.lower() != ".png":
        raise ConfigError(f"--plot {args.plot} must end in .png, the only format it draws.")


def machine_of(args: argparse.Namespace, config: Config) -> Machine:
    """Return the machine to predict, measured first if it is this CPU."""
    if args.machine != CPU:
        return hardware.overridden(MACHINES[args.machine], args)
    from benchmarks.link_fit import fit_cpu  # starts processes

    return hardware.overridden(fit_cpu(config), args)


def rows_of(outcome: Outcome, every_layout: bool) -> list[Prediction]:
    """Choose what to print of a number of ranks."""
    kinds = best_of_each_kind(outcome.predictions)
    return kinds if every_layout else kinds[:1]


def print_row(world_size: int, outcome: Outcome, every_layout: bool, base: Prediction) -> None:
    """Print the best layout of a number of ranks, or all, or why there is none."""
    if outcome.problem:
        print(f"{world_size:>5} - {outcome.problem}")
    for row in rows_of(outcome, every_layout):
        layout = row.layout
        per_rank = row.images_per_sec / layout.world_size
        efficiency = per_rank / (base.images_per_sec / base.layout.world_size)
        micro = f"{layout.micro_batch_size} x {layout.accumulation}"
        part = f"{row.bottleneck} {row.parts[row.bottleneck] / row.sec:.0%}"
        print(
            f"{layout.world_size:>5} {layout.stage:>4} {layout.expert_parallel_size:>3} "
            f"{micro:>9} {1e3 * row.sec:>9.1f} {row.images_per_sec:>10,.1f} {efficiency:>6.0%} "
            f"{row.memory_bytes / GIB:>6.1f} {1e3 * row.node_bytes / GIGA:>10,.1f} "
            f"{1e3 * row.net_bytes / GIGA:>10,.1f}  {part}"
        )


def print_routing(config: Config, outcomes: dict[int, Outcome]) -> None:
    """Print what expert parallelism of each size would send."""
    rows = [row for outcome in outcomes.values() for row in outcome.predictions]
    for size in sorted({row.layout.expert_parallel_size for row in rows} - {1}):
        shares = prior_shares(config, size)
        print(
            f"expert-parallel size {size}: a sample goes to {shares.copies:.2f} other ranks in a "
            f"block; the busiest rank serves {shares.imbalance:.2f} times the mean"
        )


def print_table(args: argparse.Namespace, config: Config, machine: Machine) -> None:
    """Predict and print every number of ranks; draw it if asked to."""
    search = Search(args.deepspeed, args.expert_parallel_size, args.images_per_gpu)
    for path in search.files:  # what is wrong on one rank is wrong on all
        validate(config, path, 1)
    counts = args.gpus or (CPU_COUNTS if args.machine == CPU else GPU_COUNTS)
    work = workload_of(config)
    outcomes = {n: explore(config, work, n, machine, search) for n in sorted(set(counts))}
    best = [outcome.predictions[0] for outcome in outcomes.values() if outcome.predictions]
    if not best:
        raise ConfigError(
            f"--gpus {' '.join(map(str, outcomes))}: none of them can train this; the last one: "
            f"{outcomes[max(outcomes)].problem}"
        )
    size = config.model.size
    print(f"{size}/{config.model.patch_size}, {work.num_parameters:,} parameters; constants:")
    print(hardware.describe(machine) + f"\n\n{COLUMNS}")
    for world_size, outcome in outcomes.items():
        print_row(world_size, outcome, args.every_layout, best[0])
    print(LEGEND.format(base=best[0].layout.world_size))
    print_routing(config, outcomes)
    if args.plot is not None:
        title = f"{size}/{config.model.patch_size} on {machine.name}, predicted"
        save_png(args.plot, draw_scaling(best, title))
        print(f"plot: {args.plot}")


def main(argv: list[str] | None = None) -> None:
    """Predict, fit or compare."""
    # Nothing of DeepSpeed computes in this process, so it need not look for accelerators.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with exit_on_config_error():
        args, rest = parse(argv)
        check(args)
        if args.fit or args.compare:
            from benchmarks import scaling_compare  # starts processes

            scaling_compare.run(args, rest)
            return
        config = parse_command_line(rest).config
        print_table(args, config, machine_of(args, config))


if __name__ == "__main__":
    enter(main)
