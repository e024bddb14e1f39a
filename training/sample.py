"""Draw images from a trained run: a labelled grid and one PNG per image.

    python training/sample.py runs/demo

The first average of the weights, unless --ema, --raw or --weights names others. Image i depends on
(seed, i) and its class alone, so any number of processes draws the same images:
torchrun --nproc-per-node 2 training/sample.py runs/demo
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data_tools.errors import ArgumentParser, ConfigError, exit_on_config_error
from data_tools.process.entry_point import enter
from data_tools.shards.manifest import DatasetManifest
from data_tools.user_files.paths import typed_path, typed_text
from data_tools.vae.autoencoder import Vae, decode_pixels, load_decoder
from training.checkpoints.weight_files import load_model
from training.config.tree import Config
from training.engine.objective import build_diffusion
from training.monitoring.expert_pictures import save_png
from training.ranks.process_group import (
    Ranks,
    enter_job,
    one_sentence,
    select_accelerator,
    start_drawing_group,
)
from training.run.directory import SAMPLES_DIR, load_config, load_manifest
from training.run.weights import find_weights
from training.sampling.checks import WrongValueError
from training.sampling.class_choice import ClassChoice
from training.sampling.flags import (
    WeakerRun,
    add_sampling_flags,
    find_weaker_run,
    sampler_settings,
)
from training.sampling.latents import SamplerSettings, image_grid, sample_latents

DEFAULT_MAX_CLASSES = 10


@dataclass(frozen=True)
class ImagePlan:
    """Which class each image shows."""

    labels: list[int]  # one per image
    class_names: list[str]  # one per grid row
    per_class: int


@dataclass(frozen=True)
class SampleJob:
    """A checked command."""

    config: Config
    plan: ImagePlan
    settings: SamplerSettings
    weights: Path
    weaker_run: WeakerRun | None
    vae: Vae
    output: Path  # exists


def build_parser() -> ArgumentParser:
    """Build the command line."""
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run_dir", type=typed_path, help="a run directory, e.g. runs/demo")
    parser.add_argument("--checkpoint", metavar="TAG", help="e.g. step-0001000 (default: latest)")
    parser.add_argument("--raw", action="store_true", help="raw weights instead of averaged ones")
    parser.add_argument(
        "--ema", metavar="NAME", help="an average by name, e.g. 0.9999 or std0.050 (default: first)"
    )
    parser.add_argument(
        "--weights", type=typed_path, metavar="FILE", help="a file of reconstruct_ema.py, or alike"
    )
    parser.add_argument(
        "--classes",
        metavar="LIST",
        help="classes by name, or by number where no class is called so, comma-separated "
        "(default: first 10)",
    )
    parser.add_argument(
        "--class-numbers", metavar="LIST", help="classes by number, whatever they are called"
    )
    parser.add_argument("--per-class", type=int, default=8, metavar="N", help="images per class")
    parser.add_argument("--batch-size", type=int, default=40, metavar="N", help="images at a time")
    parser.add_argument(
        "--vae", type=typed_text, metavar="FOLDER|FILE|ID", help="default: the run's"
    )
    parser.add_argument(
        "--output", type=typed_path, metavar="FOLDER", help="default: RUN/samples/TAG"
    )
    add_sampling_flags(parser)
    return parser


def plan_images(args: argparse.Namespace, config: Config, manifest: DatasetManifest) -> ImagePlan:
    """Decide the class of every image; refuse unknown classes."""
    num_classes = config.model.num_classes
    asked = {"--classes": args.classes, "--class-numbers": args.class_numbers}
    given = [flag for flag, value in asked.items() if value is not None]
    if num_classes == 0:
        if given:
            raise ConfigError(f"{given[0]}: this run is unconditional; drop the flag.")
        return ImagePlan([0] * args.per_class, ["unconditional"], args.per_class)
    if len(given) > 1:
        raise ConfigError("--classes and --class-numbers both choose the classes; give one.")
    names = {entry.index: entry.name for entry in manifest.classes}
    flag = given[0] if given else "--classes"
    choice = ClassChoice(num_classes, names, flag, "--class-numbers {}")
    try:
        if args.classes is not None:
            chosen = choice.find_all(args.classes)
        elif args.class_numbers is not None:
            chosen = choice.numbers_in(args.class_numbers)
        else:
            chosen = list(range(min(num_classes, DEFAULT_MAX_CLASSES)))
    except WrongValueError as err:
        raise ConfigError(str(err)) from err
    labels = [index for index in chosen for _ in range(args.per_class)]
    return ImagePlan(labels, [choice.name_of(index) for index in chosen], args.per_class)


def check_counts(args: argparse.Namespace) -> None:
    """Refuse numbers that cannot be meant."""
    for name in ("per_class", "batch_size"):
        if getattr(args, name) < 1:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} must be at least 1, not {getattr(args, name)}.")


def check(args: argparse.Namespace, device: torch.device) -> SampleJob:
    """Check everything before a process group exists; then, last, make the output folder."""
    config = load_config(args.run_dir)
    check_counts(args)
    settings = sampler_settings(args, config)
    manifest = load_manifest(args.run_dir)
    plan = plan_images(args, config, manifest)
    weights = find_weights(
        args.run_dir,
        config,
        checkpoint=args.checkpoint,
        ema=args.ema,
        is_raw=args.raw,
        file=args.weights,
    )
    weaker_run = None
    if args.autoguidance is not None:
        weaker_run = find_weaker_run(args.autoguidance, config, manifest, weights)
    vae = load_decoder(args.vae or config.run.vae, manifest.vae, device)
    name = weights.parent.name if args.weights is None else weights.stem
    output = args.output or args.run_dir / SAMPLES_DIR / name
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise ConfigError(f"--output {output}: {err.strerror}; choose another.") from err
    return SampleJob(config, plan, settings, weights, weaker_run, vae, output)


def draw(args: argparse.Namespace, job: SampleJob, ranks: Ranks, device: torch.device) -> Path:
    """Draw this rank's images into the output folder, and on rank 0 the grid.

    Returns:
        The path of the grid.
    """
    config, plan, output = job.config, job.plan, job.output
    model = load_model(config, job.weights, device)
    weaker = job.weaker_run
    weak_model = None if weaker is None else load_model(weaker.config, weaker.weights, device)
    diffusion = build_diffusion(config).to(device)
    mine = list(range(ranks.rank, len(plan.labels), ranks.world_size))
    batches = [mine[i : i + args.batch_size] for i in range(0, len(mine), args.batch_size)]
    with tqdm(
        total=len(batches) * args.steps, unit="step", disable=not ranks.is_main, desc="sampling"
    ) as progress:
        for batch in batches:
            latents = sample_latents(
                model,
                diffusion,
                job.settings,
                indices=torch.tensor(batch, device=device),
                labels=torch.tensor([plan.labels[i] for i in batch], device=device),
                latent_shape=config.model.latent_shape,
                null_class=config.model.num_classes,
                weak_model=weak_model,
                on_step=lambda _step: progress.update(),
            )
            for i, picture in zip(batch, decode_pixels(job.vae, latents), strict=True):
                _save(output / _file_name(i, plan), picture)
    if ranks.world_size > 1:
        torch.distributed.barrier()
    grid_path = output / "grid.png"
    if ranks.is_main:
        files = [output / _file_name(i, plan) for i in range(len(plan.labels))]
        pixels = np.stack([np.asarray(Image.open(file)) for file in files])
        _save(grid_path, image_grid(pixels, columns=plan.per_class, row_labels=plan.class_names))
    return grid_path


def _save(path: Path, picture: np.ndarray) -> None:
    try:
        save_png(path, picture)
    except OSError as err:
        raise ConfigError(
            f"--output {path.parent}: cannot write {path.name} ({err.strerror}); free some space "
            "or choose another."
        ) from err


def _file_name(i: int, plan: ImagePlan) -> str:
    name = plan.class_names[i // plan.per_class]
    safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
    return f"{i:05d}-{safe}.png"


def main(argv: list[str] | None = None) -> None:
    """Draw images from the command line's run."""
    with exit_on_config_error():
        ranks = enter_job()
        device = select_accelerator(ranks)
    with one_sentence(ranks):
        args = build_parser().parse_args(argv)
        job = check(args, device)
    with one_sentence(ranks):
        if ranks.world_size > 1:
            start_drawing_group(ranks)
        grid_path = draw(args, job, ranks, device)
    if ranks.is_main:
        print(f"grid of samples: {grid_path}")
    if ranks.world_size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    enter(main)
