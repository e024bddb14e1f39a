"""Draw the figures of a report, as PNG files in memory."""

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from training.monitoring import metrics as registry
from training.monitoring.charts import new_figure
from training.monitoring.expert_pictures import affinity_map, expert_map, load_history
from training.monitoring.metric import Metric
from training.monitoring.run_history import RunHistory, thinned
from training.reports.rows import Row, Spread, is_spread, score_name
from training.reports.run_data import RunData

WIDTH, HEIGHT, DPI = 520, 300, 110  # the page's pictures are larger than TensorBoard's by a tenth
GRID_PIXELS = 900


class FigureOf(NamedTuple):
    """One picture of the page."""

    name: str  # of its file
    title: str
    text: str  # what a person should look for
    png: bytes
    is_wide: bool = False  # needs the page's width to be read


MAX_NAMED_LINES = 8


def curves(rows: list[Row]) -> list[FigureOf]:
    """Draw every number that one of the rows has, over steps: of several runs mean and spread."""
    figures = []
    for metric in registry.METRICS:
        having = [row for row in rows if metric.curve and row.series(metric.tag)[0]]
        if having:
            png = _draw(lambda axes, m=metric, h=having: _draw_curve(axes, m, h))
            name = _file_name(metric.tag)
            figures.append(FigureOf(name, metric.curve.title, metric.curve.text, png))
    return figures


def _draw_curve(axes: Axes, metric: Metric, rows: list[Row]) -> None:
    for row in rows:
        recorded, values = row.series(metric.tag)
        # Of each run, so that the band is the spread between runs and not that of neighbours.
        (steps, *_), lines = zip(*(thinned(recorded, line) for line in values), strict=True)
        mean = np.mean(lines, axis=0)
        (line,) = axes.plot(steps, mean, linewidth=1.2, label=row.label)
        if len(row.runs) > 1:
            std = np.std(lines, axis=0, ddof=1)
            band = mean - std, mean + std
            axes.fill_between(steps, *band, color=line.get_color(), alpha=0.25, linewidth=0)
        for start in (start for run in row.runs for start in run.starts[1:]):
            axes.axvline(start.step, color="0.8", linewidth=0.8, zorder=0)
    if metric.curve.is_log:
        axes.set_yscale("log")
    if len(rows) > 1 or len(rows[0].runs) > 1:
        axes.legend(fontsize=7, frameon=False)
    axes.set_xlabel("step (grey: a start)")


def scores(rows: list[Row]) -> list[FigureOf]:
    """Draw evaluation's scores over checkpoints, a line per row and way of measuring.

    One checkpoint makes no line; the page's table has its scores.
    """
    texts = {metric.tag: metric.curve.text for metric in registry.METRICS if metric.curve}
    lines: dict[str, list[tuple[str, list[int], list[Spread]]]] = {}
    for row in rows:
        for way, by_step in sorted(row.scores().items()):
            steps, name = sorted(by_step), f"{row.label}: {way}" if len(rows) > 1 else way
            for tag in by_step[steps[-1]]:
                found = [(step, by_step[step][tag]) for step in steps if tag in by_step[step]]
                lines.setdefault(tag, []).append((name, *map(list, zip(*found, strict=True))))

    def draw(axes: Axes, tag: str) -> None:
        for name, steps, values in lines[tag]:
            means, bars = [v.mean for v in values], [v.std or 0.0 for v in values]
            axes.errorbar(steps, means, bars, linewidth=1.2, marker="o", markersize=3, label=name)
        if len(lines[tag]) <= MAX_NAMED_LINES:
            axes.legend(fontsize=6, frameon=False)
        axes.set_xlabel("step of the checkpoint")

    return [
        FigureOf(
            _file_name(tag),
            score_name(tag),
            texts.get("/".join(tag.split("/")[:2]), "Lower is better."),
            _draw(lambda axes, tag=tag: draw(axes, tag)),
        )
        for tag in sorted(lines)
        if not is_spread(tag)
        if any(len(steps) > 1 for _, steps, _ in lines[tag])
    ]


def error_by_timestep(run: RunData) -> FigureOf | None:
    """Draw the error over the noise level, early, in the middle and at the end of a run."""
    tags = run.tags("mse_by_timestep/")
    if not tags:
        return None

    def draw(axes: Axes) -> None:
        places = np.linspace(0, len(run.records), 4).astype(int)
        for first, last in zip(places[:-1], places[1:], strict=True):
            part = run.records[first:last]
            means = [_mean([record[tag] for record in part if tag in record]) for tag in tags]
            if part:
                axes.plot(means, marker="o", markersize=3, label=f"until step {part[-1]['step']}")
        axes.set_xticks(range(len(tags)), [tag.split("/")[1] for tag in tags], rotation=45, size=7)
        axes.set_xlabel("timestep (000 is clean)")
        axes.legend(fontsize=7, frameon=False)

    text = "Clean latents are the hardest to predict noise for; every range should fall."
    return FigureOf(f"error-{run.slug}.png", "Error by timestep", text, _draw(draw))


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def history(run: RunData) -> FigureOf | None:
    """Draw a run's starts, checkpoints, spikes and lost steps."""
    picture = RunHistory(run.starts, run.checkpoint_notes, run.records).picture()
    text = "Starts, checkpoints, loss spikes and steps left out, along the steps."
    name = f"history-{run.slug}.png"
    return None if picture is None else FigureOf(name, "History", text, _png(picture))


def experts(run: RunData) -> list[FigureOf]:
    """Draw what a run's experts have become."""
    figures = []
    steps, loads = run.loads()
    if len(steps) > 1:
        text = "A band per block; experts' shares of the samples on one another, time to the right."
        picture = load_history(loads, steps)
        figures.append(FigureOf(f"loads-{run.slug}.png", "Loads over time", text, _png(picture)))
    if (gates := run.gate_table()) is not None:
        top_k = run.config.model.top_k
        text = "Which expert serves which timestep, a row per expert; brighter is a larger gate."
        picture = expert_map(gates, top_k, max_columns=gates.shape[1])
        figures.append(FigureOf(f"experts-{run.slug}.png", "Experts", text, _png(picture), True))
        text = "Timesteps against timesteps: white share all their experts, black none."
        picture = affinity_map(gates, top_k)
        figures.append(FigureOf(f"affinity-{run.slug}.png", "Affinity", text, _png(picture)))
    return figures


def grids(run: RunData) -> list[FigureOf]:
    """Show grids of samples of the same seeds and classes, from the first to the last."""
    figures = []
    for path in run.grids:
        with Image.open(path) as image:
            image.thumbnail((GRID_PIXELS, GRID_PIXELS), Image.Resampling.LANCZOS)
            png = _png(np.asarray(image.convert("RGB")))
        title = f"Samples at step {int(path.stem):,}"
        figures.append(FigureOf(f"samples-{run.slug}-{path.stem}.png", title, "", png))
    return figures


def _draw(draw: Callable[[Axes], None]) -> bytes:
    figure = new_figure(WIDTH, HEIGHT, layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    axes.grid(color="0.93")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _file_name(tag: str) -> str:
    return f"{tag.replace('/', '-')}.png"
