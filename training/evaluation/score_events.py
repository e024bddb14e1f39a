"""Write a run's scores to TensorBoard, each at the step of the checkpoint that it measures.

Every way of measuring (sampler, steps, guidance, number of images, reference, average, ...) has a
folder below tensorboard/evaluation, so that each chart has a line per way. They are not in the
training's own folder, because TensorBoard follows one file of a folder at a time.
"""

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from data_tools.files import MalformedError
from data_tools.formats import NewerFormatError
from training.evaluation.card import CARD
from training.evaluation.job import EVALUATION_DIR
from training.evaluation.networks import INCEPTION_NAME
from training.monitoring.dashboard import evaluation_charts
from training.monitoring.event_files import TENSORBOARD_DIR

CARDS = ("*/score-*.json", "validation-*.json")  # in the folder of a run's evaluations
OF_WEIGHTS = ("weights_sha256", "weaker_weights_sha256", "batch_size")  # no ways of measuring
MAX_VALUE = float(np.finfo(np.float32).max)  # that TensorBoard can hold
_NO_TAG = re.compile(r"[^\w.-]")
_STEP = re.compile(r"step-\d+-")


class Scores(NamedTuple):
    """What one card says."""

    way: str  # names the folder
    step: int
    values: dict[str, float]  # by TensorBoard's tag
    network: str = ""  # of --features, which they are of


def write_score_events(run_dir: Path) -> None:
    """Write the scores of a run that are not there yet.

    Raises:
        OSError: a file cannot be read or written.
    """
    for way, by_step in read_scores(run_dir / EVALUATION_DIR).items():
        folder = run_dir / TENSORBOARD_DIR / EVALUATION_DIR / way
        points = {
            (tag, step): float(np.float32(value))
            for step, values in sorted(by_step.items())
            for tag, value in values.items()
        }
        if points == _written(folder):
            continue
        # All of them again, in the order of steps that TensorBoard needs, after a note that makes
        # it forget what it has read before. A file that it may be reading must not go away.
        with SummaryWriter(str(folder), purge_step=0) as writer:
            writer.add_custom_scalars(evaluation_charts())
            for (tag, step), value in points.items():
                writer.add_scalar(tag, value, step)


def _written(folder: Path) -> dict[tuple[str, int], float]:
    """Return what TensorBoard shows of a folder, by tag and step."""
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0})
    if folder.exists():
        events.Reload()
    tags = events.Tags()[SCALARS]
    return {(tag, event.step): event.value for tag in tags for event in events.Scalars(tag)}


def read_scores(folder: Path) -> dict[str, dict[int, dict[str, float]]]:
    """Return the scores by way and step; of two cards alike the newer one counts.

    In a run with scores by several networks of --features each has tags of its own.

    Raises:
        OSError: a card cannot be read.
    """
    paths = [path for pattern in CARDS for path in folder.glob(pattern)]
    all_scores: list[Scores] = []
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns):
        try:
            scores = scores_of(CARD.loads(path.read_bytes(), str(path)), path)
        except NewerFormatError as err:
            sys.stderr.write(f"warning: {err} Its scores are left out.\n")
            continue
        except (MalformedError, ValueError, KeyError, TypeError, AttributeError):
            continue  # a card of another program, such as score_images
        if scores is not None and scores.values:
            all_scores.append(scores)
    are_many = len({scores.network for scores in all_scores} - {""}) > 1
    found: dict[str, dict[int, dict[str, float]]] = {}
    for scores in all_scores:
        end = f"/{scores.network}" if are_many and scores.network else ""
        values = {f"{tag}{end}": value for tag, value in scores.values.items()}
        found.setdefault(scores.way, {})[scores.step] = values
    return found


def scores_of(card: dict[str, Any], path: Path) -> Scores | None:
    """Say what a card of evaluate.py holds; None if its weights are of no checkpoint.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is no such card.
    """
    step = card["weights"].get("step")
    if step is None:
        return None
    if type(step) is not int:
        raise TypeError(f"step {step!r}")
    if "validation_loss" in card:
        precision = card.get("precision", "fp32")
        suffix = "" if precision == "fp32" else f"-{precision}"
        stem = path.stem.removeprefix("validation-").removesuffix(suffix)
        name, _, data = stem.rpartition("-")
        means = {f"loss_{term}": value["mean"] for term, value in card["validation_loss"].items()}
        # The name also has the weights' hash: "step-0001000-ema-SHA-t8-4096-DATA".
        weights, _, timesteps, count = name.rsplit("-", 3)
        way = f"loss-{_STEP.sub('', weights)}-{timesteps}-{count}-{data}{suffix}"
        return Scores(way, step, _by_tag(means))
    drawn = {key: value for key, value in card["images"].items() if key not in OF_WEIGHTS}
    if drawn.get("precision") == "fp32":
        del drawn["precision"]  # as in cards of before there were others
    compared = (
        card["reference"]["sha256"],
        card["features"]["sha256"],
        card["weights"].get("average"),
    )
    digest = hashlib.sha256(json.dumps([drawn, compared], sort_keys=True).encode()).hexdigest()
    way = f"{_STEP.sub('', path.parent.name)}-{digest[:8]}"
    return Scores(way, step, _by_tag(card["metrics"]), _network_of(card["features"]))


def _network_of(features: dict[str, Any]) -> str:
    """Name a network of --features as a tag may: those of equal names by their hash."""
    name = str(features.get("network", INCEPTION_NAME))
    if name == INCEPTION_NAME:
        return ""
    return f"{_NO_TAG.sub('_', Path(name).stem)}-{str(features['sha256'])[:8]}"


def _by_tag(values: dict[str, Any]) -> dict[str, float]:
    """Return numbers by TensorBoard's tag, without those that are not finite."""
    if any(type(value) not in (int, float) for value in values.values()):
        raise TypeError(f"no numbers: {values}")
    return {f"eval/{name}": value for name, value in values.items() if abs(value) <= MAX_VALUE}
