"""Folders and files given as a data set that are something else."""

import gzip
import io
import shlex
import tarfile

import numpy as np
import pytest

from data_tools import inspect_dataset, verify_shards
from data_tools.encode_latents import main as encode_main
from data_tools.errors import ConfigError
from data_tools.shards.manifest import DatasetManifest
from data_tools.stream.training_data import open_data
from tests.support.encode_jobs import flags, make_pictures
from tests.support.synthetic import make_dataset


def make_tar(path, *names):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    return path


def refusal(place):
    """What is said of a place that is given to training."""
    with pytest.raises(ConfigError) as caught:
        open_data(str(place))
    sentence = str(caught.value)
    assert sentence.startswith(f"--data {place}: ") and "\n" not in sentence
    assert sentence.endswith(".") and "delete" not in sentence
    return sentence.removeprefix(f"--data {place}: ")


def test_images_given_to_training_are_told_how_to_be_encoded_and_not_into_themselves(tmp_path):
    photos = make_pictures(tmp_path / "my photos", 3)

    said = refusal(photos)

    command = f"--input '{photos}' --output '{photos}-latents'"
    assert said.startswith("holds images (blue_cars/00.png, ...), not latents; encode first: ")
    assert command in said
    argv = shlex.split(command)
    encode_main([str(part) for part in flags(*argv[1::2])])
    assert open_data(argv[3]).manifest.num_samples == 3
    assert sorted(path.name for path in photos.iterdir()) == ["blue_cars", "red_cars"]


def test_images_are_never_encoded_into_their_own_folder(tmp_path):
    photos = make_pictures(tmp_path / "photos", 3)
    (tmp_path / "link").symlink_to(photos)

    for output in (photos, tmp_path / "link"):
        with pytest.raises(ConfigError, match=f"^--output {output}: is where the images lie; ch"):
            encode_main(flags(photos, output))
    assert sorted(path.name for path in photos.iterdir()) == ["blue_cars", "red_cars"]


def test_what_else_is_given_to_training_is_called_what_it_is(tmp_path):
    tars = make_tar(tmp_path / "tars/0.tar", "000.cls", "000.jpg").parent
    assert refusal(tars).startswith("holds tars of images (000.jpg, ...), not latents; encode fi")
    assert f"--input {tars}/0.tar --output {tars}/0-latents" in refusal(tars / "0.tar")

    foreign = make_tar(tmp_path / "foreign/0.tar", "000.cls", "000.latent.npy").parent
    said = refusal(foreign)
    assert said.startswith("holds tars of latents that are not indexed (000.cls, 000.latent.npy); ")
    assert f"python data_tools/index_shards.py --input {foreign} --array" in said
    assert refusal(make_tar(tmp_path / "t/0.tar", "a.mp4").parent).startswith("holds tars of .mp4,")
    (tmp_path / "t/0.tar").write_bytes(b"<html>")
    assert refusal(tmp_path / "t").startswith("no dataset.json, and 0.tar is no tar but HTML; n")

    whole = make_tar(tmp_path / "t/0.tar", "a.npy").read_bytes()
    (tmp_path / "t/0.tar").write_bytes(gzip.compress(whole))
    assert refusal(tmp_path / "t").startswith("no dataset.json, and 0.tar is no tar but gzip; na")
    (tmp_path / "t/0.tar").write_bytes(whole[:512])
    assert refusal(tmp_path / "t").startswith("no dataset.json, and 0.tar is cut off or damaged a")

    make_dataset(tmp_path / "sets/a", [2])
    make_dataset(tmp_path / "sets/b", [2])
    said = refusal(tmp_path / "sets")
    assert said == (
        f"no dataset.json in it but in a, b; name {tmp_path}/sets/a, all of them as "
        f"{tmp_path}/sets/*."
    )
    assert open_data(f"{tmp_path}/sets/*").manifest.num_samples == 4
    said = refusal(tmp_path / "sets/a/dataset.json")
    assert said == f"is the description itself; name its folder, {tmp_path}/sets/a."

    (tmp_path / "list.tsv").write_text("a.png\t1\n")
    assert refusal(tmp_path / "list.tsv").startswith("is a file and no data set; if it lists imag")
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays/0.npy", np.zeros(1))
    assert refusal(tmp_path / "arrays").startswith("holds 0.npy and no dataset.json; put latents")
    (tmp_path / "hub/data").mkdir(parents=True)
    (tmp_path / "hub/data/0.parquet").touch()
    assert refusal(tmp_path / "hub").startswith("holds a table of images, not latents; encode fir")
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty").startswith("is empty; encode first: python data_tools/enc")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.doc").touch()
    assert refusal(tmp_path / "notes") == (
        "holds no dataset.json, only a.doc; name a folder that was encoded."
    )


def test_a_tree_that_leads_back_into_itself_is_looked_at_once(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/up").symlink_to(tmp_path)

    assert refusal(tmp_path) == "holds no dataset.json, only a; name a folder that was encoded."


def test_the_other_tools_say_the_same(tmp_path):
    photos = make_pictures(tmp_path / "photos", 1)
    with pytest.raises(ConfigError, match="holds images .*, not latents; encode first"):
        DatasetManifest.load(photos, check_shards=False)
    for command in (verify_shards, inspect_dataset):
        flag = ["--data"] if command is verify_shards else []
        with pytest.raises(ConfigError, match="holds images .*, not latents; encode first"):
            command.main([*flag, str(photos)])
        with pytest.raises(ConfigError, match="is an address; this reads folders of this machine"):
            command.main([*flag, "https://host/set"])


def test_a_run_given_as_a_data_set_is_called_a_run(tmp_path):
    """It holds a copy of dataset.json, so its shards would seem to be lost."""
    run = make_dataset(tmp_path / "run", [2]).folder
    for path in run.glob("0*"):
        path.unlink()
    (run / "config.yaml").write_text("data: {}\n")
    (run / "checkpoints").mkdir()

    said = refusal(run)

    assert said.startswith("is the folder of a run, no data set; name the data that the run reads")
    assert said.endswith(f"see {run}/config.yaml.")
    with pytest.raises(ConfigError, match="is the folder of a run, no data set"):
        verify_shards.main(["--data", str(run)])
