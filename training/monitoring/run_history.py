"""What befell a run, along its steps: starts, checkpoints, loss spikes and steps left out.

checkpoints.jsonl    a line per checkpoint: saved, failed, or found damaged at a start
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_tools.files import FIRST
from data_tools.formats import Format
from training.run.program import Start

CHECKPOINTS_FILE = "checkpoints.jsonl"
SAVED, FAILED, DAMAGED = "saved", "failed", "damaged"
MAX_POINTS = 600  # of a line; more are averaged

WIDTH, CURVE_HEIGHT, LANE_HEIGHT = 340, 150, 18  # TensorBoard shows pictures about so wide
LEFT, RIGHT, TOP, GAP, BOTTOM = 62, 10, 22, 8, 20  # the gap is between curve and lanes
OVERSAMPLING = 2  # drawn so much larger and reduced, for smooth lines
FONT_SIZE = 12
X_TICKS, Y_TICKS = 4, 3  # intervals between ticks, and ticks
INK, GREY, BLUE, RED, GREEN, ORANGE = (
    *("#222222", "#d9d9d9", "#0072b2", "#d62728", "#009e73", "#e69f00"),
)


@dataclass(frozen=True)
class CheckpointNote:
    """What became of a checkpoint.

    Attributes:
        step: of the checkpoint; of a damaged one, the step that the run went on from instead.
        outcome: SAVED, FAILED or DAMAGED.
        reason: of a failure or of damage; else empty.
    """

    step: int
    outcome: str
    reason: str = field(default="", metadata=FIRST)


NOTE = Format(newest=1, kind=CheckpointNote)


def append_note(run_dir: Path, note: CheckpointNote) -> None:
    """Add a line to checkpoints.jsonl. Only rank 0 calls this.

    Raises:
        OSError: it cannot be written.
    """
    NOTE.append(run_dir / CHECKPOINTS_FILE, note)


def read_notes(run_dir: Path) -> list[CheckpointNote]:
    """Return what became of a run's checkpoints, oldest first."""
    return NOTE.read_journal(run_dir / CHECKPOINTS_FILE)


def last_saved_step(run_dir: Path) -> int | None:
    """Return the step of the checkpoint that a run saved last; None if it has saved none."""
    steps = [note.step for note in read_notes(run_dir) if note.outcome == SAVED]
    return steps[-1] if steps else None


def thinned(steps: list[int], values: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Average neighbours until at most MAX_POINTS are left."""
    count = min(len(steps), MAX_POINTS)
    parts = np.array_split(np.arange(len(steps)), count)
    x, y = np.array(steps), np.array(values)
    return np.array([x[part[-1]] for part in parts]), np.array([y[part].mean() for part in parts])


class RunHistory:
    """Collects what befell a run, and draws it.

    Args:
        starts: of the run, oldest first.
        notes: of its checkpoints.
        records: of metrics.jsonl.
    """

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
        damaged = [note.step for note in self.notes if note.outcome == DAMAGED]
        lanes = (
            ("start", BLUE, [start.step for start in self.starts], damaged),
            ("saved", GREEN, self._noted(SAVED), self._noted(FAILED)),
            ("spike", ORANGE, self._spikes, []),
            ("left out", INK, self._left_out, []),
        )
        canvas = _Canvas(len(lanes), max(self._last_step, 1))
        canvas.draw_axes(np.array(self._errors))
        for start in self.starts[1:]:
            canvas.draw_restart(start.step, RED if start.step in damaged else BLUE)
        canvas.draw_curve(*thinned(self._steps, self._errors))
        for row, (name, colour, steps, bad_steps) in enumerate(lanes):
            canvas.draw_lane(row, name, colour, steps)
            canvas.draw_lane(row, name, RED, bad_steps)
        return canvas.picture()

    def _noted(self, outcome: str) -> list[int]:
        return [note.step for note in self.notes if note.outcome == outcome]


class _Canvas:
    """A curve above lanes of marks, all over the same steps."""

    def __init__(self, num_lanes: int, last_step: int) -> None:
        self.last_step = last_step
        self.bottom = TOP + CURVE_HEIGHT
        self.lanes_end = self.bottom + GAP + num_lanes * LANE_HEIGHT
        size = (WIDTH * OVERSAMPLING, (self.lanes_end + BOTTOM) * OVERSAMPLING)
        self._image = Image.new("RGB", size, "white")
        self._draw = ImageDraw.Draw(self._image)
        self._font = ImageFont.load_default(size=FONT_SIZE * OVERSAMPLING)
        self._low = self._high = 0.0  # of the error's logarithm

    def _x(self, step: float) -> float:
        return LEFT + (WIDTH - RIGHT - LEFT) * min(step / self.last_step, 1.0)

    def _y(self, error: float) -> float:
        share = (np.log(error) - self._low) / (self._high - self._low)
        return self.bottom - float(share.clip(0, 1)) * CURVE_HEIGHT

    def _line(self, points: list[tuple[float, float]], colour: str, width: float) -> None:
        scaled = [(x * OVERSAMPLING, y * OVERSAMPLING) for x, y in points]
        self._draw.line(scaled, fill=colour, width=round(width * OVERSAMPLING), joint="curve")

    def _text(self, x: float, y: float, text: str, anchor: str, colour: str = INK) -> None:
        place = x * OVERSAMPLING, y * OVERSAMPLING
        self._draw.text(place, text, fill=colour, font=self._font, anchor=anchor)

    def draw_axes(self, errors: np.ndarray) -> None:
        """Choose what is shown of the errors, and name steps and errors."""
        shown = np.log(errors[errors > 0]) if (errors > 0).any() else np.zeros(1)
        # One interval of nonsense must not flatten the rest.
        self._low, self._high = np.quantile(shown, [0.0, 0.995]) + np.array([-0.02, 0.02])
        self._text(LEFT, TOP / 2, "mean squared error (red: a checkpoint failed)", "lm")
        for value in np.exp(np.linspace(self._low, self._high, Y_TICKS)):
            y = self._y(value)
            self._line([(LEFT, y), (WIDTH - RIGHT, y)], GREY, 1)
            self._text(LEFT - 5, y, f"{value:.2g}", "rm")
        for tick in range(X_TICKS + 1):
            step = tick * self.last_step // X_TICKS
            anchor = "la" if tick == 0 else "ra" if tick == X_TICKS else "ma"
            end = self._x(step) + (RIGHT - 2 if tick == X_TICKS else 0)
            self._text(end, self.lanes_end + 3, f"{step:,}", anchor)
        self._line([(LEFT, self.bottom), (WIDTH - RIGHT, self.bottom)], INK, 1)

    def draw_restart(self, step: int, colour: str) -> None:
        """Mark a start of a run that had begun before."""
        self._line([(self._x(step), TOP), (self._x(step), self.lanes_end)], colour, 1)

    def draw_curve(self, steps: np.ndarray, errors: np.ndarray) -> None:
        """Draw the errors that have a logarithm."""
        points = [(self._x(s), self._y(e)) for s, e in zip(steps, errors, strict=True) if e > 0]
        if len(points) > 1:
            self._line(points, INK, 1.5)

    def draw_lane(self, row: int, name: str, colour: str, steps: list[int]) -> None:
        """Draw marks of one kind."""
        top = self.bottom + GAP + row * LANE_HEIGHT
        self._text(LEFT - 5, top + LANE_HEIGHT / 2, name, "rm")
        self._line([(LEFT, top + LANE_HEIGHT), (WIDTH - RIGHT, top + LANE_HEIGHT)], GREY, 1)
        for step in steps:
            x = self._x(step)
            self._line([(x, top + 3), (x, top + LANE_HEIGHT - 2)], colour, 2)

    def picture(self) -> np.ndarray:
        """Return what was drawn, (height, WIDTH, 3) uint8."""
        return np.asarray(self._image.reduce(OVERSAMPLING))
