"""Encode a folder of images into webdataset shards of VAE latents, ready for training.

    python data_tools/encode_latents.py                                   # the demo set, a minute
    python data_tools/encode_latents.py --input imagenet/train --output latents/imagenet256

The input has one sub-folder per class, or is flat (unconditional). Run the same command again to
resume after any interruption.
"""

import argparse
import errno
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(REPOSITORY)

from tqdm import tqdm

from data_tools.encoding import SETTINGS_NAME, EncodingSettings, ShardEncoder, make_settings
from data_tools.errors import ArgumentParser, ConfigError, exit_on_config_error
from data_tools.files import MalformedError, from_json, write_json
from data_tools.images import ImageFolder, scan_image_folder
from data_tools.make_demo_images import DEMO_IMAGES, DEMO_PER_CLASS, DEMO_SIZE, make_demo_images
from data_tools.manifest import MANIFEST_NAME, Manifest
from data_tools.vae import DEFAULT_VAE, DEMO_VAE, Vae, load_vae, resolve_device

DEMO_LATENTS = REPOSITORY / "datasets" / "demo"
DEFAULT_SIZE = 256
DEFAULT_VAE_SIZES = (256, 512)  # what the paper family uses it for
SKIPPED_SHOWN = 5
MAX_THREADS = 16
PLAIN_PROGRESS_SEC = 10.0  # between lines where the output is no terminal
# A disk that is full, over quota, read-only or not ours: the user's to solve, not a bug.
_DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
}


class Progress:
    """Counts images on a terminal's bar, or in plain lines (a batch job's log)."""

    def __init__(self, total: int, is_quiet: bool) -> None:
        """Start the clock for `total` images."""
        self.total, self.done, self.started = total, 0, time.monotonic()
        self.is_plain = not is_quiet and not sys.stderr.isatty()
        self.last_line = self.started
        self.bar = tqdm(total=total, unit="image", disable=is_quiet or self.is_plain)

    def update(self, count: int) -> None:
        """Add images that were just finished."""
        self.done += count
        self.bar.update(count)
        now = time.monotonic()
        if self.is_plain and (now - self.last_line > PLAIN_PROGRESS_SEC or self.done == self.total):
            per_sec = self.done / max(now - self.started, 1e-9)
            left_sec = (self.total - self.done) / max(per_sec, 1e-9)
            print(
                f"{self.done}/{self.total} images, {per_sec:.1f} images/s, {left_sec:.0f} s left",
                flush=True,
            )
            self.last_line = now


@contextmanager
def disk_errors_as_config_errors(output: Path) -> Iterator[None]:
    """Report a full or read-only disk in one sentence."""
    try:
        yield
    except OSError as err:
        if err.errno not in _DISK_ERRORS:
            raise
        raise ConfigError(
            f"--output {output}: cannot write {err.filename or 'a shard'} ({err.strerror}); free "
            "space or choose another folder and run the same command again, finished shards stay."
        ) from err


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to {"image.size": 64, ...}."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves |= _leaves(value, f"{prefix}{name}.")
        elif prefix + name != "vae.id":  # the weights count, not where they were found
            leaves[prefix + name] = value
    return leaves


def check_settings(output: Path, settings: EncodingSettings) -> None:
    """Refuse an output folder that other settings made; otherwise note the settings in it."""
    path = output / SETTINGS_NAME
    if not path.exists():
        if any(output.glob("*.tar")) or (output / MANIFEST_NAME).exists():
            raise ConfigError(
                f"--output {output}: holds shards but no {SETTINGS_NAME}, so how they were made is "
                "unknown; give a new folder."
            )
        write_json(path, settings)
        return
    try:
        found: EncodingSettings = from_json(EncodingSettings, json.loads(path.read_bytes()))
    except (MalformedError, ValueError) as err:
        raise ConfigError(f"{path}: {err}; delete the folder, or give a new --output.") from err
    old, new = _leaves(asdict(found)), _leaves(asdict(settings))
    different = [f"{name} ({old[name]} -> {new[name]})" for name in new if old[name] != new[name]]
    if different:
        raise ConfigError(
            f"--output {output}: was begun with other settings: {', '.join(different)}; repeat the "
            "old flags and input, or give a new folder."
        )


def encode_folder(
    images: ImageFolder,
    vae: Vae,
    settings: EncodingSettings,
    output: Path,
    *,
    is_strict: bool = False,
    part: tuple[int, int] = (0, 1),
    is_quiet: bool = False,
) -> Manifest | None:
    """Encode what is missing of a data set.

    Args:
        images: all images of the data set.
        vae: encodes them.
        settings: of the data set.
        output: made if missing.
        is_strict: stop at the first image that cannot be decoded.
        part: (i, n): only every n-th shard from i on, so that n processes share the work.
        is_quiet: print nothing.

    Returns:
        what was written into dataset.json, None while shards of other parts are missing.
    """
    with disk_errors_as_config_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        check_settings(output, settings)
        num_threads = min(MAX_THREADS, os.cpu_count() or 1)
        encoder = ShardEncoder(
            images, vae, settings, output, is_strict=is_strict, num_threads=num_threads
        )
        mine = range(part[0], settings.num_shards, part[1])
        missing = [index for index in mine if encoder.finished(index) is None]
        progress = Progress(sum(len(encoder.shard_files(index)) for index in missing), is_quiet)
        for index in missing:
            encoder.encode(index, progress.update)
        progress.bar.close()
        sidecars = [encoder.finished(index) for index in range(settings.num_shards)]
        complete = [sidecar for sidecar in sidecars if sidecar is not None]
        if len(complete) < len(sidecars):
            return None
        return encoder.write_manifest(complete)


def encode(args: argparse.Namespace, is_quiet: bool = False) -> None:
    """Do what the flags say, after checking everything that can be checked first."""
    if args.input is None:
        with disk_errors_as_config_errors(DEMO_IMAGES):
            make_demo_images(DEMO_IMAGES, DEMO_SIZE, DEMO_PER_CLASS)
    images = scan_image_folder(args.input or DEMO_IMAGES, "--input")
    vae = load_vae(args.vae, device=resolve_device(args.device))
    if args.size % vae.downsample:
        raise ConfigError(
            f"--size {args.size}: is not divisible by {vae.downsample}, the factor by which "
            f"--vae {args.vae} reduces images; use a multiple of {vae.downsample}."
        )
    settings = make_settings(
        images,
        vae,
        size=args.size,
        flip=not args.no_flip,
        seed=args.seed,
        shard_size=args.shard_size,
        batch_size=args.batch_size,
    )
    num_bytes = settings.num_files * settings.layout.stride
    say = (lambda text: None) if is_quiet else (lambda text: print(text, flush=True))
    say(
        f"{images.root}: {settings.num_files} images in {len(images.classes)} classes -> "
        f"{args.output}: {settings.num_shards} shards, {num_bytes / 2**20:.0f} MiB, latents "
        f"{settings.latent.shape} of {vae.source_id}"
    )
    if args.dry_run:
        return
    manifest = encode_folder(
        images,
        vae,
        settings,
        args.output,
        is_strict=args.strict,
        part=args.part,
        is_quiet=is_quiet,
    )
    if manifest is None:
        say(f"{args.output}: this part is done; {MANIFEST_NAME} follows when all parts are.")
        return
    skipped = [path for shard in manifest.shards for path in shard.skipped]
    say(f"{args.output}: {manifest.num_samples} samples in {len(manifest.shards)} shards")
    if skipped:
        shown = ", ".join(skipped[:SKIPPED_SHOWN]) + (
            ", ..." if len(skipped) > SKIPPED_SHOWN else ""
        )
        say(f"skipped {len(skipped)} files that are no readable images: {shown}")


@contextmanager
def demo_lock() -> Iterator[None]:
    """Let one process at a time make the demo data."""
    folder = DEMO_LATENTS.parent
    with disk_errors_as_config_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".demo.lock").open("w")
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


def part_of(text: str) -> tuple[int, int]:
    """Parse --part I/N."""
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise ConfigError(f"--part {text}: write I/N with 0 <= I < N, for example 0/4.")
    return int(first), int(count)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Define the flags and check their values."""
    parser = ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="To resume after an interruption, run the same command again.",
    )
    add = parser.add_argument
    add("--input", type=Path, metavar="FOLDER", help="images (default: the demo set, drawn first)")
    add("--output", type=Path, metavar="FOLDER", help="of the shards (demo: datasets/demo)")
    add(
        "--vae",
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
    add("--batch-size", type=int, default=32, metavar="N", help="images (default: %(default)s)")
    add("--shard-size", type=int, default=2048, metavar="N", help="samples (default: %(default)s)")
    add("--no-flip", action="store_true", help="store no latents of the mirrored images")
    add("--seed", type=int, default=0, metavar="N", help="of the dealing of images to shards")
    add("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add("--strict", action="store_true", help="stop at a damaged image instead of skipping it")
    add("--part", type=part_of, default=(0, 1), metavar="I/N", help="every N-th shard, from I on")
    add("--dry-run", action="store_true", help="check and describe, write nothing")
    args = parser.parse_args(argv)
    for name in ("size", "batch_size", "shard_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 1.")
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


def main(argv: list[str]) -> None:
    """Encode; the demo set under its lock."""
    args = parse_arguments(argv)
    with demo_lock() if args.input is None else nullcontext():
        encode(args)


if __name__ == "__main__":
    with exit_on_config_error():
        main(sys.argv[1:])
