"""Train switch, dtr and dense on the demo data, all else equal, and compare losses and samples.

    python benchmarks/compare_routing.py --steps 300

All runs have the same seed, the same samples, noise and timesteps in the same order, the same
number of steps and objective epsilon. They go to runs/compare-ROUTING; an interrupted comparison
continues. The grids of samples go to runs/compare-routing.png, beside each other. A few minutes
show how training begins, not how it ends.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_tools.process.entry_point import enter
from training.cost.closed_forms import count_parameters
from training.monitoring.event_files import read_metrics
from training.run.directory import SAMPLES_DIR, load_config

ROUTINGS = ("switch", "dtr", "dense")
LOG_EVERY = 10
TITLE_HEIGHT = 16


def train(routing: str, steps: int, flags: list[str]) -> Path:
    """Train one kind of routing by the product's own command; return its run directory."""
    run_dir = Path("runs") / f"compare-{routing}"
    command = ["deepspeed", "training/main.py", "--routing", routing, "--run-dir", str(run_dir)]
    command += ["--max-steps", str(steps), "--log-every", str(LOG_EVERY), *flags]
    command += ["--save-every", str(steps), "--sample-every", str(steps)]
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True)
    return run_dir


def mean(records: list[dict[str, float]], name: str) -> float:
    """Return the mean of a metric over records of equally many steps."""
    return sum(record[name] for record in records) / len(records)


def report(runs: dict[str, Path], seconds: dict[str, float]) -> None:
    """Print the mean losses of the first and of the last third, and the mse per noise level."""
    records = {routing: read_metrics(run_dir) for routing, run_dir in runs.items()}
    third = max(1, min(len(rows) for rows in records.values()) // 3)
    print(f"\n{'':>24}" + "".join(f"{routing:>12}" for routing in runs))
    parameters = {r: count_parameters(load_config(path)).trainable for r, path in runs.items()}
    print(f"{'trainable parameters':>24}" + "".join(f"{parameters[r]:>12,}" for r in runs))
    for label, part in (("first", slice(None, third)), ("last", slice(-third, None))):
        for name in ("loss/mse", "loss/vlb"):
            values = "".join(f"{mean(records[r][part], name):>12.5f}" for r in runs)
            print(f"{f'{name}, {label} third':>24}{values}")
    buckets = sorted(k for k in records["dense"][-1] if k.startswith("mse_by_timestep/"))
    for name in buckets:
        rows = {r: [x for x in records[r][-third:] if name in x] for r in runs}
        values = "".join(f"{mean(rows[r], name):>12.5f}" for r in runs)
        print(f"{f'mse, t {name[16:]}':>24}{values}")
    print(f"{'seconds':>24}" + "".join(f"{seconds[r]:>12.0f}" for r in runs))


def side_by_side(runs: dict[str, Path], steps: int, path: Path) -> None:
    """Put the sample grids of all runs beside each other."""
    grids = [Image.open(run / SAMPLES_DIR / f"{steps:07d}.png") for run in runs.values()]
    width, height = sum(grid.width for grid in grids), max(grid.height for grid in grids)
    canvas = Image.new("RGB", (width, height + TITLE_HEIGHT), "white")
    draw, font, left = ImageDraw.Draw(canvas), ImageFont.load_default(size=12), 0
    for routing, grid in zip(runs, grids, strict=True):
        draw.text((left + 4, 1), routing, fill="black", font=font)
        canvas.paste(grid, (left, TITLE_HEIGHT))
        left += grid.width
    Image.fromarray(np.asarray(canvas)).save(path)
    print(f"grids: {path}")


def main() -> None:
    """Train all three and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="training steps of each")
    args, flags = parser.parse_known_args()  # further flags go to training/main.py
    runs, seconds = {}, {}
    for routing in ROUTINGS:
        started = time.monotonic()
        runs[routing] = train(routing, args.steps, flags)
        seconds[routing] = time.monotonic() - started
    report(runs, seconds)
    side_by_side(runs, args.steps, Path("runs/compare-routing.png"))


if __name__ == "__main__":
    enter(main)
