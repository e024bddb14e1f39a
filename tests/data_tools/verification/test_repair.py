"""Repair: only what is broken is made again, and the bytes are the former ones."""

import hashlib
import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from data_tools.errors import ConfigError
from data_tools.shards.manifest import MANIFEST_NAME, DatasetManifest
from data_tools.vae.autoencoder import DEMO_VAE
from data_tools.verify_shards import main
from tests.support.damage import (
    SHARD,
    change_label,
    copy_shard,
    cut,
    edit,
    flip_value,
)

pytestmark = pytest.mark.usefixtures("one_thread")  # bytes are compared


@pytest.fixture
def folder(demo_latents, tmp_path):
    shutil.copytree(demo_latents, tmp_path / "set")
    return tmp_path / "set"


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def repair(folder, *flags):
    main(["--data", str(folder), "--repair", *map(str, flags)])


def test_only_what_is_broken_is_made_again_byte_for_byte(demo_images, folder, capsys):
    known, stamps = content(folder), {}
    (folder / "00000.tar").unlink()
    cut(folder)
    shutil.copy(folder / "00004.tar", folder / "00002.tar")
    (folder / "00003.json").unlink()
    (folder / "00004.json").write_text("{}")
    for name in ("00003.tar", "00004.tar", "encoding.json"):
        stamps[name] = (folder / name).stat().st_mtime_ns
    repair(folder, "--input", demo_images)
    assert content(folder) == known
    assert {name: (folder / name).stat().st_mtime_ns for name in stamps} == stamps
    text = capsys.readouterr().out
    for line in (
        "00000.tar: encoded again, the same bytes as before",
        "00001.tar: encoded again, the same bytes as before",
        "00002.tar: encoded again, the same bytes as before",
        "00003.json: written from 00003.tar",
        "00004.json: written from 00004.tar",
    ):
        assert f"  {line}\n" in text
    assert text.endswith("\nintact\n")
    repair(folder)  # of an intact set: nothing to do, and no images needed


@pytest.mark.parametrize("damage", [flip_value(True), change_label(b"7"), copy_shard("00003.tar")])
def test_damage_that_no_header_shows_is_repaired(demo_images, folder, damage):
    known = content(folder)
    damage(folder)
    repair(folder, "--input", demo_images)
    assert content(folder) == known


def test_small_files_are_repaired_without_images(folder):
    known = content(folder)
    (folder / "00001.json").unlink()
    edit(folder / MANIFEST_NAME, lambda c: c["statistics"]["mean"].__setitem__(1, 9.0))
    edit(folder / MANIFEST_NAME, lambda c: c["classes"][3].update(count=1))
    repair(folder)
    assert content(folder) == known


@pytest.mark.parametrize("text", [None, "{"])
def test_dataset_json_is_written_from_the_sidecars(demo_images, folder, text):
    known = content(folder)
    flip_value(True)(folder)
    (folder / "00003.tar").unlink()
    if text is None:
        (folder / MANIFEST_NAME).unlink()
    else:
        (folder / MANIFEST_NAME).write_text(text)
    with pytest.raises(ConfigError, match="--repair: dataset.json of .* name them with --input"):
        repair(folder)
    repair(folder, "--input", demo_images)
    assert content(folder) == known


def test_without_images_the_sentence_says_what_to_do(folder):
    cut(folder)
    damaged = content(folder)
    with pytest.raises(ConfigError, match="--repair: 1 shard of .* name them with --input"):
        repair(folder)
    assert content(folder) == damaged


def test_other_images_and_another_vae_are_refused_and_nothing_is_touched(
    demo_images, folder, tmp_path
):
    cut(folder)
    damaged = content(folder)
    fewer = shutil.copytree(demo_images, tmp_path / "fewer")
    next(fewer.rglob("*.png")).unlink()
    with pytest.raises(ConfigError, match="--input .*fewer: its 79 images are not the 80"):
        repair(folder, "--input", fewer)
    vae = shutil.copytree(DEMO_VAE, tmp_path / "vae")
    (path,) = vae.glob("*.safetensors")
    weights = load_file(path)
    weights[min(weights)] += 1
    save_file(weights, path)
    with pytest.raises(ConfigError, match="--vae .*: its weights .* are not those that encoded"):
        repair(folder, "--input", demo_images, "--vae", vae)
    (folder / "encoding.json").unlink()
    with pytest.raises(ConfigError, match="no encoding.json"):
        repair(folder, "--input", demo_images)
    assert content(folder) == {n: d for n, d in damaged.items() if n != "encoding.json"}


def test_other_bytes_take_the_place_only_if_the_user_says_so(demo_images, folder, tmp_path, capsys):
    """Pictures whose names are the same and whose pixels changed since."""
    cut(folder)
    damaged, before = content(folder), DatasetManifest.load(folder, check_shards=False)
    changed = shutil.copytree(demo_images, tmp_path / "changed")
    pictures = sorted(changed.rglob("*.png"))
    for picture in pictures[1:]:
        shutil.copy(pictures[0], picture)
    with pytest.raises(ConfigError, match=r"--repair: 00001\.tar encodes to other bytes here"):
        repair(folder, "--input", changed)
    assert content(folder) == damaged
    repair(folder, "--input", changed, "--accept-new-bytes")
    text = capsys.readouterr().out
    assert f"{SHARD}: encoded again, other bytes as before" not in text
    assert f"{SHARD}: encoded again, to other bytes" in text and text.endswith("\nintact\n")
    after = DatasetManifest.load(folder)
    assert after.hash != before.hash
    digest = hashlib.sha256((folder / SHARD).read_bytes()).hexdigest()
    assert after.shards[1].sha256 == digest
    assert json.loads((folder / "00001.json").read_text())["shard"]["sha256"] == digest
    assert after.statistics != before.statistics
