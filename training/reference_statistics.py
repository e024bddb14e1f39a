"""Make the reference of a score from images: an npz file in ADM's format.

    python training/reference_statistics.py --input photos/ --size 256 --output photos256.npz

The file holds statistics of all images (mu, sigma, mu_s, sigma_s), and --keep images chosen at
random for precision and recall. --input takes what data_tools/encode_latents.py takes, and images
are cut as there.
"""

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from tqdm import tqdm

from data_tools.errors import ArgumentParser, ConfigError, exit_on_config_error, refuse_below_one
from data_tools.permutations import permutation
from data_tools.process.entry_point import enter
from data_tools.sources.images import BadImageError, decode_image
from data_tools.sources.inputs import open_source
from data_tools.sources.source import ImageSource
from data_tools.user_files.paths import typed_path, typed_text
from data_tools.vae.autoencoder import resolve_device
from training.evaluation.drawing import disk_errors
from training.evaluation.image_npz import LABELS, write_npz
from training.evaluation.networks import (
    BATCH_SIZE,
    InceptionNetwork,
    add_network_flags,
    load_networks,
)
from training.evaluation.scores import NETWORK_SHA256, arrays_of, check_count, feature_statistics

DEFAULT_SIZE, DEFAULT_KEEP = 256, 10_000  # those of ADM's ImageNet files
KEEP_SEED = 0
NUM_READERS = 8


def build_parser() -> ArgumentParser:
    """Build the command line."""
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        type=typed_text,
        required=True,
        metavar="IMAGES",
        help="as of data_tools/encode_latents.py: folder of images or of tars, tars "
        "('a/{000..146}.tar'), list, or folder that save_to_disk of Hugging Face datasets wrote",
    )
    add("--size", type=int, default=DEFAULT_SIZE, metavar="PIXELS", help="(default: 256)")
    add("--output", type=typed_path, required=True, metavar="NPZ")
    add(
        "--keep",
        type=int,
        default=DEFAULT_KEEP,
        metavar="N",
        help="images for precision and recall (default: 10,000)",
    )
    add("--force", action="store_true", help="replace --output")
    add("--device", metavar="NAME", help="cpu or cuda:N (default: a GPU if there is one)")
    add_network_flags(parser)
    return parser


def _batches(
    source: ImageSource, size: int, kept: dict[int, np.ndarray | None]
) -> Iterator[np.ndarray]:
    """Yield all images, uint8 (n, size, size, 3), and put those that are wanted into `kept`."""

    def read(index: int) -> np.ndarray:
        try:
            return decode_image(source.read(index), size)
        except (BadImageError, OSError) as err:
            raise ConfigError(
                f"--input {source.text}: {source.name(index)} cannot be read ({err}); mend it "
                "or move it elsewhere, every image counts."
            ) from err

    with ThreadPoolExecutor(NUM_READERS) as readers:
        for start in range(0, len(source), BATCH_SIZE):
            indices = range(start, min(start + BATCH_SIZE, len(source)))
            pictures = list(readers.map(read, indices))
            kept |= {i: picture for i, picture in zip(indices, pictures, strict=True) if i in kept}
            yield np.stack(pictures)


def run(args: argparse.Namespace) -> None:
    """Make the file that the command line asks for."""
    refuse_below_one(args, "size", "keep")
    if args.output.exists() and not args.force:
        raise ConfigError(f"--output {args.output}: exists; choose another or add --force.")
    if args.output.suffix != ".npz" or not args.output.absolute().parent.is_dir():
        raise ConfigError(f"--output {args.output}: name an .npz file in a folder that exists.")
    source = open_source(*args.input)
    device = resolve_device(args.device)
    networks = load_networks(args, (args.size, args.size), device)
    for network in networks:
        check_count(len(source), network, f"--input {source.text}, number of images")
    chosen = np.sort(permutation(len(source), KEEP_SEED)[: args.keep]).tolist()
    kept: dict[int, np.ndarray | None] = dict.fromkeys(chosen)
    arrays, are_many = {LABELS: source.labels[chosen].astype(np.int64)}, len(networks) > 1
    for network in networks:
        with tqdm(total=len(source), unit="image", desc="looking") as progress:
            statistics = feature_statistics(
                network, _batches(source, args.size, kept), lambda _: False, progress.update
            )
        for layer, (mean, covariance) in arrays_of(network, are_many).items():
            arrays[mean] = statistics.gaussians[layer].mean.numpy()
            arrays[covariance] = statistics.gaussians[layer].covariance.numpy()
    if not (are_many or isinstance(networks[0], InceptionNetwork)):
        arrays[NETWORK_SHA256] = np.array(networks[0].sha256)
    pictures = (kept[i][None] for i in chosen)
    with disk_errors(args.output):
        write_npz(args.output, pictures, (len(chosen), args.size, args.size, 3), arrays)
    print(
        f"{args.output}: statistics of {len(source):,} images by "
        f"{', '.join(network.name for network in networks)}, and "
        f"{len(chosen):,} of them"
    )


def main(argv: list[str] | None = None) -> None:
    """Make what the command line asks for."""
    with exit_on_config_error():
        run(build_parser().parse_args(argv))


if __name__ == "__main__":
    enter(main)
