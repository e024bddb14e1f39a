"""Evaluation's scores in TensorBoard: at the step of their checkpoint, once, a line per way."""

import json
import shutil
import time

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from tests.support.evaluated_run import STEP, make_data, make_run, save_network
from tests.support.events import scalars_in_tensorboard
from training import evaluate
from training.evaluation.score_events import read_scores, write_score_events
from training.monitoring.event_files import TENSORBOARD_DIR, Monitor

pytestmark = pytest.mark.processes

SWEEP = ("--num-images", 14, "--sweep-steps", "1,2", "--seed", 1)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A run with a sweep of two ways, scored, and a held-out loss; measured twice over."""
    folder = tmp_path_factory.mktemp("run")
    run_dir, reference = folder / "run", folder / "reference.npz"
    make_run(run_dir, folder / "data")
    make_data(folder / "held-out", [5, 4], first=100)
    np.savez(reference, np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3)).astype("uint8"))
    flags = ("--reference", reference, "--features", save_network(folder / "means.pt"))
    command = (run_dir, *SWEEP, *flags, "--validation-data", folder / "held-out")
    for _ in range(2):
        evaluate.main([str(part) for part in command])
        assert len(list((run_dir / TENSORBOARD_DIR).rglob("events.*"))) == 3
    return run_dir


def ways(run_dir):
    """The points of every way of measuring, by the way's name, then by tag."""
    found = {}
    for folder in sorted((run_dir / TENSORBOARD_DIR / "evaluation").iterdir()):
        events = EventAccumulator(str(folder))
        events.Reload()
        tags = events.Tags()["scalars"]
        found[folder.name] = {t: [(e.step, e.value) for e in events.Scalars(t)] for t in tags}
    return found


def test_scores_are_points_at_their_checkpoints_step_and_only_once(evaluated):
    cards = sorted((evaluated / "evaluation").glob("*/score-*.json"))
    losses = next((evaluated / "evaluation").glob("validation-*.json"))

    first, second, loss = ways(evaluated).values()

    for points, card in zip((first, second), cards, strict=True):
        metrics = json.loads(card.read_text())["metrics"]
        assert points == {
            f"eval/{name}": [(STEP, pytest.approx(value))] for name, value in metrics.items()
        }
    terms = json.loads(losses.read_text())["validation_loss"]
    assert loss == {
        f"eval/loss_{name}": [(STEP, pytest.approx(term["mean"]))] for name, term in terms.items()
    }
    names = list(ways(evaluated))
    assert [name.rsplit("-", 1)[0] for name in names[:2]] == [
        *("ema-ddim1-cfg2-14-seed1", "ema-ddim2-cfg2-14-seed1"),
    ]
    assert names[2].startswith("loss-ema-t8-9-")


def test_another_precision_is_a_line_of_its_own_and_fp32_the_line_of_before(evaluated, tmp_path):
    shutil.copytree(evaluated / "evaluation", tmp_path / "evaluation")
    losses = next((tmp_path / "evaluation").glob("validation-*.json"))
    reduced = json.loads(losses.read_text()) | {"precision": "bf16"}
    losses.with_name(f"{losses.stem}-bf16.json").write_text(json.dumps(reduced))
    for path in (tmp_path / "evaluation").glob("*/score-*.json"):
        card = json.loads(path.read_text())
        assert card["images"].pop("precision") == "fp32"
        path.write_text(json.dumps(card))

    before, after = (read_scores(folder / "evaluation") for folder in (evaluated, tmp_path))

    of_losses = next(way for way in before if way.startswith("loss-"))
    assert after.keys() - before.keys() == {f"{of_losses}-bf16"}
    assert before.keys() <= after.keys()


def test_a_tensorboard_that_runs_shows_a_later_checkpoint_on_the_same_line(evaluated, tmp_path):
    way = next(iter(ways(evaluated)))
    live = EventAccumulator(str(evaluated / TENSORBOARD_DIR / "evaluation" / way))
    live.Reload()
    card = next((evaluated / "evaluation").glob("step-0000007-ema-ddim1-*/score-*.json"))
    values = json.loads(card.read_text())
    values["weights"] |= {"step": STEP + 2, "checkpoint": "step-0000009"}
    values["images"] |= {"weights_sha256": "1", "batch_size": 3}
    values["metrics"] = {"frechet_distance": 0.5}
    later = card.parents[1] / card.parent.name.replace("0000007", "0000009") / card.name
    other = later.with_name("score-2.json")
    later.parent.mkdir()
    later.write_text(json.dumps(values))
    values["images"]["labels"] = "balanced"
    other.write_text(json.dumps(values))
    del values["weights"]["step"]  # of a file that was made of stored averages
    other.with_name("score-3.json").write_text(json.dumps(values))

    time.sleep(1)  # files are ordered by the second in their names
    write_score_events(evaluated)

    live.Reload()
    points = [(event.step, event.value) for event in live.Scalars("eval/frechet_distance")]
    assert points == ways(evaluated)[way]["eval/frechet_distance"]
    assert [step for step, _ in points] == [STEP, STEP + 2]
    assert len(ways(evaluated)) == 4, "labels by another rule are another way"


def test_the_trainings_own_file_is_left_alone(evaluated):
    monitor = Monitor(evaluated)
    monitor.scalars(1, {"loss/total": 1.0})
    write_score_events(evaluated)
    monitor.scalars(2, {"loss/total": 2.0})
    monitor.close()

    assert scalars_in_tensorboard(evaluated) == {"loss/total": [(1, 1.0), (2, 2.0)]}


def test_each_way_brings_the_charts_along(evaluated):
    folder = next((evaluated / TENSORBOARD_DIR / "evaluation").iterdir())
    events = EventAccumulator(str(folder))
    events.Reload()

    layout = events.Tensors("custom_scalars__config__")[-1]  # one per file
    (category,) = Layout.FromString(layout.tensor_proto.string_val[0]).category
    assert category.title == "How good are its images?"


def test_scores_kept_elsewhere_stay_out_of_the_run(evaluated, tmp_path):
    before = ways(evaluated)

    flags = ("--num-images", "2", "--steps", "1", "--output", str(tmp_path))
    evaluate.main([str(evaluated), *flags])

    assert ways(evaluated) == before


IMAGES = {  # what a card of images has besides its scores
    "weights": {"step": 7, "average": "ema"},
    "images": {"sampler": "ddim"},
    "reference": {"sha256": "0"},
    "features": {"sha256": "0"},
}
FOREIGN = [
    *("[]", "null", {"metrics": {}}, {"weights": {"step": 1}}, {"weights": [1]}),
    *(IMAGES | {"metrics": metrics} for metrics in ([1], {"fid": "n/a"}, {"fid": True})),
    *(IMAGES | {"metrics": {"fid": value}} for value in (None, [1.0], float("nan"), 10**400)),
    IMAGES | {"metrics": {"fid": 1.0}, "images": [1]},
    IMAGES | {"metrics": {"fid": 1.0}, "weights": {"step": "7", "average": "ema"}},
    *(IMAGES | {"validation_loss": loss} for loss in ([1], {"mse": 1.0}, {"mse": {"mean": "1"}})),
]


@pytest.mark.parametrize("card", ["{", "\xff", *FOREIGN], ids=str)
def test_cards_of_other_programs_are_left_out(tmp_path, card):
    text = card if isinstance(card, str) else json.dumps(card)
    (tmp_path / "way").mkdir()
    for name in ("way/score-mine.json", "validation-step-0000007-ema-abc-t8-9-data.json"):
        (tmp_path / name).write_text(text, encoding="latin-1")

    assert read_scores(tmp_path) == {}


def test_scores_that_are_no_finite_numbers_are_left_out_and_the_others_kept(tmp_path):
    (tmp_path / "way").mkdir()
    metrics = {"fid": float("inf"), "precision": 1, "recall": 0.5}
    (tmp_path / "way/score-mine.json").write_text(json.dumps(IMAGES | {"metrics": metrics}))

    ((values,),) = (by_step.values() for by_step in read_scores(tmp_path).values())

    assert values == {"eval/precision": 1, "eval/recall": 0.5}


def test_several_networks_have_tags_of_their_own_and_one_has_none(tmp_path):
    def add(name, network, sha256):
        card = IMAGES | {"metrics": {"precision": 0.5}}
        card["features"] = {"network": network, "sha256": sha256}
        path = tmp_path / f"evaluation/way/score-{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(card))
        write_score_events(tmp_path)
        time.sleep(1)  # files are ordered by the second in their names
        return sorted(tag for by_tag in ways(tmp_path).values() for tag in by_tag if by_tag[tag])

    assert add("i", "inception-2015-12-05", "0" * 64) == ["eval/precision"]
    assert add("a", "my net.pt", "a" * 64) == ["eval/precision", "eval/precision"]
    # Of one name, in another folder; the first one's points are written anew.
    assert add("b", "my net.pt", "b" * 64) == [
        *("eval/precision", "eval/precision/my_net-aaaaaaaa", "eval/precision/my_net-bbbbbbbb")
    ]
    before = sorted(tmp_path.rglob("events.*"))
    write_score_events(tmp_path)
    assert sorted(tmp_path.rglob("events.*")) == before
