"""Make matplotlib's figures of a size in pixels, and turn them into pixels.

matplotlib is imported with the first figure: most ranks draw none.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 100  # TensorBoard shows pictures pixel by pixel, so texts have sizes in pixels too
INK, GREY = "#222222", "#d9d9d9"
# Colours that stay apart for colour-blind eyes (Okabe and Ito, 2008).
BLUE, GREEN, ORANGE, RED = "#0072b2", "#009e73", "#e69f00", "#d62728"
COLOURS = ("#1f5fa8", "#e4572e", "#3f9b5a", "#f2a541", "#8c6bb1", "#b7b7b7", "#76b7e5", "#9c6644")


def points(pixels: float) -> float:
    """Return a length in points, matplotlib's unit of texts and lines."""
    return pixels * 72 / DPI


def new_figure(width: int, height: int, layout: str | None = None) -> "Figure":
    """Return an empty figure of a size in pixels; `layout` "constrained" places its parts."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout=layout)


def pixels_of(figure: "Figure") -> np.ndarray:
    """Draw a figure; returns (height, width, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
