"""Decode image files of any colour mode into RGB, and cut one square crop of each.

Raw pixels are uint8 (size, size, 3) RGB throughout the project.
"""

import io
import struct
import warnings
import zlib
from contextlib import suppress

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from data_tools.sources.image_metadata import without_metadata
from data_tools.user_files.file_kinds import HEAD_BYTES, LFS_REASON, content_kind, is_lfs_pointer

# Everything else in a folder (annotations, scripts, a README) is not looked at; a file with one of
# these names that is no image is reported as skipped.
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2"}
)
# What a file is decoded as, whatever its name; never formats for which Pillow starts programs.
Image.init()  # here, and not by several threads at once
_FORMATS = [
    name
    for name in ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
    if name in Image.OPEN
]
# What content_kind calls the formats above, and other pictures.
_KINDS = {"a Netpbm picture", "AVIF", "BMP", "GIF", "JPEG", "JPEG 2000", "PNG", "TIFF", "WebP"}
_PICTURES = {"HEIC", "HEIF", "JPEG XL", "OpenEXR", "QOI", "Radiance HDR", "SVG"}
_ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")
_PNG_BITS = 24  # where a PNG's header says how many bits a value has
# Pillow's own limit against decompression bombs; decoding takes 3 to 4 bytes a pixel and thread.
MAX_PIXELS = 178_956_970
# Pillow warns from half of that on, which would be a line per large photograph.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Pillow reports damage in any of these ways, depending on the format and on what is damaged.
_BAD_VALUES = (IndexError, KeyError, OverflowError, TypeError, ValueError, ZeroDivisionError)
_BAD_FILE = (EOFError, OSError, RuntimeError, SyntaxError, struct.error, zlib.error)
_DAMAGE = (Image.DecompressionBombError, *_BAD_VALUES, *_BAD_FILE)


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

    Metadata that is damaged or very large is left out: the picture counts.

    Returns:
        uint8 (size, size, 3).

    Raises:
        BadImageError: it is empty, cut off, damaged, no image, or larger than MAX_PIXELS.
    """
    if not data:
        raise BadImageError("is empty")
    try:
        return _decoded(data, size)
    except _DAMAGE as err:
        for reduced in without_metadata(data):
            with suppress(*_DAMAGE):
                return _decoded(reduced, size)
        raise BadImageError(_reason(data, err)) from err


def _decoded(data: bytes, size: int) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        _check_size(image, size)
        image.load()
        return square_crop(_upright(_on_white(image, data), image), size)


def _reason(data: bytes, err: Exception) -> str:
    """Say what is wrong with a file that cannot be decoded."""
    head = data[:HEAD_BYTES]
    if is_lfs_pointer(head):
        return LFS_REASON
    kind = content_kind(head)
    if not isinstance(err, UnidentifiedImageError):
        is_sentence = isinstance(err, (OSError, SyntaxError, ValueError, RuntimeError)) and str(err)
        return str(err) if is_sentence else f"is damaged ({type(err).__name__}: {err})"
    if kind is None:
        return "is no image of a known format"
    if kind not in _KINDS:
        return f"is {kind}: convert it to PNG or JPEG" if kind in _PICTURES else f"is {kind}"
    if kind == "AVIF" and "AVIF" not in _FORMATS:
        return "is AVIF, which this Pillow cannot decode: install pillow with AVIF"
    return f"is a damaged {kind} file"


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


def _upright(flat: Image.Image, image: Image.Image) -> Image.Image:
    """Turn the pixels of `image` by its EXIF tag; damaged EXIF says nothing."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except _DAMAGE:
        return flat
    # Nothing else of the EXIF: Pillow would write it anew, which odd values do not survive.
    flat.info = {}
    flat.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(flat)


def _on_white(image: Image.Image, data: bytes) -> Image.Image:
    """Return an image in mode RGB, transparent parts on white; `data` is its file's content."""
    transparent = _of_transparent_colour(image, data)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        # Pillow would clip; of 16-bit colours it keeps these bits.
        flat = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise BadImageError(f"its pixels (mode {image.mode}) have no known range")
    elif image.mode == "LAB":
        raise BadImageError("its colours are LAB, which are not converted: save it as RGB")
    elif transparent is None and (image.mode in _ALPHA_MODES or "transparency" in image.info):
        straight = image.convert("LA") if image.mode == "La" else image  # not premultiplied
        colours = straight.convert("RGBA")
        flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours)
    else:
        flat = image
    flat = flat.convert("RGB")
    if transparent is not None:
        flat.paste("white", mask=Image.fromarray(transparent))
    return flat


def _of_transparent_colour(image: Image.Image, data: bytes) -> np.ndarray | None:
    """Find the pixels of a PNG whose colour is the one that its tRNS chunk calls transparent.

    Pillow compares 8-bit pixels with it, however many bits the file has.

    Returns:
        bool (H, W); None where no single colour is transparent.
    """
    key = image.info.get("transparency")
    if image.format != "PNG" or key is None or image.mode not in ("1", "L", "I;16", "RGB"):
        return None
    bits = data[_PNG_BITS]
    pixels, largest = np.asarray(image), (1 << bits) - 1
    if image.mode == "1":
        return pixels == (key != 0)
    if image.mode == "L":
        return pixels == (key & largest) * (255 // largest)
    if image.mode == "I;16":
        return pixels == key
    if bits == 16:
        # Pillow keeps the upper byte of each value; read in the other order, it keeps the lower.
        with Image.open(io.BytesIO(data), formats=["PNG"]) as lower:
            lower.tile = [tile._replace(args="RGB;16L") for tile in lower.tile]
            pixels = (pixels.astype(np.uint16) << 8) | np.asarray(lower)
    return (pixels == (np.array(key) & largest)).all(axis=2)
