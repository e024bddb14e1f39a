"""Encoding: what is stored, what is skipped, interruptions, refusals, disks that fail."""

import errno
import hashlib
import json
import os
import re
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import webdataset as wds

import data_tools.encode_latents
from data_tools.encode_latents import main, prepare_demo
from data_tools.encoding.encoder import ShardEncoder
from data_tools.encoding.settings import SETTINGS_NAME
from data_tools.errors import ConfigError
from data_tools.shards.manifest import MANIFEST_NAME, DatasetManifest
from data_tools.sources.image_folders import scan_folder
from data_tools.sources.images import decode_image
from data_tools.stream.loader import LatentStream
from data_tools.stream.training_data import open_data
from data_tools.vae.autoencoder import DEMO_VAE, encode_moments, load_vae
from tests.support.encode_jobs import VAE_FLAGS, content, flags, make_pictures
from tests.support.launch import REPOSITORY, environment, run

pytestmark = pytest.mark.usefixtures("one_thread")  # bytes are compared


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def encoded(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents") / "set"
    main(flags(images, folder))
    return folder


def samples(folder):
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    return list(wds.WebDataset(urls, shardshuffle=False).decode())


def test_the_stored_moments_are_those_of_the_image_and_of_its_mirror_image(images, encoded):
    listed = scan_folder(images, "--input")
    vae = load_vae(DEMO_VAE)
    found = samples(encoded)
    assert sorted(int(sample["__key__"]) for sample in found) == list(range(23))
    for sample in found:
        index = int(sample["__key__"])
        assert sample["cls"] == listed.labels[index]
        pixels = decode_image(listed.read(index), 32)[None]
        for name, view in (("moments.npy", pixels), ("flip.npy", pixels[:, :, ::-1])):
            expected = encode_moments(vae, torch.from_numpy(view.copy()))[0].numpy()
            # Other images of a batch change the order of additions, not more.
            np.testing.assert_allclose(sample[name], expected, atol=0.02, rtol=0.01)
    assert not np.allclose(found[0]["flip.npy"], found[0]["moments.npy"][..., ::-1], atol=0.05)


def test_the_manifest_describes_the_data_set(images, encoded):
    manifest = DatasetManifest.load(encoded)
    vae = load_vae(DEMO_VAE)
    assert manifest.num_samples == 23
    assert [shard.num_samples for shard in manifest.shards] == [8, 8, 7]
    assert manifest.latent.shape == [8, 8, 8]
    assert manifest.has_flip
    assert [(c.id, c.name, c.count) for c in manifest.classes] == [
        ("blue_cars", "blue cars", 8),
        ("red_cars", "red cars", 15),
    ]
    # The id finds the VAE from any checkout, so it does not name this one.
    assert manifest.vae.id == "data_tools/demo_vae"
    assert manifest.vae.sha256 == vae.sha256
    assert manifest.vae.scaling_factor == vae.scaling_factor
    assert (manifest.image.size, manifest.source.num_skipped) == (32, 0)
    moments = torch.tensor(np.stack([s["moments.npy"] for s in samples(encoded)])).double()
    mean, log_variance = moments.chunk(2, dim=1)
    expected = mean.mean((0, 2, 3))
    variance = mean.var((0, 2, 3), correction=0) + log_variance.exp().mean((0, 2, 3))
    assert torch.allclose(torch.tensor(manifest.statistics.mean).double(), expected, atol=1e-5)
    assert torch.allclose(
        torch.tensor(manifest.statistics.std).double(), variance.sqrt(), atol=1e-5
    )


def test_sidecars_and_checksums_agree_with_the_shards(encoded):
    for shard in DatasetManifest.load(encoded).shards:
        data = (encoded / shard.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
        sidecar = json.loads((encoded / shard.name).with_suffix(".json").read_text())
        assert sidecar["shard"]["sha256"] == shard.sha256
    assert not list(encoded.glob("*.tmp"))


def test_training_reads_what_was_encoded(encoded):
    with LatentStream(
        open_data(str(encoded)),
        seed=0,
        window=2,
        global_batch_size=23,
        micro_batch_size=23,
        rank=0,
        world_size=1,
    ) as stream:
        batch = next(stream)
    assert torch.bincount(batch.labels).tolist() == [8, 15]
    stored = {s[name].tobytes() for s in samples(encoded) for name in ("moments.npy", "flip.npy")}
    assert all(latents.numpy().tobytes() in stored for latents in batch.raw_latents)


def test_repeating_a_finished_run_changes_nothing(images, encoded, capsys):
    before = content(encoded), [path.stat().st_mtime_ns for path in sorted(encoded.glob("*.tar"))]
    main(flags(images, encoded))
    after = content(encoded), [path.stat().st_mtime_ns for path in sorted(encoded.glob("*.tar"))]
    assert before == after
    assert "23 samples in 3 shards" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["cut", "deleted", "sidecar deleted"])
def test_a_damaged_shard_is_encoded_again(images, encoded, tmp_path, damage):
    for name, data in content(encoded).items():
        (tmp_path / name).write_bytes(data)
    if damage == "cut":
        (tmp_path / "00001.tar").write_bytes(b"short")
    elif damage == "deleted":
        (tmp_path / "00001.tar").unlink()
    else:
        (tmp_path / "00001.json").unlink()
    main(flags(images, tmp_path))
    assert content(tmp_path) == content(encoded)


def test_a_lost_sidecar_is_written_from_its_shard_which_stays(images, encoded, tmp_path):
    for name, data in content(encoded).items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "00001.json").unlink()
    before = (tmp_path / "00001.tar").stat().st_ino

    main(flags(images, tmp_path))

    assert content(tmp_path) == content(encoded)
    assert (tmp_path / "00001.tar").stat().st_ino == before


def test_bad_images_are_skipped_counted_and_listed(images, tmp_path, capsys):
    source = tmp_path / "images"
    for path in images.rglob("*.png"):
        target = source / path.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (source / "red_cars" / "empty.png").touch()
    (source / "red_cars" / "text.jpg").write_text("no image")
    cut = source / "blue_cars" / "cut.png"
    cut.write_bytes((source / "blue_cars" / "00.png").read_bytes()[:500])
    main(flags(source, tmp_path / "set"))
    output = capsys.readouterr().out
    assert "skipped 3 files that are no readable images: " in output
    manifest = DatasetManifest.load(tmp_path / "set")
    assert manifest.num_samples == 23
    assert manifest.source.num_files == 26 and manifest.source.num_skipped == 3
    skipped = [path for shard in manifest.shards for path in shard.skipped]
    assert sorted(skipped) == ["blue_cars/cut.png", "red_cars/empty.png", "red_cars/text.jpg"]
    assert all(path in output for path in skipped)
    assert [entry.count for entry in manifest.classes] == [8, 15]
    # The stride is constant whatever a shard holds, so training still reads by arithmetic.
    assert len({shard.stride for shard in manifest.shards}) == 1
    settings = {"seed": 0, "window": 2, "global_batch_size": 23, "micro_batch_size": 23}
    data = open_data(str(tmp_path / "set"))
    with LatentStream(data, rank=0, world_size=1, **settings) as stream:
        assert torch.bincount(next(stream).labels).tolist() == [8, 15]
    with pytest.raises(
        ConfigError, match=r"^--strict: .*(empty|text|cut)\..*; repair the file or move it away"
    ):
        main(flags(source, tmp_path / "strict", **{"--strict": True}))


def test_a_folder_with_only_bad_images_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").touch()
    with pytest.raises(ConfigError, match="none of its 1 files could be decoded; give images"):
        main(flags(tmp_path / "images", tmp_path / "set"))
    assert not (tmp_path / "set" / MANIFEST_NAME).exists()


def test_a_flat_folder_is_unconditional_and_flips_may_be_left_out(images, tmp_path):
    main(flags(images / "blue_cars", tmp_path, **{"--no-flip": True}))
    manifest = DatasetManifest.load(tmp_path)
    assert (manifest.num_classes, manifest.num_samples, manifest.has_flip) == (0, 8, False)
    assert {sample["cls"] for sample in samples(tmp_path)} == {0}
    assert "flip.npy" not in samples(tmp_path)[0]


def test_another_seed_deals_the_images_to_other_shards(images, encoded, tmp_path):
    main(flags(images, tmp_path, **{"--seed": 1}))
    keys = [[s["__key__"] for s in samples(folder)] for folder in (encoded, tmp_path)]
    assert keys[0] != keys[1] and sorted(keys[0]) == sorted(keys[1])
    assert DatasetManifest.load(tmp_path).order_seed == 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"--size": 64}, "image.size (32 -> 64)"),
        ({"--seed": 1}, "seed (0 -> 1)"),
        ({"--no-flip": True}, "latent.flip (True -> False)"),
        ({"--shard-size": 9}, "shard_size (8 -> 9)"),
        ({"--batch-size": 5}, "batch_size (4 -> 5)"),
        ({"--input": "other"}, "other names or classes of images, num_files (23 -> "),
        ({"--vae": "other"}, "vae.sha256 ("),
    ],
)
def test_an_output_of_other_settings_is_refused(images, encoded, tmp_path, changes, named):
    before = content(encoded)
    if "--input" in changes:
        changes = {"--input": images / "blue_cars"}
    if "--vae" in changes:
        vae = load_vae(DEMO_VAE).model
        with torch.no_grad():
            next(vae.parameters()).mul_(2)
        vae.save_pretrained(tmp_path / "vae")
        changes = {"--vae": tmp_path / "vae"}
    with pytest.raises(ConfigError) as error:
        main(flags(images, encoded, **changes))
    message = str(error.value)
    assert message.startswith(f"--output {encoded}: was begun with other settings: ")
    assert named in message and message.endswith("or give a new folder.")
    assert content(encoded) == before


def test_mended_images_are_a_continuation_and_others_of_the_same_names_are_not(tmp_path):
    images, output = make_pictures(tmp_path / "a", 9), tmp_path / "set"
    main(flags(images, output))
    before = content(output)
    pictures = sorted(images.rglob("*.png"))
    for count in (4, 5):
        for name in ("00000.tar", "dataset.json"):
            (output / name).unlink()
        for path in pictures[:count]:  # what follows a PNG's end is not read
            path.write_bytes(path.read_bytes() + b"0")
        if count == 4:
            main(flags(images, output))
            assert content(output) == before
    sentence = "was begun with other images of the same names (5 of 9 have other sizes); repeat"
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        main(flags(images, output))
    settings = json.loads((output / SETTINGS_NAME).read_text())
    del settings["sizes"]  # as earlier versions wrote it
    (output / SETTINGS_NAME).write_text(json.dumps(settings))
    main(flags(images, output))
    assert content(output)["00000.tar"] == before["00000.tar"]


def test_shards_of_unknown_origin_are_refused(images, encoded, tmp_path):
    (tmp_path / "00000.tar").write_bytes((encoded / "00000.tar").read_bytes())
    with pytest.raises(ConfigError, match=f"holds shards but no {SETTINGS_NAME}"):
        main(flags(images, tmp_path))


def test_a_dry_run_describes_and_writes_nothing(images, tmp_path, capsys):
    main(flags(images, tmp_path / "set", **{"--dry-run": True}))
    output = capsys.readouterr().out
    assert "23 images in 2 classes" in output and "3 shards, 0 MiB, latents [8, 8, 8]" in output
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--input", "gone"], "--output is missing: say where the shards of --input shall go."),
        (["--input", "gone", "--output", "o"], "--input gone: does not exist; give a folder"),
        (["--input", "EMPTY", "--output", "o"], "no image files (.avif, "),
        (["--input", "IMAGES", "--output", __file__], "is a file; give a folder."),
        (["--batch-size", "0"], "--batch-size must be at least 1, not 0."),
        (["--shard-size", "-1"], "--shard-size must be at least 1, not -1."),
        (["--size", "0"], "--size must be at least 1, not 0."),
        (["--workers", "0"], "--workers must be at least 1, not 0."),
        (["--batch-size", "some"], "--batch-size some: write a number of images, or auto."),
        (["--precision", "fp8"], "--precision: invalid choice: 'fp8' (choose from "),
        (["--input", "IMAGES", "--output", "o", "--size", "64"], "--vae is missing: "),
        (
            ["--input", "IMAGES", "--output", "o", "--size", "30", *VAE_FLAGS],
            "--size 30: is not divisible by 4, the factor by which --vae data_tools/demo_vae ",
        ),
        (
            ["--input", "IMAGES", "--output", "o", "--device", "abacus"],
            "--device abacus: no such device; use cpu, cuda or cuda:N.",
        ),
        (
            ["--input", "IMAGES", "--output", "o", "--vae", "./gone"],
            "--vae ./gone: does not exist; give a diffusers folder, a .safetensors file, or a hub",
        ),
    ],
)
def test_a_wrong_flag_is_named_in_one_sentence(images, tmp_path, monkeypatch, argv, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    places = {"IMAGES": str(images), "EMPTY": "empty"}
    with pytest.raises(ConfigError) as error:
        main([places.get(part, part) for part in argv])
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


@pytest.mark.processes
def test_the_script_ends_with_one_sentence_and_exit_code_2(tmp_path):
    command = ("python", "data_tools/encode_latents.py", "--input", tmp_path / "gone")
    output = run(*command, "--output", tmp_path / "set", expect=2)
    assert output.startswith("error: --input ") and output.count("\n") == 1


@pytest.mark.processes
def test_a_disk_that_fills_up_leaves_whole_shards_and_one_sentence(images, encoded, tmp_path):
    """The kernel refuses to let a file grow past the limit, as a full disk does."""
    output = tmp_path / "set"
    limit = (encoded / "00000.tar").stat().st_size - 4096
    process = subprocess.run(
        [sys.executable, "data_tools/encode_latents.py", *flags(images, output)],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith(f"error: --output {output}: cannot write")
    assert "File too large" in process.stderr and "Traceback" not in process.stderr
    assert [path.name for path in output.iterdir()] == [SETTINGS_NAME]
    main(flags(images, output))
    assert content(output) == content(encoded)


@pytest.mark.parametrize("number", ["ENOSPC", "EROFS", "EDQUOT", "EACCES"])
def test_every_refusal_of_the_disk_is_reported_alike(images, tmp_path, monkeypatch, number):
    def refuse(*_args):
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(ConfigError, match=r"^--output .*cannot write .*; free space or choose"):
        main(flags(images, tmp_path / "set"))
    assert not (tmp_path / "set").exists()


def test_any_other_failure_keeps_its_traceback(images, tmp_path, monkeypatch):
    def fail(*_args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        main(flags(images, tmp_path / "set"))


def test_an_image_that_vanishes_meanwhile_is_named(images, tmp_path, monkeypatch):
    def vanish(*_args):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr("data_tools.sources.source.FileSource.read", vanish)
    with pytest.raises(ConfigError, match=r"^--input .*: .*\.png cannot be read \(No such file"):
        main(flags(images, tmp_path / "set"))
    assert [path.name for path in (tmp_path / "set").iterdir()] == [SETTINGS_NAME]


def test_several_callers_prepare_the_demo_once(tmp_path, monkeypatch):
    module = data_tools.encode_latents
    monkeypatch.setattr(module, "DEMO_LATENTS", tmp_path / "datasets" / "demo")
    monkeypatch.setattr(module, "DEMO_IMAGES", tmp_path / "datasets" / "demo_images")
    monkeypatch.setattr(module, "DEMO_PER_CLASS", 2)
    monkeypatch.setattr(module, "DEMO_SIZE", 16)
    written = []
    original = ShardEncoder.encode_all

    def counting(self, indices, on_images):
        for sidecar in original(self, indices, on_images):
            written.append(sidecar.shard.name)
            yield sidecar

    monkeypatch.setattr(ShardEncoder, "encode_all", counting)
    with ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(lambda _: prepare_demo(quiet=True), range(3)))
    assert folders == [tmp_path / "datasets" / "demo"] * 3
    assert written == ["00000.tar"]
    manifest = DatasetManifest.load(folders[0])
    assert (manifest.num_samples, manifest.num_classes) == (20, 10)


@pytest.mark.processes
def test_progress_is_plain_lines_where_there_is_no_terminal(images, tmp_path):
    output = run("python", "data_tools/encode_latents.py", *flags(images, tmp_path / "set"))
    assert "23/23 images, " in output and " images/s, 0 s left\n" in output
    assert "\r" not in output
