"""Options of encoding: precision, memory, inputs that are lists or tars, names, dry runs."""

import hashlib
import io
import json
import re
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.encode_latents import main
from data_tools.encoding import trial
from data_tools.encoding.command import PRESETS_PATCH, reopen
from data_tools.encoding.encoder import ShardEncoder
from data_tools.encoding.output import INDEXES_NAME, EncodingOutput
from data_tools.encoding.progress import EncodingProgress, duration
from data_tools.encoding.settings import load_settings
from data_tools.encoding.trial import check_precision, choose_batch_size, precision_error
from data_tools.errors import ConfigError
from data_tools.inspect_dataset import page
from data_tools.shards.manifest import MANIFEST_NAME, DatasetManifest
from data_tools.sources.inputs import open_source
from data_tools.vae.autoencoder import DEMO_VAE, encode_moments, load_vae, with_dtype
from data_tools.vae.vae_files import REPOSITORY
from data_tools.verification.preview import write_preview
from tests.support.encode_jobs import content, flags, make_pictures


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def encoded(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents") / "set"
    main(flags(images, folder))
    return folder


@pytest.fixture(scope="module")
def vae():
    return load_vae(DEMO_VAE)


def smooth_pixels(count=4):
    rng = np.random.default_rng(1)
    coarse = [Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)) for _ in range(count)]
    return np.stack([np.asarray(image.resize((32, 32))) for image in coarse])


def test_the_error_of_a_precision_is_that_of_its_means(vae):
    pixels = smooth_pixels()
    half = with_dtype(vae, torch.float16)
    images = torch.from_numpy(pixels)
    means = [encode_moments(v, images).double().chunk(2, 1)[0].numpy() for v in (vae, half)]
    expected = np.sqrt(np.mean((means[1] - means[0]) ** 2)) / means[0].std(ddof=1)
    assert precision_error(vae, half, pixels) == pytest.approx(expected, rel=1e-4)
    assert precision_error(vae, vae, pixels) == 0
    assert next(vae.model.parameters()).dtype == torch.float32, "the exact one stays"


def test_a_precision_with_too_large_an_error_is_refused(vae):
    damaged = with_dtype(vae, torch.float32)
    with torch.no_grad():
        for parameter in damaged.model.encoder.conv_in.parameters():
            parameter.mul_(1.2)
    with pytest.raises(
        ConfigError, match=r"^--precision bf16: the latents of 4 images differ .*32"
    ):
        check_precision(vae, damaged, smooth_pixels(), "bf16")
    with torch.no_grad():
        next(damaged.model.parameters()).fill_(torch.nan)
    with pytest.raises(ConfigError, match="by inf of their standard deviation"):
        check_precision(vae, damaged, smooth_pixels(), "fp16")


def test_reduced_precision_is_measured_recorded_and_close(images, encoded, tmp_path, capsys):
    main(flags(images, tmp_path, **{"--precision": "bf16"}))
    error = re.search(
        r"--precision bf16: rms error ([\d.]+) of the latents' standard deviation on 8 images",
        capsys.readouterr().out,
    )
    assert 0 < float(error[1]) < trial.MAX_PRECISION_ERROR
    manifest, exact = DatasetManifest.load(tmp_path), DatasetManifest.load(encoded)
    assert (manifest.latent.precision, exact.latent.precision) == ("bf16", "fp32")
    assert manifest.vae.sha256 == exact.vae.sha256
    np.testing.assert_allclose(manifest.statistics.mean, exact.statistics.mean, atol=0.05)
    with pytest.raises(ConfigError, match=r"latent\.precision \(bf16 -> fp32\)"):
        main(flags(images, tmp_path))


def test_the_batch_size_follows_the_memory_that_is_free(vae, monkeypatch):
    sizes = []
    for free in (1 << 40, 64 << 20, 8 << 20, 0):
        monkeypatch.setattr(trial, "_free_bytes", lambda device, free=free: free)
        sizes.append(choose_batch_size(vae, 64, 1))
    assert sizes[0] == trial.MAX_BATCH_SIZE["cpu"]
    assert sizes == sorted(sizes, reverse=True) and sizes[2] < sizes[0] and sizes[3] == 1
    assert all(size & (size - 1) == 0 for size in sizes)
    monkeypatch.setattr(trial, "_free_bytes", lambda device: 64 << 20)
    assert choose_batch_size(vae, 64, 4) <= sizes[1]


def test_a_lack_of_memory_is_one_sentence(images, tmp_path, monkeypatch):
    def full(*_args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("data_tools.encoding.encoder.encode_moments", full)
    with pytest.raises(ConfigError, match=r"^--batch-size 4: out of memory on cpu; end what else"):
        main(flags(images, tmp_path))
    monkeypatch.setattr("data_tools.encoding.trial.encode_moments", full)
    with pytest.raises(ConfigError, match=r"^--batch-size auto: not even 3 images of 32 pixels"):
        main(flags(images, tmp_path / "auto", **{"--batch-size": "auto"}))
    assert not (tmp_path / "auto").exists()


def make_tars(images, folder):
    """The pictures of a folder as tars with labels, in the same order."""
    source = open_source(str(images))
    folder.mkdir()
    for part, places in enumerate(np.array_split(np.arange(len(source)), 2)):
        with tarfile.open(folder / f"{part}.tar", "w") as tar:
            for place in places:
                label = b"%d" % source.labels[place]
                for suffix, data in (("png", source.read(place)), ("cls", label)):
                    info = tarfile.TarInfo(f"{place:04d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def test_lists_and_tars_give_the_shards_of_the_folder(images, encoded, tmp_path):
    source = open_source(str(images))
    lines = [f"{source.path(i)}\t{source.name(i).split('/')[0]}\n" for i in range(len(source))]
    (tmp_path / "list.tsv").write_text("".join(lines))
    tars = make_tars(images, tmp_path / "tars")
    (tmp_path / "names.json").write_text(
        '{"0": ["blue_cars", "blue cars"], "1": ["red_cars", "red cars"]}'
    )
    names = {"--class-names": tmp_path / "names.json"}
    main(flags(tmp_path / "list.tsv", tmp_path / "from_list"))
    main(flags(tars / "{0..1}.tar", tmp_path / "from_tars", **names))

    wanted = content(encoded)
    for folder in ("from_list", "from_tars"):
        found = content(tmp_path / folder)
        assert found.keys() == wanted.keys(), "no index of the tars stays behind"
        assert all(found[name] == wanted[name] for name in wanted if name[0] == "0")
        manifest = DatasetManifest.load(tmp_path / folder)
        assert manifest.classes == DatasetManifest.load(encoded).classes


def test_indexes_of_tars_serve_the_processes_that_come_later(images, tmp_path, monkeypatch):
    tars, output = make_tars(images, tmp_path / "tars"), tmp_path / "set"
    with monkeypatch.context() as patch:
        patch.setattr(ShardEncoder, "encode_all", lambda *_: iter([1 / 0]))
        with pytest.raises(ZeroDivisionError):
            main(flags(tars, output))
    assert len(list((output / INDEXES_NAME).iterdir())) == 2
    monkeypatch.setattr("data_tools.sources.image_tars.scan_tar", None)  # not needed any more
    main(flags(tars, output))
    assert not (output / INDEXES_NAME).exists()
    monkeypatch.undo()
    (output / INDEXES_NAME).mkdir()  # of a process that came when another had nearly finished
    main(flags(tars, output))
    assert not (output / INDEXES_NAME).exists()


def test_classes_get_other_names_without_encoding_again(images, encoded, tmp_path):
    for name, data in content(encoded).items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "names.tsv").write_text("blue_cars\tsky blue\nred_cars\tfire red\n")
    before = (tmp_path / "00000.tar").stat().st_mtime_ns
    main(flags(images, tmp_path, **{"--class-names": tmp_path / "names.tsv"}))
    manifest = DatasetManifest.load(tmp_path)
    assert [(c.id, c.name) for c in manifest.classes] == [
        ("blue_cars", "sky blue"),
        ("red_cars", "fire red"),
    ]
    assert (tmp_path / "00000.tar").stat().st_mtime_ns == before
    assert manifest.hash == DatasetManifest.load(encoded).hash


def test_a_finished_set_stays_as_it_is_with_newer_packages(images, encoded, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99.0")
    before = content(encoded), (encoded / MANIFEST_NAME).stat().st_mtime_ns
    main(flags(images, encoded))
    assert (content(encoded), (encoded / MANIFEST_NAME).stat().st_mtime_ns) == before


def test_a_damaged_description_is_written_again(images, encoded, tmp_path):
    for name, data in content(encoded).items():
        (tmp_path / name).write_bytes(data)
    for damage in (b"{", b"[]", (encoded / MANIFEST_NAME).read_bytes().replace(b": 23", b": 22")):
        (tmp_path / MANIFEST_NAME).write_bytes(damage)
        main(flags(images, tmp_path))
        assert content(tmp_path) == content(encoded)


def test_one_shard_is_encoded_again_to_the_same_bytes(images, encoded, tmp_path):
    for name, data in content(encoded).items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "00001.tar").write_bytes(b"damaged")
    (tmp_path / "00001.json").unlink()
    seen = []
    encoder = reopen(tmp_path, [str(images)], "data_tools/demo_vae", "cpu")
    (sidecar,) = encoder.encode_all(iter([1]), lambda _, count: seen.append(count))
    assert content(tmp_path) == content(encoded)
    assert sidecar.shard == DatasetManifest.load(encoded).shards[1]
    assert sum(seen) == 8
    with pytest.raises(ConfigError, match=r"^--input .*: its 8 images are not the 23 that"):
        reopen(tmp_path, [str(images / "blue_cars")], None, "cpu")
    with pytest.raises(ConfigError, match=r"has no encoding\.json, so how its shards were made"):
        reopen(tmp_path / "gone", [str(images)], None, "cpu")


def test_what_is_wrong_with_a_skipped_image_is_said(images, tmp_path, capsys):
    source = tmp_path / "images"
    for index, data in enumerate((b"", b"text", (images / "blue_cars" / "00.png").read_bytes())):
        source.mkdir(exist_ok=True)
        (source / f"{index}.png").write_bytes(data)
    Image.new("1", (20_000, 20_000)).save(source / "3.png")
    main(flags(source, tmp_path / "set"))
    text = capsys.readouterr().out
    assert "skipped 0.png: is empty\n" in text and "skipped 1.png: is text\n" in text
    assert "skipped 3.png: " in text and "skipped 3 files that are no readable images: " in text
    assert DatasetManifest.load(tmp_path / "set").num_samples == 1


def test_a_dry_run_counts_and_estimates(images, encoded, tmp_path, capsys):
    main(flags(images, tmp_path / "set", **{"--dry-run": True, "--precision": "fp16"}))
    text = capsys.readouterr().out
    assert "images per class: blue_cars 8, red_cars 15\n" in text
    stride = DatasetManifest.load(encoded).latent.record_layout.stride
    assert f"{23 * stride:,} bytes in all, {stride:,} a sample, {8 * stride:,} a shard of 8" in text
    assert "--precision fp16: rms error 0.00" in text
    assert re.search(r"0 images are done; about [\d.]+ images/s here \(decoding [\d.]+ ms on", text)
    assert not (tmp_path / "set").exists()
    main(flags(images, encoded, **{"--dry-run": True}))
    assert re.search(r"23 images are done; .*, 0 s for one process\n", capsys.readouterr().out)


def test_latents_that_no_preset_can_cut_into_patches_are_told_before_they_are_encoded(
    images, tmp_path, capsys
):
    main(flags(images, tmp_path / "odd", **{"--dry-run": True, "--size": "36"}))
    said = capsys.readouterr().out
    assert (
        "latents of 9 x 9 cannot be cut into patches of 2, as every preset's network does: " in said
    )
    assert "encode with --size 32 or 40, or train with a --patch-size that divides 9\n" in said
    for preset in (REPOSITORY / "training" / "presets").glob("*.yaml"):
        assert f"patch_size: {PRESETS_PATCH}\n" in preset.read_text(), preset
    main(flags(images, tmp_path / "even", **{"--dry-run": True}))
    assert "patches" not in capsys.readouterr().out


class OtherProcesses:
    """Claims that say what others have done."""

    def __init__(self, **done):
        self.done = done

    def held(self):
        return iter(self.done.items())

    def note(self, name, done):
        self.done[name] = done


def test_progress_counts_what_all_did_and_times_what_was_done_since(
    encoded, tmp_path, monkeypatch, capsys
):
    for name in ("00000.tar", "00000.json", "encoding.json"):
        (tmp_path / name).write_bytes((encoded / name).read_bytes())
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    claims = OtherProcesses(**{"00001": 3})
    output = EncodingOutput(tmp_path, load_settings(tmp_path))
    progress = EncodingProgress(output, claims, is_quiet=False)
    assert progress.done == 8 + 3
    clock[0] += 2.0
    claims.done["00001"] = 6
    progress.update(2, 3)
    progress.look()
    # 6 images in 2 seconds, by two processes; those before the start do not count.
    assert progress.line() == "17/23 images, 3.0 images/s, 2 s left"
    for name in ("00001.tar", "00001.json"):
        (tmp_path / name).write_bytes((encoded / name).read_bytes())
    progress.look()
    assert progress.done == 16 + 3
    assert [duration(s) for s in (3, 89, 100, 3600, 90_000)] == [
        *("3 s", "89 s", "2 min", "60 min", "25 h 00 min")
    ]


def test_the_vae_is_busy_for_a_part_of_the_time(images, encoded, tmp_path, vae):
    settings = load_settings(encoded)
    encoder = ShardEncoder(open_source(str(images)), vae, settings, tmp_path, num_threads=2)
    sidecars = list(encoder.encode_all(iter(range(3)), lambda index, count: None))
    assert [sidecar.shard.name for sidecar in sidecars] == [
        *("00000.tar", "00001.tar", "00002.tar")
    ]
    assert 0 < encoder.busy_share < 1


def test_an_output_inside_a_file_is_one_sentence(images, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^--output .*file/set: cannot write .*Not a directory"):
        main(flags(images, tmp_path / "file" / "set"))


def test_a_data_set_remembers_the_statistics_of_its_vae(images, encoded, tmp_path, capsys):
    folder = tmp_path / "vae"
    shutil.copytree(DEMO_VAE, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"latents_mean": [-1.6, 1.9, -1.4, 2.5], "latents_std": [8.5, 5.9, 6.5, 5.2]}
    (folder / "config.json").write_text(json.dumps(config))

    main(flags(images, tmp_path / "set", **{"--vae": folder}))

    found, plain = DatasetManifest.load(tmp_path / "set"), DatasetManifest.load(encoded)
    assert found.vae == load_vae(folder).reference
    assert found.vae.latents_std == config["latents_std"]
    assert found.shards == plain.shards, "the moments are those of the VAE alone"
    assert found.hash != plain.hash
    assert "latents_mean and latents_std" in page(found)
    for name, manifest in (("a.png", found), ("b.png", plain)):
        write_preview(tmp_path / name, manifest)
    previews = [np.asarray(Image.open(tmp_path / name), int)[40:] for name in ("a.png", "b.png")]
    assert np.abs(previews[0] - previews[1]).max() <= 1
    # Begun by a version that did not use them: it goes on without.
    for path in encoded.iterdir():
        shutil.copy(path, tmp_path / "set" / path.name)
    capsys.readouterr()
    main(flags(images, tmp_path / "set", **{"--vae": folder}))
    assert "are not used: this data set was begun without them; a new" in capsys.readouterr().out
    assert DatasetManifest.load(tmp_path / "set").hash == plain.hash


def test_a_description_of_before_there_was_room_for_statistics_is_the_same_data_set(encoded):
    manifest = DatasetManifest.load(encoded)
    text = json.loads((encoded / MANIFEST_NAME).read_text())
    for name in ("latents_mean", "latents_std"):
        text["vae"].pop(name, None)
    assert DatasetManifest.parse(json.dumps(text).encode(), "dataset.json").hash == manifest.hash
    del text["versions"], text["source"], text["vae"]["id"]
    for entry in text["classes"]:
        del entry["name"]
    old = hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()
    assert old == manifest.hash
