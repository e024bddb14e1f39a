"""What the page of training/demo.py does; tests/cluster/test_cluster_browser.py has the browser."""

import dataclasses
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.errors import ConfigError
from tests.support.evaluated_run import IMAGE_SIZE, STEP, make_run
from training import demo, sample
from training.checkpoints.manifest import (
    CHECKPOINT_DIR,
    EMA_FILE,
    MANIFEST_FILE,
    RAW_FILE,
    tag_of,
)
from training.checkpoints.weight_files import load_model
from training.monitoring.expert_pictures import active_experts
from training.playground.playground import (
    LATEST,
    MAX_IMAGES,
    RAW,
    DrawingRequest,
    DrawingStoppedError,
    Playground,
)

CPU = torch.device("cpu")
REQUEST = DrawingRequest(
    class_index=1, num_images=3, cfg_scale=1.5, steps=3, seed=5, sampler="ddpm", weights=RAW
)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("playground")
    make_run(folder / "run", folder / "data")
    return folder / "run"


@pytest.fixture(scope="module")
def playground(run_dir):
    return Playground(run_dir, CPU)


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({}, ["--raw", "--cfg-scale", 1.5, "--sampler", "ddpm"]),
        ({"weights": "", "cfg_scale": 1.0, "sampler": "dpmpp-2m", "checkpoint": tag_of(STEP)},
         ["--cfg-scale", 1, "--sampler", "dpmpp-2m"]),
        ({"num_images": MAX_IMAGES, "cfg_scale": 4, "sampler": "ddim", "weights": "0.999"},
         ["--cfg-scale", 4]),
    ],
)  # fmt: skip
def test_images_are_those_of_the_sample_command(changes, flags, run_dir, playground, tmp_path):
    request = dataclasses.replace(REQUEST, **changes)

    drawn = playground.draw(request)

    settings = ["--classes", 1, "--per-class", request.num_images, "--steps", 3, "--seed", 5]
    sample.main([str(word) for word in (run_dir, "--output", tmp_path, *settings, *flags)])
    expected = [np.asarray(Image.open(path)) for path in sorted(tmp_path.glob("0*.png"))]
    assert np.array_equal(drawn, np.stack(expected))
    assert drawn.shape == (request.num_images, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert drawn.std() > 1.0


def test_a_run_without_classes_and_experts_has_neither(tmp_path):
    make_run(tmp_path / "run", tmp_path / "data", num_classes=0, routing="dense")
    found = Playground(tmp_path / "run", CPU)

    drawn = found.draw(dataclasses.replace(REQUEST, class_index=0, cfg_scale=1.0))

    assert found.classes() == [] and not found.has_experts
    assert found.description == "DiT-demo/2"
    sample.main(
        [str(tmp_path / "run"), "--raw", "--per-class", "3", "--steps", "3", "--seed", "5"]
        + ["--sampler", "ddpm", "--output", str(tmp_path)]
    )
    assert np.array_equal(drawn[0], np.asarray(Image.open(tmp_path / "00000-unconditional.png")))


def test_the_choices_are_those_of_the_run(playground):
    assert playground.classes() == [("class 0", 0), ("class 1", 1), ("class 2", 2)]
    assert playground.averages() == ["0.999"]
    assert playground.checkpoints() == [tag_of(STEP)]


@pytest.mark.parametrize("timestep", [0, 400, 999])
def test_the_experts_shown_are_those_that_the_network_uses(timestep, run_dir, playground):
    path = run_dir / CHECKPOINT_DIR / tag_of(STEP) / EMA_FILE
    model = load_model(playground.config, path, CPU)
    x_t, y = torch.zeros(1, 4, 8, 8), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        plan = model(x_t, torch.tensor([timestep]), y).plan

    table, whole = playground.experts_at(timestep)

    assert np.array_equal(table, active_experts(plan.expert_weight[:, 0]))
    assert not np.array_equal(whole, playground.experts_at(timestep - 1 if timestep else 1)[1])
    assert not np.array_equal(table, playground.experts_at(timestep, LATEST, RAW)[0])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_images": 0}, "num_images must be between 1 and 16, not 0."),
        ({"num_images": 17}, "num_images must be between 1 and 16, not 17."),
        ({"num_images": True}, "num_images must be a whole number, not True."),
        ({"cfg_scale": float("nan")}, "cfg_scale must be between 0 and 10, not nan."),
        ({"cfg_scale": 1e30}, "cfg_scale must be between 0 and 10, not 1e+30."),
        ({"cfg_scale": None}, "cfg_scale must be a number, not None."),
        ({"class_index": 3}, "class_index must be between 0 and 2, not 3."),
        ({"class_index": -1}, "class_index must be between 0 and 2, not -1."),
        ({"steps": 0}, "--steps must be at least 1, not 0."),
        ({"steps": 1001}, "--steps 1001 exceeds the 1000 timesteps of the model; use fewer."),
        ({"steps": 2.5}, "steps must be a whole number, not 2.5."),
        ({"seed": -1}, "--seed must be >=0"),
        ({"seed": 2**63}, "--seed must be >=0"),
        ({"sampler": "euler"}, "--sampler euler does not fit objective epsilon"),
        ({"sampler": ["ddim"]}, "sampler must be a text, not ['ddim']."),
        ({"checkpoint": "../../other"}, "--checkpoint: no '../../other'"),
        ({"weights": "../x"}, "--ema: the run has no average '../x'"),
    ],
)
def test_a_request_that_the_page_would_not_send_is_refused(changes, sentence, playground):
    with pytest.raises(ConfigError, match="^" + re.escape(sentence)):
        playground.draw(dataclasses.replace(REQUEST, **changes))


@pytest.mark.parametrize("timestep", [-1, 1000])
def test_a_timestep_that_does_not_exist_is_refused(timestep, playground):
    with pytest.raises(ConfigError, match=f"timestep must be between 0 and 999, not {timestep}"):
        playground.experts_at(timestep)


def test_a_drawing_can_be_stopped_and_the_next_one_is_whole(playground):
    steps = []

    with pytest.raises(DrawingStoppedError):
        playground.draw(REQUEST, lambda step: (steps.append(step), playground.stop()))

    assert steps == [0]
    assert len(playground.draw(REQUEST, steps.append)) == REQUEST.num_images
    assert steps == [0, 0, 1, 2]


def test_after_closing_nothing_is_drawn(run_dir):
    closed = Playground(run_dir, CPU)
    closed.close()

    with pytest.raises(DrawingStoppedError):
        closed.draw(REQUEST)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("no run", "is no run directory"),
        ("no checkpoint", "has no checkpoint yet; train first."),
        ("manifest", "is not a checkpoint manifest"),
        ("weights", "does not match the checksum in its manifest.json"),
    ],
)
def test_a_run_that_cannot_be_drawn_from_is_refused_before_anybody_visits(
    fault, sentence, run_dir, tmp_path
):
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    checkpoint = folder / CHECKPOINT_DIR / tag_of(STEP)
    if fault == "no run":
        folder = tmp_path / "other"
    elif fault == "no checkpoint":
        shutil.rmtree(checkpoint.parent)
    elif fault == "manifest":
        (checkpoint / MANIFEST_FILE).write_text("{")
    else:
        shutil.copy(checkpoint / RAW_FILE, checkpoint / EMA_FILE)

    with pytest.raises(ConfigError, match=sentence):
        Playground(folder, CPU)


def test_a_missing_gradio_is_one_sentence(run_dir, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)

    with pytest.raises(SystemExit) as left:
        demo.main([str(run_dir)])

    assert left.value.code == 2
    assert capsys.readouterr().err == (
        "error: gradio, which the page is made with, is not installed; run 'pip install -r "
        "requirements-demo.txt'.\n"
    )


def test_a_port_that_cannot_be_listened_at_is_one_sentence():
    with demo.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]

        with pytest.raises(ConfigError, match=rf"^--port {port}: .*\(Address already in use\)"):
            demo.listen("127.0.0.1", port)

    with pytest.raises(ConfigError, match="^--port 65536: is no port; choose one from 0 to 65535"):
        demo.listen("127.0.0.1", 65536)
    with pytest.raises(ConfigError, match="^--host 192.0.2.1: .*; choose another.$"):
        demo.listen("192.0.2.1", 0)  # of a network for documents (RFC 5737)
    with pytest.raises(ConfigError, match=r"^--host x+: is no address \(.*\); use 127.0.0.1.$"):
        demo.listen("x" * 70, 0)
