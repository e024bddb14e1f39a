"""Where training/sample.py puts its images, and how a run is named on the command line."""

import json
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.errors import ConfigError
from tests.support.evaluated_run import STEP, make_run
from training import sample
from training.checkpoints.manifest import CHECKPOINT_DIR, tag_of
from training.ranks.process_group import Ranks

FLAGS = ("--per-class", "1", "--steps", "2")


@pytest.fixture
def run_dir(tmp_path):
    make_run(tmp_path / "run", tmp_path / "data")
    return tmp_path / "run"


@pytest.fixture
def draw(capsys):
    """Run the command; return the grid that it names."""

    def call(*argv):
        sample.main([*map(str, argv), *FLAGS])
        said = capsys.readouterr()
        call.warned = "warning:" in said.err
        return said.out.strip().removeprefix("grid of samples: ")

    return call


def test_other_flags_on_one_step_leave_the_images_of_the_first(run_dir, draw):
    samples = run_dir / "samples"
    first = draw(run_dir)
    pixels = np.asarray(Image.open(first))

    others = [draw(run_dir, "--seed", 1), draw(run_dir, "--raw"), draw(run_dir, "--classes", "1")]

    names = [tag_of(STEP), *(f"{tag_of(STEP)}-{number}" for number in (2, 3, 4))]
    assert [first, *others] == [str(samples / name / "grid.png") for name in names]
    assert np.array_equal(np.asarray(Image.open(first)), pixels)
    assert [draw(run_dir), draw(run_dir, "--raw")] == [first, others[1]], "the same command"
    assert not draw.warned


def test_images_in_bf16_are_others_and_look_the_same(draw, tmp_path):
    # Of flow: from noise, the first step of the others multiplies errors of random weights by 1e4.
    run_dir = tmp_path / "flow"
    make_run(run_dir, tmp_path / "flow-data", objective="flow")
    exact, fast = draw(run_dir), draw(run_dir, "--precision", "bf16")

    other = run_dir / "samples" / f"{tag_of(STEP)}-2"
    assert fast == str(other / "grid.png")
    assert json.loads((other / "settings.json").read_text())["precision"] == "bf16"
    exact, fast = (np.asarray(Image.open(path)).astype(float) for path in (exact, fast))
    assert 0 < np.abs(fast - exact).mean() < 0.05 * np.abs(exact - exact.mean()).mean()


def test_a_cpu_has_no_tf32(run_dir, capsys):
    with pytest.raises(SystemExit) as stopped:
        sample.main([str(run_dir), "--precision", "tf32"])
    assert stopped.value.code == 2
    assert "--precision tf32: is of GPUs" in capsys.readouterr().err


def test_a_folder_of_unknown_images_is_left_alone(run_dir, draw):
    old = run_dir / "samples" / tag_of(STEP) / "grid.png"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"of an earlier version")

    assert draw(run_dir) == str(run_dir / "samples" / f"{tag_of(STEP)}-2" / "grid.png")
    assert old.read_bytes() == b"of an earlier version"


def test_an_output_that_is_named_is_replaced_and_the_user_told(run_dir, draw, tmp_path):
    output = ("--output", tmp_path / "out")
    draw(run_dir, *output)
    assert not draw.warned
    draw(run_dir, *output)
    assert not draw.warned, "the same images"

    draw(run_dir, *output, "--seed", 1)

    assert draw.warned


def test_a_run_is_named_bare_by_its_flag_or_by_a_checkpoint(run_dir, draw):
    checkpoint = run_dir / CHECKPOINT_DIR / tag_of(STEP)

    grids = {draw(run_dir), draw("--run-dir", run_dir), draw(checkpoint)}

    assert grids == {str(run_dir / "samples" / tag_of(STEP) / "grid.png")}
    for wrong, sentence in (
        ([], "one of the arguments RUN --run-dir is required; see --help."),
        (["a", "--run-dir", "b"], "--run-dir: not allowed with argument RUN; see --help."),
    ):
        with pytest.raises(ConfigError) as error:
            sample.build_parser().parse_args(wrong)
        assert str(error.value) == sentence


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_image_is_drawn_by_one_rank_also_where_ranks_outnumber_images(
    world_size, monkeypatch
):
    monkeypatch.setattr(sample, "load_pipeline", lambda *_: None)
    monkeypatch.setattr(
        sample, "draw_batch", lambda _p, _s, batch, labels, _on_step: np.stack([batch, labels], 1)
    )
    args = SimpleNamespace(batch_size=1, steps=1)
    job = MagicMock(plan=SimpleNamespace(labels=[4, 7]))

    drawn = [
        list(sample._pictures(args, job, Ranks(rank, world_size, rank), torch.device("cpu")))
        for rank in range(world_size)
    ]

    assert sorted(number for of_rank in drawn for number, _ in of_rank) == [0, 1]
    assert [of_rank[0][1].tolist() for of_rank in drawn if of_rank][:1] == [[0, 4]]
