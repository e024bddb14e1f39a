"""Compare expert parallelism with DeepSpeed's own layer, and with replicated experts.

    python benchmarks/expert_parallel.py                      # our layers and DeepSpeed's
    python benchmarks/expert_parallel.py --kind mlp --hidden-ratio 4
    python benchmarks/expert_parallel.py --device cuda        # NCCL, a rank per GPU
    python benchmarks/expert_parallel.py --layouts            # v sharded and replicated experts

The program starts its ranks. The first form runs forward and backward passes of some layers with
equal experts and equal routing, and compares outputs and gradients before it times anything. Both
sides take turns; the best step counts, timed on the slowest rank. `--layouts` trains small models
with DeepSpeed engines (expert_layouts.py).
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.expert_layouts import print_layouts
from benchmarks.layer_comparison import Measured, compare
from benchmarks.layer_problem import Sizes
from benchmarks.measure import describe_machine
from benchmarks.start_ranks import run_on_ranks
from data_tools.errors import ArgumentParser, ConfigError, exit_on_config_error, refuse_below_one
from data_tools.process.entry_point import enter
from models.switch_dit import MODEL_SIZES

MIB = 2**20
COLUMNS = (
    f"{'routing':<8} {'side':<10} {'ms/step':>9} {'MiB sent':>9} {'all-to-alls':>12} "
    f"{'waits':>6} {'peak MiB':>9}"
)
LEGEND = """
ms/step: forward and backward of all layers, the plan or the gates included; MiB sent: by a rank to
others in a step, mean over ranks; waits: of the host for the device, {waits};
peak: growth of a rank's memory in a step, the largest rank's; ratio: DeepSpeed's over ours"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="sizes of the group")
    parser.add_argument("--experts", type=int, default=8, help="of a layer")
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--kind", default="affine", choices=("affine", "mlp"), help="of experts")
    parser.add_argument("--hidden-ratio", type=float, default=4.0, help="of mlp experts")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=256, help="of a sample")
    parser.add_argument("--batch", type=int, default=8, help="samples of a rank")
    parser.add_argument("--depth", type=int, default=4, help="layers")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each side")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--layouts", action="store_true", help="train small models instead")
    parser.add_argument("--size", default="demo", choices=tuple(MODEL_SIZES), help="of these")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot run, before processes start."""
    refuse_below_one(args, "experts", "top_k", "width", "tokens", "batch", "depth", "steps")
    if args.top_k > args.experts:
        raise ConfigError(f"--top-k {args.top_k} is more than --experts {args.experts}.")
    if args.device not in ("cpu", "cuda"):
        raise ConfigError(f"--device must be cpu or cuda, not {args.device}.")
    if args.layouts and args.device == "cuda":
        raise ConfigError("--layouts measures resident memory; use --device cpu.")
    for world_size in args.ranks:
        if world_size < 2:
            raise ConfigError(f"--ranks {world_size}: there is nothing to share; use 2 or more.")
        if not args.layouts and args.experts % world_size:
            raise ConfigError(f"--experts {args.experts} do not divide over --ranks {world_size}.")
        if args.device == "cuda" and torch.cuda.device_count() < world_size:
            raise ConfigError(
                f"--device cuda: {world_size} ranks need as many GPUs and torch finds "
                f"{torch.cuda.device_count()}; use fewer --ranks or --device cpu."
            )


def print_comparison(results: dict[str, list[Measured]]) -> None:
    """Print a table with the ratios of DeepSpeed's layer over ours."""
    print(COLUMNS)
    for routing, (stock, ours) in results.items():
        for side in (stock, ours):
            print(
                f"{routing:<8} {side.name:<10} {1e3 * side.best_sec:>9.1f} "
                f"{side.sent_bytes / MIB:>9.2f} {side.num_exchanges:>12} {side.num_waits:>6} "
                f"{side.peak_bytes / MIB:>9.1f}"
            )
        print(
            f"{routing:<8} {'ratio':<10} {stock.best_sec / ours.best_sec:>9.2f} "
            f"{stock.sent_bytes / ours.sent_bytes:>9.2f} {'':>12} {'':>6} "
            f"{stock.peak_bytes / ours.peak_bytes:>9.2f}",
            flush=True,
        )


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = parse(argv)
    with exit_on_config_error():
        check(args)
    print(describe_machine(torch.device(args.device)))
    if args.layouts:
        print_layouts(args.ranks, args.steps, args.size)
        return
    sizes = Sizes(
        batch_size=args.batch,
        num_tokens=args.tokens,
        width=args.width,
        depth=args.depth,
        num_experts=args.experts,
        top_k=args.top_k,
        kind=args.kind,
        hidden_ratio=args.hidden_ratio,
    )
    ratio = f", ratio {args.hidden_ratio:g}" if args.kind == "mlp" else ""
    for world_size in args.ranks:
        print(
            f"\n{world_size} ranks: {args.depth} layers of {args.experts} {args.kind} experts"
            f"{ratio}, k = {args.top_k}, D = {args.width}, {args.batch} samples of {args.tokens} "
            "tokens a rank, fp32"
        )
        given = (sizes, args.steps, args.device)
        print_comparison(run_on_ranks(world_size, compare, *given, device_type=args.device))
    waits = "seen by CUDA" if args.device == "cuda" else "counted in Python"
    print(LEGEND.format(waits=waits))


if __name__ == "__main__":
    enter(main)
