"""Declare and check the flags of commands that use a trained run.

They say which run, which of its weights, and how images are drawn.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data_tools.errors import ArgumentParser, ConfigError
from data_tools.shards.manifest import DatasetManifest
from data_tools.user_files.paths import typed_path, typed_text
from models.guidance import OFFICIAL_CHANNELS
from models.precision import PRECISIONS
from models.sampler import SAMPLING_METHODS, methods_for
from training.checkpoints.manifest import CHECKPOINT_DIR
from training.checkpoints.weight_files import is_same_file
from training.config.old_flags import OF_DRAWING
from training.config.tree import Config
from training.run.directory import load_config, load_manifest
from training.run.weights import find_weights
from training.sampling.checks import (
    Asked,
    Process,
    Spelling,
    WrongValueError,
    checked_settings,
)
from training.sampling.latents import SamplerSettings, can_guide_without_classifier

DEFAULT_SCALE = 2.0
DEFAULT_STEPS = 50
FLAGS = Spelling(
    sampler="--sampler",
    steps="--steps",
    seed="--seed",
    shift="--shift",
    scale="--cfg-scale",
    interval="--guidance-interval",
    channels="--cfg-channels",
)


@dataclass(frozen=True)
class TrainedRun:
    """The run that a command was given, and which of its checkpoints.

    Attributes:
        folder: the run directory.
        checkpoint: its name; None = the latest.
        config: the run's configuration.
        manifest: of the data that it was trained on.
    """

    folder: Path
    checkpoint: str | None
    config: Config
    manifest: DatasetManifest

    def find_weights(self, args: argparse.Namespace) -> Path:
        """Return the file of weights that the flags of `add_weight_flags` choose, checked."""
        return find_weights(
            self.folder,
            self.config,
            checkpoint=self.checkpoint,
            ema=args.ema,
            is_raw=args.raw,
            file=args.weights,
        )


@dataclass(frozen=True)
class WeakerRun:
    """The run that autoguidance moves away from."""

    config: Config
    weights: Path


def add_run_argument(parser: ArgumentParser) -> None:
    """Add the run itself."""
    parser.add_bare_or_flag("run_dir", "--run-dir", typed_path, "RUN", "a run, e.g. runs/demo")


def add_vae_flag(parser: ArgumentParser) -> None:
    """Add --vae."""
    parser.add_argument(
        "--vae",
        type=typed_text,
        metavar="FOLDER|FILE|ID",
        help="that decodes the images (default: the run's)",
    )


def add_weight_flags(parser: ArgumentParser) -> None:
    """Add the run, and the flags that choose its weights."""
    add_run_argument(parser)
    add = parser.add_argument_group("weights").add_argument
    add(
        "--checkpoint",
        metavar="TAG",
        help="e.g. step-0001000 (default: latest); or give RUN/checkpoints/TAG as the run",
    )
    add("--raw", action="store_true", help="raw weights instead of averaged ones")
    add(
        "--ema", metavar="NAME", help="an average by name, e.g. 0.9999 or std0.050 (default: first)"
    )
    add("--weights", type=typed_path, metavar="FILE", help="a file of reconstruct_ema.py, or alike")


def add_precision_flag(parser: ArgumentParser) -> None:
    """Add --precision."""
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=PRECISIONS[0],
        help="of the network; the VAE is not affected. bf16: weights too; fast on GPUs and on CPUs "
        "that multiply bf16. tf32: on GPUs (default: fp32)",
    )


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse a precision that the device has not."""
    if precision == "tf32" and device.type == "cpu":
        raise ConfigError(
            "--precision tf32: is of GPUs, and this command runs on a CPU; use fp32 or bf16."
        )


def open_run(args: argparse.Namespace) -> TrainedRun:
    """Read what the run of `add_weight_flags` is.

    Raises:
        ConfigError: there is no run, or its files are damaged.
    """
    folder, checkpoint = args.run_dir, args.checkpoint
    if checkpoint is None and folder.absolute().parent.name == CHECKPOINT_DIR:
        folder, checkpoint = folder.absolute().parents[1], folder.name
    return TrainedRun(folder, checkpoint, load_config(folder), load_manifest(folder))


def add_sampling_flags(parser: ArgumentParser, default_steps: int | None = DEFAULT_STEPS) -> None:
    """Add the flags to a command that draws images from a run.

    Args:
        parser: of the command.
        default_steps: of --steps; None = the command fills in DEFAULT_STEPS itself.
    """
    parser.instead = OF_DRAWING
    add = parser.add_argument_group("sampling").add_argument
    add("--sampler", choices=SAMPLING_METHODS, help="default: ddim, or euler for objective flow")
    add(
        "--steps",
        type=int,
        default=default_steps,
        metavar="N",
        help="sampling steps; heun calls the model twice in each but the last (default: "
        f"{DEFAULT_STEPS})",
    )
    add(
        "--shift",
        type=float,
        metavar="X",
        help="objective flow: spend more steps on much noise (above 1) or on little (below); "
        "default: training's --timestep-shift",
    )
    add("--seed", type=int, default=0, metavar="N")
    add(
        "--cfg-scale",
        type=float,
        metavar="X",
        help=f"classifier-free guidance; 1 = none (default: {DEFAULT_SCALE:g}, or 1 with "
        "--autoguidance and for models that were trained without dropping labels)",
    )
    add(
        "--autoguidance",
        type=typed_text,
        metavar="RUN[:TAG]",
        help="guide by a smaller or less trained run on the same latents, instead of by labels",
    )
    add("--autoguidance-scale", type=float, metavar="X", help=f"default: {DEFAULT_SCALE:g}")
    add(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide only where the timestep, divided by their number, is between these; "
        "elsewhere the model is called once, unguided (default: 0 1)",
    )
    add(
        "--cfg-channels",
        choices=("all", "three"),
        help="latent channels that are guided, by either kind of guidance; three = the first "
        "three, as DiT does (default: all)",
    )


def sampler_settings(args: argparse.Namespace, config: Config) -> SamplerSettings:
    """Check the flags against each other and the run's configuration."""
    diffusion, channels = config.diffusion, config.model.latent_channels
    is_auto = args.autoguidance is not None
    can_guide = is_auto or can_guide_without_classifier(
        config.model.num_classes, config.data.class_dropout_prob
    )
    named = {"all": channels, "three": min(OFFICIAL_CHANNELS, channels), None: None}
    asked = Asked(
        sampler=args.sampler,
        steps=args.steps,
        seed=args.seed,
        shift=args.shift,
        scale=_asked_scale(args),
        interval=args.guidance_interval,
        channels=named[args.cfg_channels],
    )
    default = Asked(
        sampler=methods_for(diffusion.objective)[0],
        shift=diffusion.timestep_shift if diffusion.objective == "flow" else 1.0,
        scale=DEFAULT_SCALE if can_guide else 1.0,
    )
    process = Process(
        diffusion.objective,
        diffusion.num_timesteps,
        channels,
        "" if can_guide else f"this run was trained {_why_not(config)}",
    )
    call = replace(FLAGS, scale="--autoguidance-scale") if is_auto else FLAGS
    try:
        return checked_settings(asked, default, process, call)
    except WrongValueError as err:
        raise ConfigError(str(err)) from err


def _asked_scale(args: argparse.Namespace) -> float | None:
    """Return the scale of the one kind of guidance that is asked for."""
    if args.autoguidance is None:
        if args.autoguidance_scale is not None:
            raise ConfigError(
                f"--autoguidance-scale {args.autoguidance_scale} needs the run to guide by; add "
                "--autoguidance RUN."
            )
        return args.cfg_scale
    if args.cfg_scale not in (None, 1.0):
        raise ConfigError(
            f"--cfg-scale {args.cfg_scale} and --autoguidance exclude each other; set the "
            "latter's strength with --autoguidance-scale."
        )
    return args.autoguidance_scale


def _why_not(config: Config) -> str:
    """Say what kept a run from learning what guidance by labels compares."""
    if config.model.num_classes == 0:
        return "without classes"
    return f"with --class-dropout-prob {config.data.class_dropout_prob:g}"


def find_weaker_run(
    text: str, config: Config, manifest: DatasetManifest, weights: Path
) -> WeakerRun:
    """Locate the run of --autoguidance RUN[:TAG] and check that it denoises the same latents.

    Args:
        text: the flag's value.
        config: of the run that is guided.
        manifest: of the data that it was trained on.
        weights: its file that is sampled from.
    """
    where = f"--autoguidance {text}"
    run_dir, tag = Path(text), None
    if not run_dir.is_dir() and ":" in text:
        name, tag = text.rsplit(":", 1)
        run_dir = Path(name)
    try:
        weak = load_config(run_dir)
        weak_manifest = load_manifest(run_dir)
        _check_same_process(weak, weak_manifest, config, manifest)
        weak_weights = find_weights(run_dir, weak, checkpoint=tag)
    except ConfigError as err:
        raise ConfigError(f"{where}: {str(err).removeprefix('--checkpoint: ')}") from err
    if is_same_file(weak_weights, weights):
        raise ConfigError(
            f"{where} has the very weights that are to be guided ({weak_weights}), which changes "
            "nothing at twice the cost; choose an earlier checkpoint with RUN:TAG, or another run."
        )
    return WeakerRun(weak, weak_weights)


def _check_same_process(
    weak: Config, weak_manifest: DatasetManifest, config: Config, manifest: DatasetManifest
) -> None:
    """Refuse a weaker run whose predictions mean something else."""
    pairs = [
        ("latents (channels, height, width)", weak.model.latent_shape, config.model.latent_shape),
        ("VAE", _latent_space(weak_manifest), _latent_space(manifest)),
        ("num_classes", weak.model.num_classes, config.model.num_classes),
        ("objective", weak.diffusion.objective, config.diffusion.objective),
        ("num_timesteps", weak.diffusion.num_timesteps, config.diffusion.num_timesteps),
    ]
    if config.diffusion.objective != "flow":
        schedules = weak.diffusion.noise_schedule, config.diffusion.noise_schedule
        pairs.append(("noise_schedule", *schedules))
    if config.model.num_classes:
        names, weak_names = class_names(manifest), class_names(weak_manifest)
        for i in sorted(names.keys() | weak_names.keys()):
            pairs.append((f"class {i}", weak_names.get(i, "missing"), names.get(i, "missing")))
    for name, theirs, ours in pairs:
        if theirs != ours:
            raise ConfigError(
                f"its {name} is {theirs} and that of the run to guide is {ours}; use a run that "
                "differs in size, routing or training only."
            )


def class_names(manifest: DatasetManifest) -> dict[int, str]:
    """Return the names of a data set's classes by number."""
    return {entry.index: entry.name for entry in manifest.classes}


def _latent_space(manifest: DatasetManifest) -> tuple[object, ...]:
    return manifest.vae.sha256[:12], *manifest.vae.normalisation
