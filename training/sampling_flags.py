"""The flags that say how images are drawn, and what they may not say together."""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from data_tools.errors import ArgumentParser, ConfigError
from data_tools.manifest import DatasetManifest
from data_tools.paths import typed_text
from models.guidance import OFFICIAL_CHANNELS, Guidance
from models.sampler import SAMPLING_METHODS, methods_for
from training.config import Config, option_named
from training.option import check_value, either
from training.run_directory import load_config, load_manifest
from training.sampling import SamplerSettings, can_guide_without_classifier
from training.weight_files import find_weights, is_same_file

DEFAULT_SCALE = 2.0
DEFAULT_STEPS = 50


@dataclass(frozen=True)
class WeakerRun:
    """The run that autoguidance moves away from."""

    config: Config
    weights: Path


def add_sampling_flags(parser: ArgumentParser, default_steps: int | None = DEFAULT_STEPS) -> None:
    """Add the flags to a command that draws images from a run.

    Args:
        parser: of the command.
        default_steps: of --steps; None = the command fills in DEFAULT_STEPS itself.
    """
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
    if args.steps < 1:
        raise ConfigError(f"--steps must be at least 1, not {args.steps}.")
    if args.steps > config.diffusion.num_timesteps:
        raise ConfigError(
            f"--steps {args.steps} exceeds the {config.diffusion.num_timesteps} timesteps of the "
            "model; use fewer."
        )
    methods = methods_for(config.diffusion.objective)
    method = args.sampler or methods[0]
    if method not in methods:
        raise ConfigError(
            f"--sampler {method} does not fit objective {config.diffusion.objective}; use "
            f"{either(methods)}."
        )
    check_value(option_named("seed"), args.seed, "--seed")
    return SamplerSettings(
        method, args.steps, args.seed, guidance=_guidance(args, config), shift=_shift(args, config)
    )


def _shift(args: argparse.Namespace, config: Config) -> float:
    diffusion = config.diffusion
    if args.shift is None:
        return diffusion.timestep_shift if diffusion.objective == "flow" else 1.0
    if diffusion.objective != "flow":
        raise ConfigError(
            f"--shift {args.shift} does not fit objective {diffusion.objective}: only the times of "
            "flow are shifted; drop the flag."
        )
    if not 0 < args.shift < math.inf:
        raise ConfigError(f"--shift must be a number above 0, not {args.shift}.")
    return args.shift


def _guidance(args: argparse.Namespace, config: Config) -> Guidance:
    if args.autoguidance is None:
        if args.autoguidance_scale is not None:
            raise ConfigError(
                f"--autoguidance-scale {args.autoguidance_scale} needs the run to guide by; add "
                "--autoguidance RUN."
            )
        scale = _cfg_scale(args, config)
    else:
        if args.cfg_scale not in (None, 1.0):
            raise ConfigError(
                f"--cfg-scale {args.cfg_scale} and --autoguidance exclude each other; set the "
                "latter's strength with --autoguidance-scale."
            )
        scale = _number("--autoguidance-scale", args.autoguidance_scale, DEFAULT_SCALE)
    for flag, value in (
        ("--guidance-interval", args.guidance_interval),
        ("--cfg-channels", args.cfg_channels),
    ):
        if scale == 1.0 and value is not None:
            raise ConfigError(
                f"{flag} has no effect without guidance, whose scale is 1; choose another scale "
                "or drop the flag."
            )
    num_channels = OFFICIAL_CHANNELS if args.cfg_channels == "three" else None
    return Guidance(scale, num_channels, _interval(args, config.diffusion.num_timesteps))


def _cfg_scale(args: argparse.Namespace, config: Config) -> float:
    is_possible = can_guide_without_classifier(config)
    scale = _number("--cfg-scale", args.cfg_scale, DEFAULT_SCALE if is_possible else 1.0)
    if scale != 1.0 and not is_possible:
        dropped = f"with --class-dropout-prob {config.data.class_dropout_prob:g}"
        reason = dropped if config.model.num_classes else "without classes"
        raise ConfigError(
            f"--cfg-scale {scale} compares predictions with and without the label, but this run "
            f"was trained {reason}; use --cfg-scale 1."
        )
    return scale


def _number(flag: str, value: float | None, default: float) -> float:
    if value is None:
        return default
    if not 0 <= value < math.inf:
        raise ConfigError(f"{flag} must be a number of at least 0, not {value}.")
    return value


def _interval(args: argparse.Namespace, num_timesteps: int) -> tuple[float, float] | None:
    if args.guidance_interval is None:
        return None
    low, high = args.guidance_interval
    if not 0 <= low <= high <= 1:
        raise ConfigError(
            f"--guidance-interval {low} {high} is no interval within 0 and 1; give the lower end "
            "first."
        )
    return low * num_timesteps, high * num_timesteps


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
        names, weak_names = _class_names(manifest), _class_names(weak_manifest)
        for i in sorted(names.keys() | weak_names.keys()):
            pairs.append((f"class {i}", weak_names.get(i, "missing"), names.get(i, "missing")))
    for name, theirs, ours in pairs:
        if theirs != ours:
            raise ConfigError(
                f"its {name} is {theirs} and that of the run to guide is {ours}; use a run that "
                "differs in size, routing or training only."
            )


def _class_names(manifest: DatasetManifest) -> dict[int, str]:
    return {entry.index: entry.name for entry in manifest.classes}


def _latent_space(manifest: DatasetManifest) -> tuple[object, ...]:
    return manifest.vae.sha256[:12], *manifest.vae.normalisation
