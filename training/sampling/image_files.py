"""Write images as PNG files and lay samples out in a grid."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_tools.files import replace_file

GRID_MARGIN, LABEL_HEIGHT, LABEL_SIZE = 2, 14, 11  # pixels


def font(size: int) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, which has the letters of most alphabets; Pillow's own has ASCII only."""
    return ImageFont.truetype(f"{mpl.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def save_png(path: Path, picture: np.ndarray) -> None:
    """Write a picture (H, W, 3) uint8 whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda file: Image.fromarray(picture).save(file, format="PNG"))


def image_grid(
    pixels: np.ndarray, *, columns: int, row_labels: Sequence[str] | None = None
) -> np.ndarray:
    """Lay images out row by row, each row under its label.

    Args:
        pixels: (N, H, W, 3) uint8.
        columns: images per row; the last row may be short.
        row_labels: one text per row, or None for no labels.

    Returns:
        (height, width, 3) uint8.
    """
    N, H, W, _ = pixels.shape
    rows = -(-N // columns)
    label_height = LABEL_HEIGHT if row_labels is not None else 0
    row_height = label_height + H + GRID_MARGIN
    size = (columns * (W + GRID_MARGIN) + GRID_MARGIN, rows * row_height + GRID_MARGIN)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for row in range(rows):
        top = row * row_height + GRID_MARGIN
        if row_labels is not None:
            draw.text((GRID_MARGIN + 1, top), row_labels[row], fill="black", font=font(LABEL_SIZE))
        for column, picture in enumerate(pixels[row * columns : (row + 1) * columns]):
            left = column * (W + GRID_MARGIN) + GRID_MARGIN
            canvas.paste(Image.fromarray(picture), (left, top + label_height))
    return np.asarray(canvas)
