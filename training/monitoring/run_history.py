"""Draw the history of a run along its steps: its error, starts, checkpoints, spikes, lost steps."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from training.monitoring.charts import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    RED,
    new_figure,
    pixels_of,
    points,
)
from training.run.checkpoint_notes import DAMAGED, FAILED, SAVED, CheckpointNote
from training.run.program import Start

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 600  # of a line; more are averaged
# Pixels; TensorBoard shows pictures about so wide. The gap is between curve and lanes.
WIDTH, CURVE_HEIGHT, LANE_HEIGHT = 340, 150, 18
LEFT, RIGHT, TOP, GAP, BOTTOM = 62, 10, 22, 8, 20
FONT_SIZE = 11
X_TICKS, Y_TICKS = 4, 3  # intervals between ticks, and ticks


def thinned(steps: list[int], values: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Average neighbours until at most MAX_POINTS are left."""
    count = min(len(steps), MAX_POINTS)
    parts = np.array_split(np.arange(len(steps)), count)
    x, y = np.array(steps), np.array(values)
    return np.array([x[part[-1]] for part in parts]), np.array([y[part].mean() for part in parts])


class RunHistory:
    """What happened to a run so far, by its starts, oldest first, and metrics; and its picture."""

    def __init__(
        self,
        starts: list[Start],
        notes: list[CheckpointNote],
        records: Iterable[dict[str, float]] = (),
    ) -> None:
        self.starts, self.notes = starts, list(notes)
        self._steps: list[int] = []
        self._errors: list[float] = []
        self._spikes: list[int] = []
        self._left_out: list[int] = []
        self._last_step, self._num_left_out = 0, 0.0
        for record in records:
            self.add_interval(int(record["step"]), record)

    def add_interval(self, step: int, metrics: dict[str, float]) -> None:
        """Add the metrics of a logging interval that ended with a step."""
        self._last_step = max(self._last_step, step)
        if "loss/mse" in metrics:
            self._steps.append(step)
            self._errors.append(metrics["loss/mse"])
        if metrics.get("loss/spikes", 0.0) > 0:
            self._spikes.append(step)
        num_left_out = metrics.get("optim/skipped_steps", 0.0)
        if num_left_out > self._num_left_out:
            self._left_out.append(step)
        self._num_left_out = num_left_out  # a start may count anew

    def picture(self) -> np.ndarray | None:
        """Draw the error over steps and, below it, a lane of marks for each kind of event.

        Returns:
            (height, WIDTH, 3) uint8; None before anything was recorded.
        """
        if not self._steps:
            return None
        lanes = {
            "start": (BLUE, [start.step for start in self.starts], self._noted(DAMAGED)),
            "saved": (GREEN, self._noted(SAVED), self._noted(FAILED)),
            "spike": (ORANGE, self._spikes, []),
            "left out": (INK, self._left_out, []),
        }
        lanes_height = LANE_HEIGHT * len(lanes)
        height, width = TOP + CURVE_HEIGHT + GAP + lanes_height + BOTTOM, WIDTH - LEFT - RIGHT
        figure = new_figure(WIDTH, height)
        curve, marks = (
            figure.add_axes((LEFT / WIDTH, bottom / height, width / WIDTH, tall / height))
            for bottom, tall in (
                (BOTTOM + lanes_height + GAP, CURVE_HEIGHT),
                (BOTTOM, lanes_height),
            )
        )
        self._draw_curve(curve)
        last = max(self._last_step, 1)
        for row, (colour, good, bad) in enumerate(lanes.values()):
            for steps, shade in ((good, colour), (bad, RED)):
                marks.eventplot(
                    np.minimum(steps, last),
                    lineoffsets=row + 0.5,
                    linelengths=0.7,
                    linewidths=points(2),
                    colors=shade,
                    snap=True,
                    clip_on=False,  # else the first and the last step have half a mark
                )
        marks.set_yticks(np.arange(len(lanes)) + 0.5, lanes)
        marks.set_ylim(len(lanes), 0)
        marks.hlines(np.arange(len(lanes)) + 1, 0, last, GREY, linewidth=points(1))
        ticks = [tick * last // X_TICKS for tick in range(X_TICKS + 1)]
        marks.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        marks.get_xticklabels()[-1].set_horizontalalignment("right")
        for axes in (curve, marks):
            axes.set_xlim(0, last)
            axes.tick_params(labelsize=points(FONT_SIZE), length=0, pad=3)
            axes.spines[:].set_visible(False)
            for start in self.starts[1:]:
                shade = RED if start.step in self._noted(DAMAGED) else BLUE
                axes.axvline(min(start.step, last), color=shade, linewidth=points(1), zorder=1)
        return pixels_of(figure)

    def _draw_curve(self, axes: "Axes") -> None:
        """Draw the errors that have a logarithm."""
        errors = np.array(self._errors)
        shown = np.log(errors[errors > 0]) if (errors > 0).any() else np.zeros(1)
        # One interval of nonsense must not flatten the rest.
        low, high = np.quantile(shown, [0.0, 0.995]) + np.array([-0.02, 0.02])
        axes.set_yscale("log")
        axes.set_ylim(np.exp(low), np.exp(high))
        axes.minorticks_off()
        ticks = np.exp(np.linspace(low, high, Y_TICKS))
        axes.set_yticks(ticks, [f"{tick:.2g}" for tick in ticks])
        axes.set_xticks([])
        axes.grid(axis="y", color=GREY, linewidth=points(1))
        steps, means = thinned(self._steps, self._errors)
        is_shown = means > 0
        axes.plot(steps[is_shown], means[is_shown], color=INK, linewidth=points(1.5))
        axes.axhline(np.exp(low), color=INK, linewidth=points(2))  # half of it lies outside
        title = "mean squared error (red: a checkpoint failed)"
        axes.set_title(title, loc="left", fontsize=points(FONT_SIZE), pad=5)

    def _noted(self, outcome: str) -> list[int]:
        return [note.step for note in self.notes if note.outcome == outcome]
