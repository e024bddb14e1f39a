"""Encode images into webdataset shards of VAE latents, ready for training.

    python data_tools/encode_latents.py                                   # the demo set, a minute
    python data_tools/encode_latents.py --input imagenet/train --output latents/imagenet256
    python data_tools/encode_latents.py --input 'tars/{000..146}.tar' --output latents/imagenet256
    torchrun --nproc-per-node 8 data_tools/encode_latents.py ...          # or srun, or by hand

Start as many processes as you like, on any machines that share the output folder: they divide the
shards among themselves. Run the same command again to resume after any interruption.
"""

import argparse
import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data_tools.encoding.command import EncodingRun
from data_tools.encoding.input_summary import NAMES_SHOWN, class_lines
from data_tools.encoding.output import DEMO_LATENTS, nothing_left_by_a_refusal
from data_tools.encoding.settings import PRECISIONS, disk_errors_as_config_errors
from data_tools.errors import ArgumentParser, ConfigError, count_of, refuse_below_one, some
from data_tools.process.entry_point import enter, is_reporter
from data_tools.shards.manifest import MANIFEST_NAME
from data_tools.sources.emoji import DEMO_IMAGES, DEMO_PER_CLASS, DEMO_SIZE, make_demo_images
from data_tools.sources.reading import CLASS_SOURCES, Reading
from data_tools.user_files.paths import typed_path, typed_text
from data_tools.vae.autoencoder import DEMO_VAE
from data_tools.vae.vae_files import DEFAULT_VAE

DEFAULT_SIZE = 256
DEFAULT_VAE_SIZES = (256, 512)  # what the paper family uses it for


def encode(args: argparse.Namespace, is_quiet: bool = False) -> None:
    """Do what the flags say, after checking everything that can be checked first."""
    if args.input is None:
        with disk_errors_as_config_errors(DEMO_IMAGES):
            make_demo_images(DEMO_IMAGES, DEMO_SIZE, DEMO_PER_CLASS)
        args.input = [str(DEMO_IMAGES)]
    elif any(args.output.resolve() == Path(word).resolve() for word in args.input):
        # Its shards would be taken for the input from then on.
        raise ConfigError(
            f"--output {args.output}: is where the images lie; choose another folder."
        )
    with nothing_left_by_a_refusal(args.output):
        _encode(args, is_quiet)


def _encode(args: argparse.Namespace, is_quiet: bool) -> None:
    run = EncodingRun(args, is_quiet or not is_reporter())
    run.describe()
    if args.dry_run:
        run.estimate()
        return
    manifest = run.encode()
    skipped = [path for shard in manifest.shards for path in shard.skipped]
    num_samples = count_of(manifest.num_samples, "sample")
    run.say(f"{args.output}: {num_samples} in {count_of(len(manifest.shards), 'shard')}")
    if run.edited:
        run.say(
            "images edited since they were encoded, by the sizes of their files: "
            f"{len(run.edited)} ({some(run.edited, NAMES_SHOWN)}); the shards hold the old "
            "pictures, for the new ones encode into a new --output"
        )
    if run.settings.vae.latents_mean != manifest.vae.latents_mean:
        run.say(
            f"latents_mean and latents_std of --vae {args.vae} are not used: this data set was "
            "begun without them; a new --output uses them"
        )
    if skipped:
        what = "files that are no readable images"
        if len(skipped) == 1:
            what = "file that is no readable image"
        run.say(f"skipped {len(skipped)} {what}: {some(skipped, NAMES_SHOWN)}")
        for line in class_lines(manifest.classes)[1:]:
            run.say(line)


@contextmanager
def demo_lock() -> Iterator[None]:
    """Let one process at a time make the demo data."""
    folder = DEMO_LATENTS.parent
    with disk_errors_as_config_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".demo.lock").open("wb")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def prepare_demo(quiet: bool = False) -> Path:
    """Make the demo data set if it is missing; several processes may call this at once.

    Returns:
        the folder with its shards.
    """
    with demo_lock():
        if not (DEMO_LATENTS / MANIFEST_NAME).exists():
            encode(parse_arguments([]), is_quiet=quiet)
    return DEMO_LATENTS


def batch_size_of(text: str) -> int | None:
    """Parse --batch-size N|auto."""
    if text != "auto" and not text.lstrip("-").isdecimal():
        raise ConfigError(f"--batch-size {text}: write a number of images, or auto.")
    return None if text == "auto" else int(text)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Define the flags and check their values."""
    parser = ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="To resume after an interruption, run the same command again.",
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        type=typed_text,
        metavar="IMAGES",
        help="folder with a sub-folder per class, flat folder, folder of tars, tars "
        "('a/{000..146}.tar' or 'a/*.tar'), list (.txt, .tsv: path, or path and class with a tab "
        "between), or folder that save_to_disk of Hugging Face datasets wrote; default: the demo "
        "set, drawn first",
    )
    add("--output", type=typed_path, metavar="FOLDER", help="of the shards (demo: datasets/demo)")
    add(
        "--class-names",
        type=typed_path,
        metavar="FILE",
        help="names of the classes: JSON {id: name} or {id: [new id, name]}, or lines of id, tab, "
        "name (default: the ids)",
    )
    add(
        "--class-from",
        choices=CLASS_SOURCES,
        default="",
        help="the class of an image is the first folder of its path, its whole path, its tar, or "
        "none (default: labels in the input, else the first folder)",
    )
    for part, example in (("image", "input.jpg"), ("label", "output.cls, or json:FIELD")):
        add(
            f"--{part}-suffix",
            metavar="SUFFIX",
            default="",
            help=f"of the {part}s in tars, after KEY and its first dot, such as {example}",
        )
    add(
        "--label-column",
        metavar="NAME",
        default="",
        help="column with the classes, of a data set of Hugging Face (default: its ClassLabel)",
    )
    add(
        "--allow-empty-classes",
        action="store_true",
        help="begin although nearly all class numbers have no image",
    )
    add(
        "--vae",
        type=typed_text,
        metavar="VAE",
        help=f"diffusers folder, .safetensors file or hub id (default: {DEFAULT_VAE} for 256 and "
        "512 pixels, data_tools/demo_vae for the demo)",
    )
    add(
        "--size",
        type=int,
        metavar="PIXELS",
        help=f"side of the centre crop (default: {DEFAULT_SIZE}, demo {DEMO_SIZE})",
    )
    add(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="of the VAE's arithmetic; its error is measured first (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=batch_size_of,
        metavar="N|auto",
        help="images encoded together (default: auto, by the memory that is free)",
    )
    add("--shard-size", type=int, default=2048, metavar="N", help="samples (default: %(default)s)")
    add("--no-flip", action="store_true", help="store no latents of the mirrored images")
    add("--seed", type=int, default=0, metavar="N", help="of the dealing of images to shards")
    add(
        "--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: a GPU of its own, or cpu)"
    )
    add("--workers", type=int, metavar="N", help="threads that decode images (default: the cores)")
    add("--strict", action="store_true", help="stop at a damaged image instead of skipping it")
    add("--dry-run", action="store_true", help="check, describe and estimate, write nothing")
    args = parser.parse_args(argv)
    refuse_below_one(args, "size", "batch_size", "shard_size", "workers")
    args.reading = Reading(args.class_from, args.image_suffix, args.label_suffix, args.label_column)
    is_demo = args.input is None
    if args.output is None and not is_demo:
        raise ConfigError("--output is missing: say where the shards of --input shall go.")
    args.output = args.output or DEMO_LATENTS
    if args.output.exists() and not args.output.is_dir():
        raise ConfigError(f"--output {args.output}: is a file; give a folder.")
    args.size = args.size or (DEMO_SIZE if is_demo else DEFAULT_SIZE)
    if args.vae is None:
        if not is_demo and args.size not in DEFAULT_VAE_SIZES:
            raise ConfigError(
                f"--vae is missing: {DEFAULT_VAE}, the default, is for {DEFAULT_VAE_SIZES} pixels "
                f"and --size is {args.size}; name a VAE, for example data_tools/demo_vae."
            )
        args.vae = str(DEMO_VAE) if is_demo else DEFAULT_VAE
    return args


def main(argv: list[str] | None = None) -> None:
    """Encode; the demo set under its lock."""
    args = parse_arguments(argv)
    with demo_lock() if args.input is None else nullcontext():
        encode(args)


if __name__ == "__main__":
    enter(main, when_stopped="the same command goes on")
