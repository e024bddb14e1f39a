"""Measure how fast images are encoded: ours, and a loop of PIL and VAE in batches of 1 and 32.

    python benchmarks/encoding.py
    python benchmarks/encoding.py --vae stabilityai/sd-vae-ft-ema --size 256 --images 2048

All encode the same JPEG files and their mirrored images and write the results; ours also hashes
them and flushes them to the disk. The table shows the share of the time in which the VAE computes:
the rest is what could still be gained.
"""

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import describe_machine
from data_tools.encode_latents import parse_arguments
from data_tools.encoding.command import EncodingRun
from data_tools.errors import ArgumentParser
from data_tools.process.entry_point import enter
from data_tools.sources.images import square_crop
from data_tools.vae.autoencoder import DEMO_VAE, Vae, load_vae, resolve_device

MIN_SIDE, MAX_SIDE = 256, 512
NUM_SHAPES = 12
NAIVE_BATCHES = (1, 32)


def make_photographs(folder: Path, count: int) -> None:
    """Write JPEG files of smooth light, shapes and grain, of different sizes."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for index in range(count):
        width, height = rng.integers(MIN_SIDE, MAX_SIDE + 1, 2).tolist()
        light = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        pixels = np.asarray(light.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        pixels = pixels.copy()
        rows, columns = np.mgrid[:height, :width]
        for _ in range(NUM_SHAPES):
            centre, radius = rng.integers(0, (height, width)), rng.integers(8, 96)
            inside = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < radius**2
            pixels[inside] = 0.3 * pixels[inside] + 0.7 * rng.integers(0, 256, 3)
        pixels += rng.normal(0, 6, pixels.shape)
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{index:05d}.jpg", quality=90)


class NaiveLoop:
    """What most repositories do: read, encode, save, one after the other."""

    def __init__(self, vae: Vae, size: int, batch_size: int) -> None:
        """Prepare."""
        self.vae, self.size, self.batch_size, self.vae_sec = vae, size, batch_size, 0.0

    @torch.no_grad()
    def _encode(self, pixels: np.ndarray) -> np.ndarray:
        started = time.perf_counter()
        parameter = next(self.vae.model.parameters())
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(parameter) / 127.5 - 1
        found = self.vae.model.encode(x).latent_dist.parameters.half().cpu().numpy()
        self.vae_sec += time.perf_counter() - started
        return found

    def run(self, folder: Path, output: Path) -> float:
        """Encode all files of the folder; return the VAE's share of the time."""
        started = time.perf_counter()
        output.mkdir()
        paths = sorted(folder.iterdir())
        for first in range(0, len(paths), self.batch_size):
            batch = paths[first : first + self.batch_size]
            pixels = np.stack([square_crop(Image.open(p).convert("RGB"), self.size) for p in batch])
            moments = self._encode(pixels)
            flips = self._encode(np.ascontiguousarray(pixels[:, :, ::-1]))
            for path, *arrays in zip(batch, moments, flips, strict=True):
                np.save(output / f"{path.stem}.npy", np.stack(arrays))
        return self.vae_sec / (time.perf_counter() - started)


def ours(args: argparse.Namespace, device: torch.device, folder: Path, output: Path) -> float:
    """Encode into shards, as the command does; return the VAE's share of the time."""
    given = parse_arguments(
        [
            *("--input", str(folder), "--output", str(output), "--vae", str(args.vae), "--strict"),
            *("--size", str(args.size), "--shard-size", str(args.shard_size)),
            *("--batch-size", str(args.batch_size), "--device", str(device)),
            *(("--workers", str(args.workers)) if args.workers else ()),
        ]
    )
    run = EncodingRun(given, is_quiet=True)
    run.encode()
    return run.busy_share


def timed(encode: Callable[[Path], float]) -> tuple[float, float]:
    """Return seconds, and the VAE's share of the time, into a folder that is removed."""
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        share = encode(Path(scratch) / "out")
        return time.perf_counter() - started, share


def main(argv: list[str] | None = None) -> None:
    """Make the pictures, encode them in turns, print a table."""
    parser = ArgumentParser(description="Images per second: ours against a naive loop.")
    add = parser.add_argument
    add("--vae", default=str(DEMO_VAE), help="as of encode_latents.py (default: the demo's)")
    add("--size", type=int, default=64, help="side of the crop (default: %(default)s)")
    add("--images", type=int, default=256, help="JPEG files (default: %(default)s)")
    add("--shard-size", type=int, default=64, help="default: %(default)s")
    add("--batch-size", type=int, default=32, help="ours (default: %(default)s)")
    add("--workers", type=int, help="threads that decode (default: the cores)")
    add("--repeats", type=int, default=2, help="best of (default: %(default)s)")
    add("--device", help="default: a GPU if there is one")
    args = parser.parse_args(argv)
    device = resolve_device(args.device)
    vae = load_vae(args.vae, device=device)
    names = [f"naive loop, batch {size}" for size in NAIVE_BATCHES] + ["ours"]
    best: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "images"
        make_photographs(folder, args.images)
        num_bytes = sum(path.stat().st_size for path in folder.iterdir())
        print(describe_machine(device))
        print(
            f"{args.images} JPEG files of {MIN_SIDE} to {MAX_SIDE} pixels, "
            f"{num_bytes / args.images / 1024:.0f} KiB each, cut to {args.size}; {args.vae}, fp32"
        )
        warm = io.BytesIO()
        np.save(warm, NaiveLoop(vae, args.size, 1)._encode(np.zeros((1, 64, 64, 3), np.uint8)))
        for _ in range(args.repeats):
            for name, batch_size in zip(names, (*NAIVE_BATCHES, None), strict=True):
                if batch_size is None:
                    found = timed(lambda out: ours(args, device, folder, out))
                else:
                    loop = NaiveLoop(vae, args.size, batch_size)
                    found = timed(lambda out, loop=loop: loop.run(folder, out))
                best[name] = min(best.get(name, found), found)
    print(f"{'':24}images/s  VAE busy")
    for name, (seconds, share) in best.items():
        print(f"{name:24}{args.images / seconds:8.1f}{100 * share:9.0f} %")


if __name__ == "__main__":
    enter(main)
