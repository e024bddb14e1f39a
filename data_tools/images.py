"""Image files: decoding them whatever their mode, and one square crop of each.

Raw pixels are uint8 (size, size, 3) RGB throughout the project.
"""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# Everything else in a folder (annotations, scripts, a README) is not looked at; a file with one of
# these names that is no image is reported as skipped.
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".avif"}
)
# What a file is decoded as, whatever its name; never formats for which Pillow starts programs.
Image.init()  # here, and not by several threads at once
_FORMATS = [n for n in ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP") if n in Image.OPEN]
# Pillow's own limit against decompression bombs; decoding takes 3 to 4 bytes a pixel and thread.
MAX_PIXELS = 178_956_970
# Pillow warns from half of that on, which would be a line per large photograph.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Pillow reports damage in any of these ways, depending on the format and on what is damaged.
_DAMAGE = (
    *(Image.DecompressionBombError, EOFError, IndexError, KeyError, OSError),
    *(OverflowError, RuntimeError, SyntaxError, TypeError, ValueError, ZeroDivisionError),
    *(struct.error, zlib.error),
)


class BadImageError(Exception):
    """A file that is named like an image and cannot be decoded as one."""


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


def decode_image(data: bytes, size: int) -> np.ndarray:
    """Decode an image file's content: first frame, upright by its EXIF tag, on white, RGB, cropped.

    Returns:
        uint8 (size, size, 3).

    Raises:
        BadImageError: it is empty, cut off, damaged, no image, or larger than MAX_PIXELS.
    """
    if not data:
        raise BadImageError("is empty")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_size(image, size)
            image.load()
            return square_crop(_flattened(ImageOps.exif_transpose(image)), size)
    except _DAMAGE as err:
        raise BadImageError(str(err) or type(err).__name__) from err


def load_pixels(path: Path, size: int) -> np.ndarray:
    """Read an image file as raw pixels.

    Returns:
        uint8 (size, size, 3).

    Raises:
        BadImageError: what decode_image says, with the path before it.
        OSError: the system cannot read the file: that says nothing about the picture.
    """
    data = path.read_bytes()
    try:
        return decode_image(data, size)
    except BadImageError as err:
        raise BadImageError(f"{path}: {err}") from err


def _check_size(image: Image.Image, size: int) -> None:
    """Refuse before anything is decoded: the header's numbers cost a sender nothing."""
    short, long = min(image.size), max(image.size)
    # A line of pixels is small until its shorter side is scaled to `size`.
    scaled = size * size * long // max(short, 1)
    for pixels, what in ((short * long, ""), (scaled, f" when scaled to {size}")):
        if pixels > MAX_PIXELS:
            raise BadImageError(
                f"its {image.width} x {image.height} are {pixels:,} pixels{what}, more than "
                f"{MAX_PIXELS:,}"
            )


def _flattened(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):  # Pillow would clip; of 16-bit colours it keeps these bits
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadImageError(f"its pixels (mode {image.mode}) have no known range")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
