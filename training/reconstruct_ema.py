"""Make an average of any width from the snapshots that a run has stored (EDM2's post-hoc EMA).

    python training/reconstruct_ema.py runs/XL --std 0.08

The run must have been trained with --ema-stds and --ema-snapshot-every. `sample.py runs/XL
--weights FILE` draws from the result.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data_tools.errors import ArgumentParser, ConfigError, exit_on_config_error
from data_tools.process.entry_point import enter
from data_tools.user_files.paths import typed_path
from training.checkpoints.average_snapshots import Snapshot, list_snapshots, snapshot_file
from training.checkpoints.weight_files import (
    NonFiniteWeightsError,
    describe_disk_error,
    write_weights,
)
from training.config.option import check_value
from training.config.tree import option_named
from training.config.wording import did_you_mean
from training.engine.average_fit import Fit, fit_profile
from training.engine.average_profiles import PowerProfile
from training.run.directory import load_config
from training.sampling.flags import add_run_argument

POSTHOC_DIR = "posthoc"
# Relative residuals of the fit: above the one it is warned of, above the other refused.
ROUGH_RESIDUAL = 0.1
MAX_RESIDUAL = 0.5


class Reconstruction(NamedTuple):
    """A checked command."""

    snapshots: list[Snapshot]
    profile: PowerProfile
    step: int
    fit: Fit
    output: Path


def build_parser() -> ArgumentParser:
    """Build the command line."""
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    add_run_argument(parser)
    parser.add_argument("--std", type=float, required=True, metavar="X", help="relative width")
    parser.add_argument(
        "--step", type=int, metavar="N", help="of a stored snapshot (default: the newest)"
    )
    parser.add_argument(
        "--output",
        type=typed_path,
        metavar="FILE",
        help="default: RUN/posthoc/stdX-step-N.safetensors",
    )
    return parser


def check(args: argparse.Namespace) -> Reconstruction:
    """Find the snapshots and fit the profile; write nothing."""
    load_config(args.run_dir)
    check_value(option_named("ema_stds"), args.std, "--std")
    snapshots = list_snapshots(args.run_dir)
    updates = {snapshot.step: snapshot.num_updates for snapshot in snapshots}
    step = max(updates) if args.step is None else args.step
    if step not in updates:
        hint = did_you_mean(str(step), map(str, updates))
        raise ConfigError(f"--step: no snapshot of step {step}{hint}")
    profile = PowerProfile(args.std)
    fit = fit_profile(
        [snapshot.num_updates for snapshot in snapshots],
        [snapshot.gamma for snapshot in snapshots],
        updates[step],
        profile.gamma,
    )
    if fit.residual > MAX_RESIDUAL:
        raise ConfigError(
            f"--std {args.std} cannot be made of the stored snapshots: the relative residual of "
            f"its profile is {fit.residual:.0%}, more than {MAX_RESIDUAL:.0%}; "
            f"{_better(snapshots)}."
        )
    output = args.output or args.run_dir / POSTHOC_DIR / snapshot_file(profile, step)
    return Reconstruction(snapshots, profile, step, fit, output)


def _better(snapshots: list[Snapshot]) -> str:
    """Say what would make the fit better."""
    stds = sorted({snapshot.std for snapshot in snapshots})
    return (
        f"choose a width nearer to the stored ones ({', '.join(map(str, stds))}), or train with a "
        "smaller --ema-snapshot-every or with --ema-stds nearer to it"
    )


def add_up(job: Reconstruction) -> dict[str, Tensor]:
    """Add up the stored averages in float64, one file at a time."""
    total: dict[str, Tensor] = {}
    for snapshot, weight in zip(job.snapshots, job.fit.weights, strict=True):
        if weight == 0:
            continue
        for name, value in _load(snapshot.path).items():
            if name not in total:
                total[name] = torch.zeros(value.shape, dtype=torch.float64)
            total[name].add_(value.double(), alpha=float(weight))
    return {name: value.float() for name, value in total.items()}


def _load(path: Path) -> dict[str, Tensor]:
    try:
        values = load_file(path)
    except (OSError, SafetensorError) as err:
        raise ConfigError(
            f"{path} is damaged ({err}); restore it from a copy or move it elsewhere, the others "
            "suffice."
        ) from err
    for name, value in values.items():
        if not value.isfinite().all():
            raise ConfigError(
                f"{path} is damaged: {name} holds values that are not finite; restore it from a "
                "copy or move it elsewhere, the others suffice."
            )
    return values


def reconstruct(job: Reconstruction) -> None:
    """Write the average of the wanted width."""
    metadata = {
        "step": str(job.step),
        "std": repr(job.profile.std),
        "gamma": repr(job.profile.gamma),
        "residual": repr(job.fit.residual),
    }
    weights = add_up(job)
    try:
        job.output.parent.mkdir(parents=True, exist_ok=True)
        write_weights(job.output, weights, metadata)
    except NonFiniteWeightsError as err:
        raise ConfigError(
            f"{job.snapshots[0].path.parent}: the sum's {err}, so a snapshot is damaged; restore "
            "the snapshots."
        ) from err
    except (OSError, SafetensorError) as err:
        raise ConfigError(
            f"--output {job.output}: {describe_disk_error(err)}; free some space or choose another."
        ) from err


def main(argv: list[str] | None = None) -> None:
    """Make the average that the command line asks for."""
    with exit_on_config_error():
        args = build_parser().parse_args(argv)
        job = check(args)
        reconstruct(job)
    print(
        f"{job.output}: average of relative width {job.profile.std} at step {job.step} from "
        f"{len(job.snapshots)} snapshots; relative residual of its profile {job.fit.residual:.2%}"
    )
    if job.fit.residual > ROUGH_RESIDUAL:
        sys.stderr.write(
            f"warning: with a residual of {job.fit.residual:.0%} this is only roughly the average "
            f"of width {job.profile.std}; {_better(job.snapshots)}.\n"
        )


if __name__ == "__main__":
    enter(main)
