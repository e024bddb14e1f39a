"""A small folder of pictures and the flags that encode it, for several test files."""

import numpy as np
from PIL import Image

VAE_FLAGS = ("--vae", "data_tools/demo_vae")


def make_pictures(folder, count=23):
    """Two classes of 32x32 pictures."""
    rng = np.random.default_rng(0)
    for index in range(count):
        path = folder / ("red_cars" if index % 3 else "blue_cars") / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(path)
    return folder


def flags(images, output, **changes):
    """Arguments of encode_latents.py: shards of 8 images, batches of 4."""
    settings = {"--size": 32, "--batch-size": 4, "--shard-size": 8} | changes
    argv = ["--input", images, "--output", output, *VAE_FLAGS]
    for name, value in settings.items():
        argv += [name] if value is True else [name, value]
    return [str(part) for part in argv]


def content(folder):
    """Bytes of all files of a folder by their names; there are no folders in it."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
