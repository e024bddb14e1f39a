"""Image files: finding them, the classes their folders name, and one square crop of each.

Raw pixels are uint8 (size, size, 3) RGB throughout the project.
"""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data_tools.errors import ConfigError

# Everything else in a folder (annotations, scripts, a README) is not looked at; a file with one of
# these names that is no image is reported as skipped.
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


class BadImageError(Exception):
    """A file that is named like an image and cannot be decoded as one."""


@dataclass(frozen=True)
class ImageClass:
    """One class: its label, the name of its folder, and how many image files the folder holds."""

    index: int
    name: str
    count: int


@dataclass(frozen=True)
class ImageFolder:
    """The image files of a folder in a fixed order, with their labels.

    Attributes:
        root: the folder.
        paths: relative to root, with "/" on every system, sorted.
        labels: class index of each path; all 0 when unconditional.
        classes: sorted by name; empty when the folder is flat, that is unconditional.
    """

    root: Path
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[ImageClass, ...]


def scan_image_folder(root: Path, flag: str) -> ImageFolder:
    """List a folder of images: one sub-folder per class, or a flat folder without classes.

    Args:
        root: the folder; a class folder may itself hold folders.
        flag: the option that named the folder, for messages.
    """
    if not root.is_dir():
        state = "is a file" if root.exists() else "does not exist"
        raise ConfigError(f"{flag} {root}: {state}; give a folder that holds images.")
    paths = sorted(
        Path(folder, name).relative_to(root).as_posix()
        for folder, _, names in os.walk(root, followlinks=True)  # class folders are often links
        for name in names
        if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
    )
    if not paths:
        raise ConfigError(
            f"{flag} {root}: no image files ({', '.join(sorted(IMAGE_SUFFIXES))}) in it; "
            "give a folder with one sub-folder per class, or with the images themselves."
        )
    loose = [path for path in paths if "/" not in path]
    if len(loose) == len(paths):
        return ImageFolder(root, tuple(paths), (0,) * len(paths), ())
    if loose:
        raise ConfigError(
            f"{flag} {root}: {len(loose)} images ({loose[0]}, ...) lie beside class folders; "
            "move them into a class folder, or all images into one flat folder."
        )
    folders = [path.split("/")[0] for path in paths]
    names = sorted(set(folders))
    index_of = {name: index for index, name in enumerate(names)}
    labels = tuple(index_of[folder] for folder in folders)
    counts = Counter(folders)
    classes = tuple(ImageClass(index, name, counts[name]) for index, name in enumerate(names))
    return ImageFolder(root, tuple(paths), labels, classes)


def square_crop(image: Image.Image, size: int) -> np.ndarray:
    """Scale the shorter side to `size` and cut the centre square out.

    The procedure of ADM's training data (arXiv 2105.05233, the official code), which every
    published ImageNet FID of this model family assumes: halve with a box filter while the shorter
    side is at least twice the target, then bicubic, then crop. An image that already has the size
    is returned unchanged.

    Returns:
        uint8 (size, size, 3).
    """
    if image.size == (size, size):
        return np.asarray(image).copy()
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    scaled = (round(image.width * scale), round(image.height * scale))
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size))).copy()


def load_pixels(path: Path, size: int) -> np.ndarray:
    """Read an image file as raw pixels, turned upright by its EXIF tag, on white where transparent.

    Returns:
        uint8 (size, size, 3).

    Raises:
        BadImageError: the file is empty, cut off, damaged or no image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            return square_crop(_flattened(upright), size)
    # Pillow reports damage in any of these ways, depending on the format.
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as err:
        if isinstance(err, OSError) and err.errno is not None:
            raise  # the system cannot read the file: that says nothing about the picture
        raise BadImageError(f"{path}: {err}") from err


def _flattened(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
