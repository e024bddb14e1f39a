"""Check an evaluation's command: what to draw, what to score against, which loss to compute."""

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path

import torch

from data_tools.errors import ConfigError, refuse_below_one
from data_tools.shards.manifest import DatasetManifest
from data_tools.storage.cache import ShardCache, open_cache
from data_tools.vae.autoencoder import Vae, load_decoder
from training.checkpoints.manifest import MANIFEST_FILE, read_manifest
from training.config.tree import Config
from training.evaluation.card import weights_sha256
from training.evaluation.drawing import DrawSettings, check_folder
from training.evaluation.held_out_loss import HeldOut, open_held_out
from training.evaluation.networks import load_networks
from training.evaluation.scores import Reference, check_count
from training.ranks.process_group import Ranks
from training.run.directory import EVALUATION_DIR
from training.sampling.flags import (
    DEFAULT_STEPS,
    WeakerRun,
    check_precision,
    find_weaker_run,
    open_run,
    sampler_settings,
)
from training.sampling.latents import SamplerSettings


@dataclass(frozen=True)
class Point:
    """One way of drawing the images."""

    sampler: SamplerSettings
    settings: DrawSettings
    folder: Path


@dataclass(frozen=True)
class EvaluationJob:
    """A checked command."""

    run_dir: Path
    config: Config
    manifest: DatasetManifest
    weights: Path
    weaker_run: WeakerRun | None
    vae: Vae | None  # only where images are drawn
    points: list[Point]  # empty = no images are drawn
    references: list[Reference]  # one per network; on rank 0, where images are scored
    held_out: HeldOut | None
    cache: ShardCache | None  # for held-out data
    output: Path  # folder of all evaluations
    precision: str  # of the network

    @property
    def loss_path(self) -> Path:
        """Where the held-out loss is kept; weights and samples are in the name."""
        found, data = self.held_out, self.held_out.data.manifest.hash[:8]
        name = f"validation-{name_of_weights(self.weights)}-{weights_sha256(self.weights)[:8]}"
        name += f"-t{len(found.timesteps)}-{found.num_samples}-{data}"
        return self.output / f"{name}{_suffix_of(self.precision)}.json"

    @property
    def class_counts(self) -> list[int]:
        """Samples of each class of the model's data; empty without classes."""
        return [c.count for c in self.manifest.classes] if self.config.model.num_classes else []


def check(args: argparse.Namespace, ranks: Ranks, device: torch.device) -> EvaluationJob:
    """Check everything before a process group exists and before anything is drawn or written."""
    run = open_run(args)
    config, manifest = run.config, run.manifest
    _check_flags(args)
    check_precision(args.precision, device)
    weights = run.find_weights(args)
    output = args.output or run.folder / EVALUATION_DIR
    points, references, weaker_run, vae = [], [], None, None
    if args.num_images is not None:
        if args.autoguidance is not None:
            weaker_run = find_weaker_run(args.autoguidance, config, manifest, weights)
        vae = load_decoder(args.vae or config.run.vae, manifest.vae, device)
        for sampler in _ways(args, config):
            settings = draw_settings(
                config,
                sampler,
                num_images=args.num_images,
                labels=args.labels if config.model.num_classes else "none",
                batch_size=args.batch_size,
                weights=weights,
                weaker_run=weaker_run,
                vae=vae,
                precision=args.precision,
            )
            folder = output / _name_of(weights, settings)
            points.append(Point(sampler, settings, folder))
            check_folder(folder, settings, is_forced=args.force)
        if args.reference is not None and ranks.is_main:
            size = tuple(points[0].settings.image_size)
            for network in load_networks(args, size, device):
                check_count(args.num_images, network, "--num-images")
                references.append(Reference(args.reference, network, size))
    held_out = cache = None
    if args.validation_data is not None:
        held_out = _held_out(args, config, manifest, weights)
        cache = open_cache(config.data.data_cache, config.data.data_cache_gib)
    return EvaluationJob(
        run_dir=run.folder,
        config=config,
        manifest=manifest,
        weights=weights,
        weaker_run=weaker_run,
        vae=vae,
        points=points,
        references=references,
        held_out=held_out,
        cache=cache,
        output=output,
        precision=args.precision,
    )


def _check_flags(args: argparse.Namespace) -> None:
    """Refuse numbers that cannot be meant, and flags that do nothing together."""
    refuse_below_one(args, "num_images", "batch_size", "validation_samples")
    needed = {"--reference": args.num_images, "--png": args.num_images}
    needed |= {f"--sweep-{name}": args.num_images for name in ("cfg-scale", "steps", "sampler")}
    for flag, other in needed.items():
        value = getattr(args, flag.removeprefix("--").replace("-", "_"))
        if value and other is None:
            raise ConfigError(f"{flag} needs images; add --num-images N, as 50000.")
    if args.num_images is None and args.validation_data is None:
        raise ConfigError(
            f"{args.run_dir}: nothing to evaluate; give --num-images N, with --reference NPZ to "
            "score them, or --validation-data DATA."
        )
    for flag in ("inception", "features"):
        if getattr(args, flag) is not None and args.reference is None:
            raise ConfigError(f"--{flag} needs something to compare with; add --reference NPZ.")
    for name in ("cfg_scale", "steps", "sampler"):
        flag = name.replace("_", "-")
        if getattr(args, f"sweep_{name}") and getattr(args, name) is not None:
            raise ConfigError(f"--{flag} and --sweep-{flag} say the same; give one of them.")


def _ways(args: argparse.Namespace, config: Config) -> list[SamplerSettings]:
    """Return the ways of sampling, one without a sweep."""
    choices = {
        "sampler": _listed(args.sweep_sampler, "--sweep-sampler", str),
        "steps": _listed(args.sweep_steps, "--sweep-steps", int),
        "cfg_scale": _listed(args.sweep_cfg_scale, "--sweep-cfg-scale", float),
    }
    values = {name: found or [getattr(args, name)] for name, found in choices.items()}
    ways = []
    for combination in itertools.product(*values.values()):
        given = dict(zip(values, combination, strict=True))
        given["steps"] = given["steps"] or DEFAULT_STEPS
        ways.append(sampler_settings(argparse.Namespace(**vars(args) | given), config))
    return ways


def _listed(text: str | None, flag: str, kind: type) -> list:
    """Read a list of values."""
    if text is None:
        return []
    try:
        values = [kind(part.strip()) for part in text.split(",")]
    except ValueError as err:
        raise ConfigError(f"{flag} {text}: is no list of numbers; write it as 1,1.5,2.") from err
    if len(set(values)) < len(values) or "" in values:
        raise ConfigError(f"{flag} {text}: names a value twice or nothing; name each once.")
    return values


def draw_settings(
    config: Config,
    sampler: SamplerSettings,
    *,
    num_images: int,
    labels: str,
    batch_size: int,
    weights: Path,
    weaker_run: WeakerRun | None,
    vae: Vae,
    precision: str,
) -> DrawSettings:
    """Put together what decides the bytes of an image set."""
    guidance, (_, height, width) = sampler.guidance, config.model.latent_shape
    kind = "classifier-free" if weaker_run is None else "autoguidance"
    return DrawSettings(
        num_images=num_images,
        seed=sampler.seed,
        labels=labels,
        sampler=sampler.method,
        steps=sampler.num_steps,
        shift=float(sampler.shift),
        guidance="none" if guidance.scale == 1.0 else kind,
        guidance_scale=float(guidance.scale),
        guidance_channels=guidance.num_channels or 0,
        guidance_interval=list(guidance.interval or ()),
        batch_size=batch_size,
        image_size=[height * vae.downsample, width * vae.downsample],
        weights_sha256=weights_sha256(weights),
        weaker_weights_sha256="" if weaker_run is None else weights_sha256(weaker_run.weights),
        vae_sha256=vae.sha256,
        precision=precision,
    )


def name_of_weights(weights: Path) -> str:
    """Name weights for people: step-0001000-ema, or the stem of a file outside of checkpoints."""
    if (weights.parent / MANIFEST_FILE).exists():
        return f"{weights.parent.name}-{weights.stem}"
    return weights.stem


def _name_of(weights: Path, settings: DrawSettings) -> str:
    guidance = {"none": "", "classifier-free": "-cfg", "autoguidance": "-auto"}[settings.guidance]
    scale = f"{settings.guidance_scale:g}" if guidance else ""
    return (
        f"{name_of_weights(weights)}-{settings.sampler}{settings.steps}{guidance}{scale}"
        f"-{settings.num_images}-seed{settings.seed}{_suffix_of(settings.precision)}"
    )


def _suffix_of(precision: str) -> str:
    """Mark the names of results that are not of fp32, the default."""
    return "" if precision == "fp32" else f"-{precision}"


def _held_out(
    args: argparse.Namespace, config: Config, manifest: DatasetManifest, weights: Path
) -> HeldOut:
    trained_on = None
    if (weights.parent / MANIFEST_FILE).exists():
        trained_on = read_manifest(weights.parent).data_hash
    return open_held_out(
        args.validation_data,
        config,
        manifest,
        trained_on,
        args.validation_samples,
        args.validation_timesteps,
    )
