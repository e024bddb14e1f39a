"""Score a set of images: FID, sFID, KID, Inception Score, precision and recall.

    python training/score_images.py samples.npz --reference VIRTUAL_imagenet256_labeled.npz

Both are npz files in ADM's format. With --features networks of yours take Inception's place, and
the results are called Fréchet and kernel distance.
"""

import argparse
import os
import sys
from pathlib import Path

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm import tqdm

from data_tools.errors import ArgumentParser, ConfigError, exit_on_config_error
from data_tools.process.entry_point import enter
from data_tools.user_files.paths import typed_path
from data_tools.vae.autoencoder import resolve_device
from training.checkpoints.manifest import sha256_of
from training.evaluation.card import CARD, describe_program, describe_reference, say_left_out
from training.evaluation.drawing import disk_errors
from training.evaluation.image_npz import ImageNpz
from training.evaluation.networks import add_network_flags, load_networks
from training.evaluation.scores import Reference, check_count, said, score


def build_parser() -> ArgumentParser:
    """Build the command line."""
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("samples", type=typed_path, help="npz with arr_0 uint8 (N, H, W, 3)")
    parser.add_argument("--reference", type=typed_path, required=True, metavar="NPZ")
    parser.add_argument(
        "--output", type=typed_path, metavar="JSON", help="keep the card (default: print it)"
    )
    parser.add_argument("--force", action="store_true", help="replace --output")
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda:N (default: a GPU if any)")
    add_network_flags(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Score the images that the command line names."""
    if args.output is not None:
        _check_output(args.output, args.force)
    device = resolve_device(args.device)
    samples = ImageNpz(args.samples, "")
    if samples.image_size is None:
        raise ConfigError(f"{args.samples}: holds no arr_0; give an npz file of images.")
    networks = load_networks(args, samples.image_size, device)
    for network in networks:
        check_count(samples.num_images, network, f"{args.samples}, number of images")
    references = [Reference(args.reference, network, samples.image_size) for network in networks]
    for told in dict.fromkeys(filter(None, map(say_left_out, references))):
        print(f"--reference {args.reference}: {told}", file=sys.stderr)
    scores = []
    for reference in references:
        with tqdm(total=samples.num_images, unit="image", desc="looking") as progress:
            metrics = score(samples, reference, progress.update)
        described = describe_reference(reference, samples.num_images)
        scores.append({"metrics": metrics, **described})
    card = {
        **(scores[0] if len(scores) == 1 else {"scores": scores}),
        "images": {
            "file": args.samples.name,
            "sha256": sha256_of(args.samples),
            "num_images": samples.num_images,
            "image_size": samples.image_size,
        },
        "program": describe_program(device),
    }
    if args.output is None:
        print(CARD.dumps(card))
        return
    with disk_errors(args.output):
        CARD.write(args.output, card)
    for found in scores:
        of_network = f", {found['features']['network']}" if len(scores) > 1 else ""
        print(f"{args.output}{of_network}: {said(found['metrics'])}")


def _check_output(path: Path, is_forced: bool) -> None:
    """Refuse what cannot be written after all the scoring."""
    if path.exists() and not is_forced:
        raise ConfigError(f"--output {path}: exists; choose another or add --force.")
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir():
        raise ConfigError(f"--output {path}: name a file in a folder that exists.")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"--output {path}: cannot write into {folder}; choose another.")


def main(argv: list[str] | None = None) -> None:
    """Score what the command line names."""
    with exit_on_config_error():
        run(build_parser().parse_args(argv))


if __name__ == "__main__":
    enter(main, prints_result=True)
