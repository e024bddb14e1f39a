"""The picture of a run: events are drawn where they happened."""

import numpy as np
import pytest
from PIL import ImageColor

from training.monitoring.charts import BLUE, GREEN, INK, ORANGE, RED
from training.monitoring.run_history import (
    CURVE_HEIGHT,
    GAP,
    LANE_HEIGHT,
    LEFT,
    MAX_POINTS,
    RIGHT,
    TOP,
    WIDTH,
    RunHistory,
    thinned,
)
from training.run.checkpoint_notes import DAMAGED, FAILED, SAVED, CheckpointNote
from training.run.program import Start

LAST = 1000
RECORDS = [{"step": step, "loss/mse": 50 / step} for step in range(10, LAST + 1, 10)]
LANES = ("start", "saved", "spike", "left out")


def start(step):
    texts = ("hardware", "batch_job", "commit", "sources", "changes", "packages", "python")
    rest = dict.fromkeys(texts, "") | {"data_hash": "", "config_changes": []}
    return Start("", step, "", "", {}, **rest)


def marks(picture, lane, colour):
    """The steps at which a lane has marks of a colour."""
    top = TOP + CURVE_HEIGHT + GAP + LANES.index(lane) * LANE_HEIGHT
    row = picture[top + LANE_HEIGHT // 2, LEFT - 2 :].astype(int)
    is_marked = np.abs(row - ImageColor.getrgb(colour)).sum(axis=1) < 40
    places = np.flatnonzero(is_marked)
    groups = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    middles = [group.mean() - 2 for group in groups if len(group)]
    return [round(LAST * middle / (WIDTH - LEFT - RIGHT)) for middle in middles]


def test_events_are_marked_where_they_happened():
    records = [dict(record) for record in RECORDS]
    records[29]["loss/spikes"] = 2.0
    for record in records[60:]:
        record["optim/skipped_steps"] = 1.0
    for record in records[80:]:
        record["optim/skipped_steps"] = 0.0  # a start counts anew
    notes = [CheckpointNote(step, SAVED) for step in (100, 200, 400)]
    notes += [CheckpointNote(700, FAILED, "no room"), CheckpointNote(500, DAMAGED, "torn")]

    picture = RunHistory([start(0), start(300), start(500)], notes, records).picture()

    near = {"abs": 6}
    assert marks(picture, "saved", GREEN) == pytest.approx([100, 200, 400], **near)
    assert marks(picture, "saved", RED) == pytest.approx([500, 700], **near)
    assert marks(picture, "start", BLUE) == pytest.approx([0, 300], **near)
    assert marks(picture, "start", RED) == pytest.approx([500], **near), "went on from an older one"
    assert marks(picture, "spike", ORANGE) == pytest.approx([300], **near)
    assert marks(picture, "left out", INK) == pytest.approx([610], **near)


def test_the_curve_falls_as_the_error_does():
    picture = RunHistory([start(0)], [], RECORDS).picture()

    plot = picture[TOP + 1 : TOP + CURVE_HEIGHT - 1, LEFT + 1 : WIDTH - RIGHT]
    heights = [column.argmin() for column in plot.sum(axis=2).T[5:-5:20]]
    assert heights == sorted(heights) and heights[-1] - heights[0] > CURVE_HEIGHT / 2


@pytest.mark.parametrize("errors", [[1.0], [0.0, 0.0], [2.0, 2.0, 2.0], [1.0, 0.0, 1e9]])
def test_odd_errors_are_drawn_too(errors):
    records = [{"step": i + 1, "loss/mse": error} for i, error in enumerate(errors)]

    assert RunHistory([], [], records).picture().shape[1] == WIDTH


def test_a_run_that_recorded_nothing_has_no_picture():
    assert RunHistory([start(0)], [], [{"step": 10, "optim/skipped_steps": 10.0}]).picture() is None


def test_thinning_averages_neighbours_and_keeps_the_last_step():
    steps, values = thinned(list(range(1, 1801)), [float(i) for i in range(1800)])

    assert len(steps) == MAX_POINTS
    assert steps[-1] == 1800
    assert np.allclose(values[:2], [1.0, 4.0])
