"""Files that Git LFS did not fetch are called that, whatever they should be."""

import json

import pytest

from data_tools.encode_latents import main
from data_tools.errors import ConfigError
from data_tools.index_shards import main as index_shards
from data_tools.shards.manifest import DatasetManifest
from data_tools.sources.inputs import open_source
from data_tools.vae.autoencoder import DEMO_VAE, load_vae
from data_tools.verification.verify import verify
from tests.support.encode_jobs import flags, make_pictures
from training.checkpoints.foreign_weights import read_state_dict

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a1" * 32 + "\nsize 9\n"
REASON = "is a git-lfs pointer and not the file itself; run git lfs pull in its folder"


def pointer(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(POINTER)
    return path


def refusal(action, *arguments):
    with pytest.raises(ConfigError) as error:
        action(*arguments)
    return str(error.value)


def test_pictures_that_are_pointers_are_left_out_with_that_reason(tmp_path, capsys):
    images = make_pictures(tmp_path / "photos", 6)
    pointer(images / "red_cars" / "01.png")
    main(flags(images, tmp_path / "set"))
    assert f"skipped red_cars/01.png: {REASON}\n" in capsys.readouterr().out


def test_tars_tables_and_arrow_files_that_are_pointers_are_refused(tmp_path):
    tar = pointer(tmp_path / "tars" / "000.tar")
    assert refusal(open_source, str(tar.parent)) == f"--input {tar}: {REASON}."
    assert refusal(open_source, str(tar)) == f"--input {tar}: {REASON}."
    argv = ["--input", str(tar), "--array", "x.npy", "--vae", str(DEMO_VAE)]
    assert refusal(index_shards, argv) == f"--input {tar}: {REASON}."
    table = pointer(tmp_path / "hub" / "data" / "train.parquet")
    assert refusal(open_source, str(tmp_path / "hub")) == f"--input {table}: {REASON}."
    arrow = pointer(tmp_path / "saved" / "data.arrow")
    (arrow.parent / "dataset_info.json").write_text("{}")
    state = {"_data_files": [{"filename": arrow.name}]}
    (arrow.parent / "state.json").write_text(json.dumps(state))
    pytest.importorskip("datasets")
    assert refusal(open_source, str(arrow.parent)) == f"--input {arrow}: {REASON}."


def test_a_vae_that_is_a_pointer_is_refused(tmp_path):
    weights = pointer(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    config = tmp_path / "vae" / "config.json"
    config.write_text((DEMO_VAE / "config.json").read_text())
    for source in (weights.parent, weights):
        assert refusal(load_vae, source) == f"--vae {weights}: {REASON}."
    pointer(config)
    assert refusal(load_vae, weights.parent) == f"--vae {config}: {REASON}."


def test_shards_and_weights_that_are_pointers_are_refused(tmp_path):
    output = tmp_path / "set"
    main(flags(make_pictures(tmp_path / "photos", 9), output))
    shard = pointer(output / "00001.tar")
    assert refusal(DatasetManifest.load, output) == f"--data {shard}: {REASON}."
    for is_quick in (True, False):
        found = verify(output, is_quick=is_quick, num_workers=1).findings
        assert REASON in {finding.what for finding in found if finding.name == "00001.tar"}
    pointer(output / "dataset.json")
    assert refusal(DatasetManifest.load, output) == f"{output}/dataset.json: {REASON}."
    for name in ("weights.safetensors", "weights.pt"):
        weights = pointer(tmp_path / name)
        flag = f"--init-from {weights}"
        assert refusal(read_state_dict, weights, flag) == f"{flag} {REASON}."
