"""Check an export command: find the run and its weights, decide how the result draws images."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from data_tools.errors import ConfigError
from data_tools.formats import Format
from data_tools.shards.manifest import DatasetManifest
from data_tools.vae.autoencoder import Vae, load_decoder
from models.network_options import NetworkOptions
from models.switch_dit import SwitchDiT
from training.checkpoints.manifest import MANIFEST_FILE, RAW_FILE, read_manifest, sha256_of
from training.config.network import network_options
from training.config.tree import Config
from training.engine.average_profiles import profiles_of
from training.sampling.flags import class_names, open_run, sampler_settings
from training.sampling.latents import SamplerSettings, can_guide_without_classifier

EXPORTS_DIR = "exports"
EXPORT_FILE = "export.json"  # in every export; what has none is never replaced
EXPORT = Format(newest=1)  # of this file, and of config.json beside plain weights


@dataclass(frozen=True)
class Origin:
    """Where exported weights come from; part of EXPORT_FILE."""

    run: str
    weights: str  # "average 0.9999", "raw weights", or the name of another file
    file: str
    sha256: str
    checkpoint: str | None  # these three: None for a file that is of no checkpoint
    step: int | None
    samples_seen: int | None


@dataclass(frozen=True)
class ExportJob:
    """A checked command, apart from what its format may refuse."""

    run_dir: Path
    config: Config  # of the run
    manifest: DatasetManifest  # of the data that it was trained on
    weights: Path  # its file that is exported
    origin: Origin  # what to say of them
    settings: SamplerSettings  # how the result draws images unless told otherwise
    guidance_interval: tuple[float, float] | None  # fractions of the timesteps; None = all
    vae: Vae | None  # that decodes; None where the format holds none
    output: Path  # folder that will hold the result

    @property
    def id2label(self) -> dict[str, str] | None:
        """Names of the classes by number, as JSON has them; None without classes."""
        if self.config.model.num_classes == 0:
            return None
        return {str(number): name for number, name in class_names(self.manifest).items()}

    @property
    def default_guidance(self) -> dict[str, Any]:
        """How the result guides unless told otherwise."""
        guidance = self.settings.guidance
        return {
            "is_possible": can_guide_without_classifier(
                self.config.model.num_classes, self.config.data.class_dropout_prob
            ),
            "scale": guidance.scale,
            "num_channels": guidance.num_channels,
            "interval": self.guidance_interval,
        }

    def load_weights(self) -> dict[str, Tensor]:
        """Read the weights, fp32, experts stacked."""
        return load_file(self.weights)

    @property
    def options(self) -> NetworkOptions:
        """What the network is built from, less what changes nothing but its training's cost."""
        options = network_options(self.config)
        return replace(options, compile_blocks=False, activation_checkpointing=False)

    def load_model(self) -> SwitchDiT:
        """Build the network with these weights."""
        model = SwitchDiT(self.options)
        model.load_state_dict(self.load_weights())
        return model.eval()


def check_job(args: argparse.Namespace, has_vae: bool) -> ExportJob:
    """Find what the command line asks for; write nothing. `has_vae`: the format holds the VAE."""
    run = open_run(args)
    run_dir, config, manifest = run.folder, run.config, run.manifest
    if args.autoguidance is not None:
        raise ConfigError(
            f"--autoguidance {args.autoguidance} needs the weights of two runs, and an export "
            "holds those of one; drop the flag."
        )
    settings = sampler_settings(args, config)
    weights = run.find_weights(args)
    origin = _origin_of(weights, run_dir, config)
    output = args.output
    if output is None:
        kind = origin.weights.removeprefix("average ").replace(" ", "-")
        output = run_dir / EXPORTS_DIR / f"{args.format}-{origin.checkpoint or 'file'}-{kind}"
    check_output(output, args.force)
    if args.vae is not None and not has_vae:
        raise ConfigError(
            f"--vae {args.vae} has no effect: --format {args.format} holds no VAE; drop the flag."
        )
    named = args.vae or config.run.vae
    vae = load_decoder(named, manifest.vae, torch.device("cpu")) if has_vae else None
    return ExportJob(
        run_dir=run_dir,
        config=config,
        manifest=manifest,
        weights=weights,
        origin=origin,
        settings=settings,
        guidance_interval=args.guidance_interval and tuple(args.guidance_interval),
        vae=vae,
        output=output,
    )


def _origin_of(weights: Path, run_dir: Path, config: Config) -> Origin:
    name = run_dir.resolve().name
    if not (weights.parent / MANIFEST_FILE).exists():
        file = weights.name
        return Origin(name, weights.stem, file, sha256_of(weights), None, None, None)
    manifest = read_manifest(weights.parent)
    profile = profiles_of(config.optim).get(weights.stem)
    kind = weights.stem if profile is None else f"average {profile.name}"
    return Origin(
        name,
        "raw weights" if weights.name == RAW_FILE else kind,
        weights.name,
        manifest.files[weights.name].sha256,
        manifest.tag,
        manifest.state.step,
        manifest.state.samples_consumed,
    )


def check_output(output: Path, is_forced: bool) -> None:
    """Refuse to replace anything, unless it is an export and that is asked for."""
    if not output.exists() and not output.is_symlink():
        return
    if not is_forced:
        raise ConfigError(
            f"--output {output} exists; choose another folder, or replace it with --force."
        )
    if output.is_symlink() or not (output / EXPORT_FILE).is_file():
        raise ConfigError(
            f"--force: --output {output} has no {EXPORT_FILE}, so it is no export and is not "
            "replaced; choose another --output."
        )
