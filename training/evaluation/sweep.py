"""Several ways of sampling side by side: the table and the picture of their scores."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PANEL_WIDTH, PANEL_HEIGHT = 430, 320
LEFT, RIGHT, TOP, BOTTOM = 70, 16, 40, 46  # of a panel, around its axes
LEGEND_WIDTH = 200
TICKS = 5
INK, GRID = "#222222", "#dddddd"
COLOURS = ("#1f5fa8", "#e4572e", "#3f9b5a", "#f2a541", "#8c6bb1", "#b7b7b7", "#76b7e5", "#9c6644")


@dataclass(frozen=True)
class SweepPoint:
    """One way of sampling and what it scored."""

    sampler: str
    steps: int
    cfg_scale: float
    metrics: dict[str, float]


def table_of(points: list[SweepPoint]) -> str:
    """Return a line per point, columns aligned."""
    names = list(points[0].metrics)
    rows = [["sampler", "steps", "cfg scale", *names]]
    for point in points:
        numbers = [f"{point.metrics[name]:.4g}" for name in names]
        rows.append([point.sampler, str(point.steps), f"{point.cfg_scale:g}", *numbers])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.rjust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines) + "\n"


def plot_of(points: list[SweepPoint], title: str) -> np.ndarray:
    """Draw a panel per metric: guidance along the bottom if it varies, else steps; else one mark.

    Returns:
        (height, width, 3) uint8.
    """
    varies_scale = len({point.cfg_scale for point in points}) > 1
    along = "cfg scale" if varies_scale else "steps"
    curves: dict[str, list[tuple[float, SweepPoint]]] = {}
    for point in points:
        place = point.cfg_scale if varies_scale else float(point.steps)
        name = f"{point.sampler}, {point.steps} steps" if varies_scale else point.sampler
        curves.setdefault(name, []).append((place, point))
    metrics = list(points[0].metrics)
    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    size = (columns * PANEL_WIDTH + LEGEND_WIDTH, rows * PANEL_HEIGHT + TOP)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((size[0] / 2, TOP / 2), title, fill=INK, font=_font(15), anchor="mm")
    for i, metric in enumerate(metrics):
        corner = (i % columns * PANEL_WIDTH, TOP + i // columns * PANEL_HEIGHT)
        lines = {
            name: sorted((place, point.metrics[metric]) for place, point in curve)
            for name, curve in curves.items()
        }
        _draw_panel(draw, corner, metric, along, lines)
    for i, name in enumerate(curves):
        left, middle = columns * PANEL_WIDTH + 10, TOP + 24 + 20 * i
        colour = COLOURS[i % len(COLOURS)]
        draw.line([(left, middle), (left + 22, middle)], fill=colour, width=3)
        draw.text((left + 28, middle), name, fill=INK, font=_font(12), anchor="lm")
    return np.asarray(canvas)


def _font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


class _Axis:
    """Maps values to pixels, with some room at either end."""

    def __init__(self, values: list[float], start: float, end: float) -> None:
        low, high = min(values), max(values)
        room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        self.low, self.high, self.start, self.end = low - room, high + room, start, end

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        return np.linspace(self.low, self.high, TICKS).tolist()


def _draw_panel(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    metric: str,
    along: str,
    lines: dict[str, list[tuple[float, float]]],
) -> None:
    left, right = corner[0] + LEFT, corner[0] + PANEL_WIDTH - RIGHT
    top, bottom = corner[1] + TOP, corner[1] + PANEL_HEIGHT - BOTTOM
    places = sorted({place for line in lines.values() for place, _ in line})
    across = _Axis(places, left, right)
    up = _Axis([value for line in lines.values() for _, value in line], bottom, top)
    draw.text(((left + right) / 2, top - 8), metric, fill=INK, font=_font(14), anchor="ms")
    for value in up.ticks():
        draw.line([(left, up(value)), (right, up(value))], fill=GRID)
        draw.text((left - 6, up(value)), f"{value:.4g}", fill=INK, font=_font(11), anchor="rm")
    last = left - 1000.0
    for place in places:
        draw.line([(across(place), top), (across(place), bottom)], fill=GRID)
        if across(place) - last > 34:  # else the numbers would overlap
            last = across(place)
            draw.text((last, bottom + 6), f"{place:g}", fill=INK, font=_font(11), anchor="mt")
    draw.text(((left + right) / 2, bottom + 24), along, fill=INK, font=_font(12), anchor="mt")
    draw.rectangle([left, top, right, bottom], outline=INK)
    for i, line in enumerate(lines.values()):
        colour = COLOURS[i % len(COLOURS)]
        pixels = [(across(place), up(value)) for place, value in line]
        draw.line(pixels, fill=colour, width=2)
        for x, y in pixels:
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
