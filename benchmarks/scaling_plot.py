"""Draw the picture of scaling.py: images per second over GPUs, and the parts of a step."""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from benchmarks.cost_model import Prediction

WIDTH, HEIGHT = 1360, 600
LEFT_PANEL, RIGHT_PANEL = (90, 60, 640, 520), (740, 60, 1140, 520)  # left, top, right, bottom
LEGEND_LEFT = 1160
INK, GRID, IDEAL, CURVE = "#222222", "#dddddd", "#999999", "#1f5fa8"
COLOURS = {
    "products": "#1f5fa8",
    "imbalance": "#e4572e",
    "memory-bound": "#76b7e5",
    "launching": "#b7b7b7",
    "all-to-all": "#f2a541",
    "gradients": "#3f9b5a",
    "weights": "#9ed3a0",
    "optimizer": "#8c6bb1",
}


class LogScale:
    """Map numbers to pixels so that equal ratios are equal lengths."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high = low, high if high > low else 2 * low
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        """Return the place of a value."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)


def draw_scaling(best: list[Prediction], title: str) -> np.ndarray:
    """Draw the best layouts of some numbers of ranks.

    Args:
        best: one prediction for each number of ranks, ascending.
        title: of the picture.

    Returns:
        (height, width, 3) uint8.
    """
    canvas = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((WIDTH / 2, 24), title, fill=INK, font=_font(20), anchor="mm")
    _draw_speed(draw, best)
    _draw_shares(draw, best)
    return np.asarray(canvas)


def _font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _draw_speed(draw: ImageDraw.ImageDraw, best: list[Prediction]) -> None:
    """Draw images per second, with the line of perfect scaling and the layouts' names."""
    left, top, right, bottom = LEFT_PANEL
    counts = [p.layout.world_size for p in best]
    speeds = [p.images_per_sec for p in best]
    ideal = [speeds[0] * n / counts[0] for n in counts]
    low = 10 ** math.floor(math.log10(min(speeds)))
    high = 10 ** math.ceil(math.log10(max(*ideal, *speeds, 1.01 * low)))
    x = LogScale(counts[0], counts[-1], left + 40, right - 40)
    y = LogScale(low, high, bottom, top)
    for exponent in range(round(math.log10(low)), round(math.log10(high)) + 1):
        value = 10.0**exponent
        draw.line((left, y(value), right, y(value)), fill=GRID)
        text = f"{value:,.0f}" if value >= 1 else f"{value:g}"
        draw.text((left - 8, y(value)), text, fill=INK, font=_font(14), anchor="rm")
    for n in counts:
        draw.line((x(n), top, x(n), bottom), fill=GRID)
        draw.text((x(n), bottom + 8), str(n), fill=INK, font=_font(14), anchor="ma")
    _draw_dashes(draw, [(x(n), y(v)) for n, v in zip(counts, ideal, strict=True)])
    points = [(x(n), y(v)) for n, v in zip(counts, speeds, strict=True)]
    draw.line(points, fill=CURVE, width=3)
    for (px, py), prediction in zip(points, best, strict=True):
        draw.ellipse((px - 5, py - 5, px + 5, py + 5), fill=CURVE)
        layout = prediction.layout
        label = f"Z{layout.stage}"
        if layout.expert_parallel_size > 1:
            label += f" EP{layout.expert_parallel_size}"
        style = {"font": _font(13), "anchor": "ma", "stroke_width": 2, "stroke_fill": "white"}
        draw.text((px, py + 10), label, fill=INK, **style)
    draw.rectangle(LEFT_PANEL, outline=INK)
    draw.text((left + 12, top + 10), "images per second", fill=CURVE, font=_font(15), anchor="la")
    draw.text((left + 12, top + 32), "- - perfect scaling", fill=IDEAL, font=_font(15), anchor="la")
    names = "GPUs (Z: ZeRO stage, EP: expert-parallel size)"
    draw.text(((left + right) / 2, bottom + 36), names, fill=INK, font=_font(15), anchor="ma")


def _draw_dashes(draw: ImageDraw.ImageDraw, points: list[tuple[float, float]]) -> None:
    """Draw a dashed line through points."""
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        num_dashes = max(1, int(math.hypot(x1 - x0, y1 - y0) / 12))
        for i in range(num_dashes):
            a, b = i / num_dashes, (i + 0.5) / num_dashes
            start = (x0 + a * (x1 - x0), y0 + a * (y1 - y0))
            draw.line((*start, x0 + b * (x1 - x0), y0 + b * (y1 - y0)), fill=IDEAL, width=2)


def _draw_shares(draw: ImageDraw.ImageDraw, best: list[Prediction]) -> None:
    """Draw the parts of a step as shares of it, one bar for each number of ranks."""
    left, top, right, bottom = RIGHT_PANEL
    for percent in range(0, 101, 20):
        y = bottom + (top - bottom) * percent / 100
        draw.line((left, y, right, y), fill=GRID)
        draw.text((left - 8, y), f"{percent} %", fill=INK, font=_font(14), anchor="rm")
    pitch = (right - left) / len(best)
    for i, prediction in enumerate(best):
        x0, x1, level = left + (i + 0.15) * pitch, left + (i + 0.85) * pitch, float(bottom)
        for part, colour in COLOURS.items():
            height = (bottom - top) * prediction.parts.get(part, 0.0) / prediction.sec
            if height >= 0.5:
                draw.rectangle((x0, level - height, x1, level), fill=colour)
            level -= height
        name = str(prediction.layout.world_size)
        draw.text(((x0 + x1) / 2, bottom + 8), name, fill=INK, font=_font(14), anchor="ma")
    draw.rectangle(RIGHT_PANEL, outline=INK)
    middle = (left + right) / 2
    draw.text((middle, bottom + 36), "GPUs", fill=INK, font=_font(15), anchor="ma")
    draw.text((middle, top - 8), "share of a step", fill=INK, font=_font(15), anchor="ms")
    for i, (part, colour) in enumerate(reversed(COLOURS.items())):
        y = top + 10 + 26 * i
        draw.rectangle((LEGEND_LEFT, y, LEGEND_LEFT + 16, y + 16), fill=colour)
        draw.text((LEGEND_LEFT + 24, y + 8), part, fill=INK, font=_font(15), anchor="lm")
