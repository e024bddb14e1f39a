"""What inspect_dataset says, for people and for programs."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from data_tools.errors import ConfigError
from data_tools.inspect_dataset import gini, main
from data_tools.shards.manifest import DatasetManifest
from data_tools.verification.preview import choose_samples, draw_grid
from tests.support.synthetic import make_dataset


def test_the_page_of_a_small_set(demo_latents, capsys):
    main([str(demo_latents)])
    text = capsys.readouterr().out
    for line in (
        "  samples     80 in 5 shards of 16\n",
        "  epoch       0.3 steps at batch 256\n",
        "  latents     moments 8x16x16 float16, with those of mirrored images\n",
        "  images      64x64 pixels, crop adm-center\n",
        "  skipped     none of 80 files\n",
        "10 classes of 8 to 8 samples, mean 8.0, Gini 0.000\n",
    ):
        assert line in text
    assert sum("10.00%" in line for line in text.splitlines()) == 10


def test_json_holds_everything(demo_latents, capsys):
    main([str(demo_latents), "--json"])
    found = json.loads(capsys.readouterr().out)
    manifest = DatasetManifest.load(demo_latents)
    assert found["num_samples"] == 80 and found["hash"] == manifest.hash
    assert found["bytes"] == sum(path.stat().st_size for path in demo_latents.glob("*.tar"))
    assert [entry["count"] for entry in found["classes"]] == [8] * 10
    assert found["statistics"]["std"] == manifest.statistics.std


def test_many_classes_are_summed_up(tmp_path, capsys):
    make_dataset(tmp_path, [50], num_classes=30)
    main([str(tmp_path)])
    text = capsys.readouterr().out
    assert "30 classes of 1 to 2 samples, mean 1.7" in text
    assert "... 20 classes in between" in text
    assert text.count("class ") == 10


def test_an_unconditional_set_and_a_missing_one(tmp_path, capsys):
    make_dataset(tmp_path / "flat", [5], num_classes=0)
    main([str(tmp_path / "flat")])
    assert "no classes: the data set is unconditional" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="nowhere: does not exist"):
        main([str(tmp_path / "nowhere")])


def test_gini_knows_the_two_ends():
    assert gini([5, 5, 5, 5]) == 0
    assert gini([0, 0, 0, 8]) == 0.75
    assert gini([1, 3]) == pytest.approx(0.25)
    assert gini([0, 0]) == 0


def test_a_preview_has_as_many_of_each_class(demo_latents, tmp_path):
    samples = choose_samples(DatasetManifest.load(demo_latents))
    captions = [sample.caption for sample in samples]
    assert {caption: captions.count(caption) for caption in captions} == dict.fromkeys(captions, 6)
    assert len(samples) == 60 and captions == sorted(captions)
    main([str(demo_latents), "--preview", str(tmp_path / "p.png")])
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.width > picture.height > 300


@pytest.mark.parametrize(("number", "side"), [(1, 8), (7, 300), (60, 32)])
def test_a_grid_is_drawn_for_any_number_of_pictures(number, side):
    pixels = np.zeros((number, side, side, 3), np.uint8)
    names = [f"a class with a long name of ${i}_$" for i in range(number)]
    file = io.BytesIO()
    draw_grid(pixels, names, "a title that is longer than a single picture is wide").savefig(file)
    assert Image.open(file).convert("L").getextrema() == (0, 255)
