"""Compare several ways of sampling: the table and the picture of their scores."""

from dataclasses import dataclass

import numpy as np

from training.evaluation.scores import STD
from training.monitoring.charts import COLOURS, new_figure, pixels_of

PANEL_WIDTH, PANEL_HEIGHT = 430, 320
TITLE_HEIGHT, LEGEND_WIDTH = 40, 200
COLUMNS = 3
MIN_GAP = 0.06  # of the axis, between two numbers along the bottom


@dataclass(frozen=True)
class SweepPoint:
    """One way of sampling and what it scored."""

    sampler: str
    steps: int
    cfg_scale: float
    metrics: dict[str, float]


def table_of(points: list[SweepPoint]) -> str:
    """Return a line per point, columns aligned."""
    names = _names(points)
    rows = [["sampler", "steps", "cfg scale", *names]]
    for point in points:
        values = [point.metrics.get(name) for name in names]
        numbers = ["-" if value is None else f"{value:.4g}" for value in values]
        rows.append([point.sampler, str(point.steps), f"{point.cfg_scale:g}", *numbers])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.rjust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines) + "\n"


def _names(points: list[SweepPoint]) -> list[str]:
    """Name the scores that any point has: an earlier version's card has fewer."""
    return list(dict.fromkeys(name for point in points for name in point.metrics))


def plot_of(points: list[SweepPoint], title: str) -> np.ndarray:
    """Draw a panel per metric: guidance along the bottom if it varies, else steps; else one mark.

    A metric's standard deviation is a bar at its mark.

    Returns:
        (height, width, 3) uint8.
    """
    varies_scale = len({point.cfg_scale for point in points}) > 1
    curves: dict[str, list[tuple[float, SweepPoint]]] = {}
    for point in points:
        place = point.cfg_scale if varies_scale else float(point.steps)
        name = f"{point.sampler}, {point.steps} steps" if varies_scale else point.sampler
        curves.setdefault(name, []).append((place, point))
    places = sorted({place for curve in curves.values() for place, _ in curve})
    names = _names(points)
    metrics = [name for name in names if name.removesuffix(STD) not in names or STD not in name]
    columns = min(COLUMNS, len(metrics))
    rows = -(-len(metrics) // columns)
    width, height = columns * PANEL_WIDTH + LEGEND_WIDTH, rows * PANEL_HEIGHT + TITLE_HEIGHT
    figure = new_figure(width, height, layout="constrained")
    figure.suptitle(title)
    for i, metric in enumerate(metrics):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.set_title(metric, fontsize="medium")
        axes.set_xlabel("cfg scale" if varies_scale else "steps")
        if len(places) == 1 or np.diff(places).min() > MIN_GAP * np.ptp(places):
            axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.grid(color="0.9")
        axes.set_prop_cycle(color=COLOURS)
        for name, curve in curves.items():
            line = sorted(
                (place, point.metrics.get(metric, np.nan), point.metrics.get(f"{metric}{STD}", 0.0))
                for place, point in curve
            )
            places_of, values, spreads = zip(*line, strict=True)
            axes.errorbar(places_of, values, spreads, marker="o", markersize=4, label=name)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return pixels_of(figure)
