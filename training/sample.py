"""Draw images from a trained run: a labelled grid and one PNG per image.

    python training/sample.py runs/demo

The weights are the run's first average, unless --ema, --raw or --weights names others. Image i
depends only on (seed, i) and its class, so any number of processes draws the same images:
torchrun --nproc-per-node 2 training/sample.py runs/demo
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data_tools.errors import ArgumentParser, ConfigError, exit_on_config_error, refuse_below_one
from data_tools.process.entry_point import enter
from data_tools.shards.manifest import DatasetManifest
from data_tools.user_files.paths import typed_path
from data_tools.vae.autoencoder import Vae, load_decoder
from training.config.tree import Config
from training.evaluation.drawing import (
    DRAW,
    SETTINGS_FILE,
    DrawSettings,
    as_rank_0_says,
    disk_errors,
    failing_together,
    holds,
)
from training.evaluation.job import draw_settings
from training.ranks.process_group import (
    Ranks,
    enter_job,
    one_sentence,
    select_accelerator,
    start_drawing_group,
)
from training.run.directory import SAMPLES_DIR
from training.sampling.checks import WrongValueError
from training.sampling.class_choice import ClassChoice
from training.sampling.flags import (
    WeakerRun,
    add_precision_flag,
    add_sampling_flags,
    add_vae_flag,
    add_weight_flags,
    check_precision,
    class_names,
    find_weaker_run,
    open_run,
    sampler_settings,
)
from training.sampling.image_files import image_grid, save_png
from training.sampling.latents import SamplerSettings
from training.sampling.pipeline import draw_batch, load_pipeline

DEFAULT_MAX_CLASSES = 10
GRID_FILE = "grid.png"


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
    drawn: DrawSettings  # what will be in it


def build_parser() -> ArgumentParser:
    """Build the command line."""
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    add_weight_flags(parser)
    add_vae_flag(parser)
    add_precision_flag(parser)
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
        "--output",
        type=typed_path,
        metavar="FOLDER",
        help="default: RUN/samples/TAG, or TAG-2 and so on if other images are there",
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
    flag = given[0] if given else "--classes"
    choice = ClassChoice(num_classes, class_names(manifest), flag, "--class-numbers {}")
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


def check(args: argparse.Namespace, device: torch.device) -> SampleJob:
    """Check everything before a process group exists; then, last, make the output folder."""
    run = open_run(args)
    config, manifest = run.config, run.manifest
    refuse_below_one(args, "per_class", "batch_size")
    check_precision(args.precision, device)
    settings = sampler_settings(args, config)
    plan = plan_images(args, config, manifest)
    weights = run.find_weights(args)
    weaker_run = None
    if args.autoguidance is not None:
        weaker_run = find_weaker_run(args.autoguidance, config, manifest, weights)
    vae = load_decoder(args.vae or config.run.vae, manifest.vae, device)
    drawn = draw_settings(
        config,
        settings,
        num_images=len(plan.labels),
        labels=",".join(map(str, plan.labels[:: plan.per_class])),
        batch_size=args.batch_size,
        weights=weights,
        weaker_run=weaker_run,
        vae=vae,
        precision=args.precision,
    )
    name = weights.parent.name if args.weights is None else weights.stem
    output = args.output or run.folder / SAMPLES_DIR / name
    try:
        if args.output is None:
            output = unused_folder(output, drawn)
        output.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise ConfigError(f"--output {output}: {err.strerror}; choose another.") from err
    return SampleJob(config, plan, settings, weights, weaker_run, vae, output, drawn)


def unused_folder(folder: Path, drawn: DrawSettings) -> Path:
    """Return the first of FOLDER, FOLDER-2, ... that holds nothing, or these very images."""
    found, number = folder, 1
    while found.exists() and any(found.iterdir()) and not holds(found, drawn):
        number += 1
        found = folder.with_name(f"{folder.name}-{number}")
    return found


def draw(args: argparse.Namespace, job: SampleJob, ranks: Ranks, device: torch.device) -> Path:
    """Draw this rank's images; return the path of rank 0's grid. All ranks must call this."""
    plan, output = job.plan, as_rank_0_says(job.output, ranks)
    grid_path = output / GRID_FILE
    with failing_together(ranks):
        if ranks.is_main:
            with disk_errors(output, what_stays=""):
                _begin_folder(output, job.drawn)
        for i, picture in _pictures(args, job, ranks, device):
            with disk_errors(output, what_stays=""):
                save_png(output / _file_name(i, plan), picture)
    if ranks.is_main:
        files = [output / _file_name(i, plan) for i in range(len(plan.labels))]
        pixels = np.stack([np.asarray(Image.open(file)) for file in files])
        grid = image_grid(pixels, columns=plan.per_class, row_labels=plan.class_names)
        with disk_errors(output, what_stays=""):
            save_png(grid_path, grid)
    return grid_path


def _begin_folder(output: Path, drawn: DrawSettings) -> None:
    """Write what the folder will hold; warn if that replaces other images."""
    is_used = any((output / name).exists() for name in (GRID_FILE, SETTINGS_FILE))
    if is_used and not holds(output, drawn):
        sys.stderr.write(
            f"warning: --output {output}: replaces images drawn otherwise; those of other names "
            "stay beside the new ones.\n"
        )
    DRAW.write(output / SETTINGS_FILE, drawn)


def _pictures(
    args: argparse.Namespace, job: SampleJob, ranks: Ranks, device: torch.device
) -> Iterator[tuple[int, np.ndarray]]:
    """Draw this rank's images: the number of each, and its pixels (H, W, 3) uint8."""
    pipeline = load_pipeline(
        job.config, job.weights, job.weaker_run, job.vae, device, job.drawn.precision
    )
    labels = torch.tensor(job.plan.labels, device=device)
    mine = torch.arange(len(labels), device=device)[ranks.rank :: ranks.world_size]
    batches = mine.split(args.batch_size) if len(mine) else ()
    with tqdm(
        total=len(batches) * args.steps, unit="step", disable=not ranks.is_main, desc="sampling"
    ) as progress:
        for batch in batches:
            pictures = draw_batch(
                pipeline, job.settings, batch, labels[batch], lambda _step: progress.update()
            )
            yield from zip(batch.tolist(), pictures, strict=True)


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
