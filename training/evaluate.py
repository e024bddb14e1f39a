"""Measure a trained run: draw images in numbers, score them, and compute the held-out loss.

    python training/evaluate.py runs/XL --num-images 50000 --cfg-scale 1.5 --steps 250 \\
        --sampler ddpm --reference VIRTUAL_imagenet256_labeled.npz --inception weights.pth
    python training/evaluate.py runs/XL --validation-data datasets/held-out
    torchrun --nproc-per-node 8 training/evaluate.py runs/XL ...     # or srun

After a kill, the same command goes on; it draws the images of an undisturbed one. Each score is in
a JSON file with everything that is needed to get it again.
"""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from tqdm import tqdm

from data_tools.errors import ArgumentParser, count_of, exit_on_config_error
from data_tools.files import replace_file
from data_tools.process.entry_point import enter
from data_tools.process.launcher import is_started_again
from data_tools.user_files.paths import typed_data, typed_path
from models.precision import cast_network, products_in
from training.checkpoints.weight_files import load_model
from training.engine.objective import build_diffusion
from training.evaluation.card import (
    CARD,
    describe_images,
    describe_program,
    describe_reference,
    describe_vae,
    describe_weights,
    read_card,
    say_left_out,
    weights_sha256,
)
from training.evaluation.drawing import (
    CARD_FILE,
    LABEL_RULES,
    as_rank_0_says,
    disk_errors,
    draw,
    failing_together,
    merge_parts,
    prepare_folder,
    write_pngs,
)
from training.evaluation.held_out_loss import SEED, held_out_loss
from training.evaluation.image_npz import ImageNpz
from training.evaluation.job import EVALUATION_DIR, EvaluationJob, Point, check, name_of_weights
from training.evaluation.networks import add_network_flags
from training.evaluation.score_events import write_score_events
from training.evaluation.scores import Reference, said, score
from training.evaluation.sweep import SweepPoint, plot_of, table_of
from training.ranks.process_group import (
    Ranks,
    enter_job,
    one_sentence,
    select_accelerator,
    start_drawing_group,
)
from training.sampling.flags import (
    add_precision_flag,
    add_sampling_flags,
    add_vae_flag,
    add_weight_flags,
)
from training.sampling.image_files import save_png
from training.sampling.pipeline import load_pipeline

DEFAULT_BATCH_SIZE = 64
# A rank that is done waits for the slowest, who may draw for long; a dead one is noticed at once.
PATIENCE = timedelta(days=1)


def build_parser() -> ArgumentParser:
    """Build the command line."""
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add_weight_flags(parser)
    add_vae_flag(parser)
    add_precision_flag(parser)
    add("--output", type=typed_path, metavar="FOLDER", help=f"default: RUN/{EVALUATION_DIR}")
    add("--force", action="store_true", help="draw and score anew what is there already")
    add = parser.add_argument_group("images").add_argument
    add("--num-images", type=int, metavar="N", help="to draw; published scores are of 50000")
    add(
        "--batch-size",
        type=int,
        default=DEFAULT_BATCH_SIZE,
        metavar="N",
        help=f"images at a time, also what a kill may lose (default: {DEFAULT_BATCH_SIZE})",
    )
    rules = "; ".join(f"{name}: {rule}" for name, rule in LABEL_RULES.items())
    add("--labels", choices=LABEL_RULES, default="random", help=f"{rules} (default: random)")
    add("--png", action="store_true", help="write each image as a PNG file too")
    add("--reference", type=typed_path, metavar="NPZ", help="score the images against this")
    add_sampling_flags(parser, default_steps=None)
    add = parser.add_argument_group("sweeps: every combination, a table and a plot").add_argument
    add("--sweep-cfg-scale", metavar="LIST", help="e.g. 1,1.25,1.5")
    add("--sweep-steps", metavar="LIST", help="e.g. 25,50,250")
    add("--sweep-sampler", metavar="LIST", help="e.g. ddim,ddpm")
    add_network_flags(parser)
    add = parser.add_argument_group("held-out loss").add_argument
    add(
        "--validation-data",
        type=typed_data,
        metavar="DATA",
        help="encoded latents, as --data of main.py",
    )
    add(
        "--validation-samples",
        type=int,
        default=4096,
        metavar="N",
        help="of the data, at most (default: 4096)",
    )
    add(
        "--validation-timesteps",
        type=int,
        default=8,
        metavar="N",
        help="noise levels: the middles of N equal ranges of timesteps (default: 8)",
    )
    return parser


def draw_images(
    args: argparse.Namespace, job: EvaluationJob, ranks: Ranks, device: torch.device
) -> None:
    """Draw the missing images of all points. All ranks must call this."""
    pipeline = load_pipeline(
        job.config, job.weights, job.weaker_run, job.vae, device, job.precision
    )
    for point in job.points:
        with failing_together(ranks):
            if ranks.is_main:
                prepare_folder(point.folder, point.settings, is_forced=args.force)
        own = range(ranks.rank, point.settings.num_parts, ranks.world_size)
        with tqdm(
            total=sum(len(point.settings.indices(part)) for part in own),
            unit="image",
            desc=f"drawing {point.folder.name}",
            disable=not ranks.is_main,
        ) as progress:
            draw(
                pipeline,
                point.settings,
                point.sampler,
                job.class_counts,
                point.folder,
                ranks,
                progress.update,
            )


def finish_point(
    args: argparse.Namespace, job: EvaluationJob, point: Point, device: torch.device
) -> list[dict[str, Any]]:
    """Merge the parts of a point's images and score them. Only rank 0 calls this.

    Returns:
        A card per reference; one without "metrics" if there is nothing to compare with.
    """
    samples = merge_parts(point.folder, point.settings, job.class_counts)
    if args.png:
        write_pngs(samples, point.folder)
    return [
        write_card(job, point, samples, reference, device) for reference in job.references or [None]
    ]


def write_card(
    job: EvaluationJob,
    point: Point,
    samples: ImageNpz,
    reference: Reference | None,
    device: torch.device,
) -> dict[str, Any]:
    """Score a point's images unless that was done, and return the card. Only rank 0 calls this."""
    path = point.folder / CARD_FILE
    if reference is not None:
        against = f"{reference.sha256[:8]}-{reference.network.sha256[:8]}"
        path = point.folder / f"score-{against}.json"
    if path.exists():  # of these very images
        return read_card(path)
    card = {
        "weights": describe_weights(job.config, job.run_dir, job.weights),
        "images": describe_images(point.settings),
        "vae": describe_vae(job.vae, job.manifest.vae),
        "program": describe_program(device),
    }
    if reference is not None:
        with tqdm(total=samples.num_images, unit="image", desc="looking") as progress:
            metrics = score(samples, reference, progress.update)
        card = {"metrics": metrics, **describe_reference(reference, samples.num_images), **card}
    with disk_errors(path.parent):
        CARD.write(path, card)
    return card


def finish(
    args: argparse.Namespace, job: EvaluationJob, loss: dict[str, Any] | None, device: torch.device
) -> None:
    """Write and print everything that the command asked for. Only rank 0 calls this."""
    if job.held_out is not None:
        write_loss(job, loss, device)
    for told in dict.fromkeys(filter(None, map(say_left_out, job.references))):
        print(f"--reference {args.reference}: {told}")
    cards = [finish_point(args, job, point, device) for point in job.points]
    for point, found in zip(job.points, cards, strict=True):
        for card in found:
            parts = [count_of(f"{point.settings.num_images:,}", "image")]
            parts += [card["features"]["network"]] if len(found) > 1 else []
            parts += [said(card["metrics"])] if "metrics" in card else []
            print(f"{point.folder}: {', '.join(parts)}")
    if len(job.points) > 1:
        for reference, of_network in zip(job.references, zip(*cards, strict=True), strict=False):
            print(f"sweep: {write_sweep(job, reference, of_network)} and .png")
    if job.output == job.run_dir / EVALUATION_DIR:  # else they are nobody's but the user's
        with disk_errors(job.run_dir):
            write_score_events(job.run_dir)


def write_sweep(job: EvaluationJob, reference: Reference, cards: Sequence[dict[str, Any]]) -> Path:
    """Write the table of all points, as text and as a picture. Only rank 0 calls this."""
    points = [
        SweepPoint(
            point.settings.sampler,
            point.settings.steps,
            point.settings.guidance_scale,
            card["metrics"],
        )
        for point, card in zip(job.points, cards, strict=True)
    ]
    # Of the same points the same file, so that nothing else is ever overwritten.
    compared = (weights_sha256(job.weights), reference.sha256, reference.network.sha256)
    key = "\n".join((*compared, *(point.folder.name for point in job.points)))
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    name = f"sweep-{name_of_weights(job.weights)}-{digest}"
    title = f"{job.run_dir.resolve().name}, {name_of_weights(job.weights)}, "
    title += f"{job.points[0].settings.num_images:,} images, {reference.network.name}"
    path, table = job.output / f"{name}.txt", table_of(points)
    with disk_errors(job.output):
        replace_file(path, lambda file: file.write(table.encode()))
        save_png(path.with_suffix(".png"), plot_of(points, title))
    print(table, end="")
    return path


def measure_loss(
    args: argparse.Namespace, job: EvaluationJob, ranks: Ranks, device: torch.device
) -> dict[str, Any] | None:
    """Compute the held-out loss by term; None if its file exists. All ranks must call this."""
    is_kept = not args.force or is_started_again()  # then it is this job's own
    if as_rank_0_says(job.loss_path.exists() and is_kept, ranks):
        return None  # in the name are the weights and the samples
    with products_in(job.precision):
        return held_out_loss(
            cast_network(load_model(job.config, job.weights, device), job.precision),
            build_diffusion(job.config).to(device),
            job.held_out,
            ranks,
            device,
            batch_size=args.batch_size,
            cache=job.cache,
        )


def write_loss(job: EvaluationJob, loss: dict[str, Any] | None, device: torch.device) -> None:
    """Write the held-out loss and print it; None = print the one in the file. For rank 0."""
    held_out, diffusion, path = job.held_out, job.config.diffusion, job.loss_path
    if loss is None:
        loss = read_card(path)["validation_loss"]
    else:
        card = {
            "validation_loss": loss,
            "timesteps": held_out.timesteps,
            "seed": SEED,
            "num_samples": held_out.num_samples,
            "data_sha256": held_out.data.manifest.hash,
            "precision": job.precision,
            "objective": diffusion.objective,
            "noise_schedule": None if diffusion.objective == "flow" else diffusion.noise_schedule,
            "weights": describe_weights(job.config, job.run_dir, job.weights),
            "program": describe_program(device),
        }
        with disk_errors(job.output):
            job.output.mkdir(parents=True, exist_ok=True)
            CARD.write(path, card)
    means = ", ".join(f"{name} {term['mean']:.6f}" for name, term in loss.items())
    print(f"held-out loss: {means} ({path})")


def main(argv: list[str] | None = None) -> None:
    """Measure the run of the command line."""
    with exit_on_config_error():
        ranks = enter_job()
        device = select_accelerator(ranks)
    with one_sentence(ranks):
        args = build_parser().parse_args(argv)
        job = check(args, ranks, device)
    with one_sentence(ranks):
        if ranks.world_size > 1:
            start_drawing_group(ranks, PATIENCE)
        if job.points:
            draw_images(args, job, ranks, device)
        loss = None if job.held_out is None else measure_loss(args, job, ranks, device)
        # The others wait: some launchers end a job soon after its first process has left.
        with failing_together(ranks):
            if ranks.is_main:
                finish(args, job, loss, device)
    if ranks.world_size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    enter(main, when_stopped="the same command goes on with the images that are left")
