"""The shard format and its description: webdataset reads it, offsets hold, damage is told."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch
import webdataset as wds

from data_tools.errors import ConfigError
from data_tools.files import replace_file
from data_tools.shards.manifest import MANIFEST_NAME, DatasetManifest
from data_tools.shards.records import RecordLayout, Sample
from data_tools.stream.reader import SampleReader
from tests.support.synthetic import SHAPE, data_of, make_dataset, moments_of


def read(manifest, ids, use_flip=False):
    data = data_of(manifest)
    reader = SampleReader(data, data.stores("size", None))
    out = torch.empty((len(ids), *SHAPE), dtype=torch.float16)
    labels = reader.read(np.array(ids), np.full(len(ids), use_flip), out)
    reader.close()
    return labels, out.numpy()


@pytest.mark.parametrize("has_flip", [True, False])
def test_plain_webdataset_reads_the_shards(tmp_path, has_flip):
    make_dataset(tmp_path, [3, 2], has_flip)
    urls = [str(tmp_path / "00000.tar"), str(tmp_path / "00001.tar")]
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"{i:08d}" for i in range(5)]
    for i, sample in enumerate(samples):
        assert sample["cls"] == i % 3
        assert sample["moments.npy"].dtype == np.float16
        np.testing.assert_array_equal(sample["moments.npy"], moments_of(i))
        if has_flip:
            np.testing.assert_array_equal(sample["flip.npy"], moments_of(i, True))
        else:
            assert "flip.npy" not in sample


@pytest.mark.parametrize("has_flip", [True, False])
@pytest.mark.parametrize("shape", [(8, 32, 32), (8, 4, 4), (2, 3, 5), (32, 64, 64)])
def test_every_member_of_the_tar_lies_where_the_layout_says(shape, has_flip):
    layout = RecordLayout(shape, has_flip)
    array = np.zeros(shape, np.float16)
    samples = [Sample(i, 999, array, array if has_flip else None) for i in range(3)]
    file = io.BytesIO()
    assert layout.write(file, samples) == 3
    file.seek(0)
    with tarfile.open(fileobj=file) as tar:
        members = tar.getmembers()
    per_sample = 3 if has_flip else 2
    assert len(members) == 3 * per_sample
    for i in range(3):
        cls, moments, *flip = members[i * per_sample : (i + 1) * per_sample]
        assert (cls.name, cls.offset) == (f"{i:08d}.cls", i * layout.stride)
        assert moments.name == f"{i:08d}.moments.npy"
        assert moments.offset == i * layout.stride + layout.moments_offset
        if flip:
            assert flip[0].name == f"{i:08d}.flip.npy"
            assert flip[0].offset == i * layout.stride + layout.flip_offset


def test_imagenet_samples_take_the_planned_number_of_bytes():
    assert RecordLayout((8, 32, 32), has_flip=False).stride == 18_432
    assert RecordLayout((8, 32, 32), has_flip=True).stride == 35_840


def test_the_same_samples_give_the_same_bytes(tmp_path):
    make_dataset(tmp_path / "a", [4, 3])
    make_dataset(tmp_path / "b", [4, 3])
    for name in ("00000.tar", "00001.tar", MANIFEST_NAME):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_random_access_returns_each_sample_with_its_label(tmp_path):
    manifest = make_dataset(tmp_path, [5, 0, 7, 1])
    ids = [12, 0, 4, 5, 11, 0, 7]
    for use_flip in (False, True):
        labels, arrays = read(manifest, ids, use_flip)
        assert labels.tolist() == [i % 3 for i in ids]
        np.testing.assert_array_equal(arrays, np.stack([moments_of(i, use_flip) for i in ids]))


def test_a_manifest_tells_what_training_needs(tmp_path):
    manifest = make_dataset(tmp_path, [5, 2])
    assert manifest.num_samples == 7
    assert (manifest.latent_channels, manifest.latent_height, manifest.latent_width) == (4, 4, 4)
    assert manifest.has_flip
    assert manifest.num_classes == 3
    assert [entry.name for entry in manifest.classes] == ["class 0", "class 1", "class 2"]
    assert manifest.vae.scaling_factor == 0.5
    assert manifest.folder == tmp_path
    assert make_dataset(tmp_path / "other", [5, 3]).hash != manifest.hash


def test_the_hash_of_a_data_set_is_that_of_what_training_reads(tmp_path):
    known = make_dataset(tmp_path, [5, 4]).hash
    path = tmp_path / MANIFEST_NAME

    def changed(change):
        content = json.loads(path.read_text())
        change(content)
        (tmp_path / "copy").mkdir(exist_ok=True)
        (tmp_path / "copy" / MANIFEST_NAME).write_text(json.dumps(content))
        return DatasetManifest.load(tmp_path / "copy", check_shards=False).hash

    assert changed(lambda c: c["versions"].update(torch="9.9")) == known
    assert changed(lambda c: c["vae"].update(id="/elsewhere")) == known
    assert changed(lambda c: c["classes"][0].update(name="cat")) == known
    assert changed(lambda c: c["vae"].update(sha256="1" * 64)) != known
    assert changed(lambda c: c["classes"][0].update(id="cat")) != known
    assert changed(lambda c: c["shards"][1].update(sha256="1" * 64)) != known


@pytest.mark.parametrize("name", ["../00000.tar", "/00000.tar", "a/b.tar", "pipe:id.tar", ".tar"])
def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path, name):
    make_dataset(tmp_path, [2])
    edit(shards=[json.loads((tmp_path / MANIFEST_NAME).read_text())["shards"][0] | {"name": name}])(
        tmp_path
    )
    with pytest.raises(ConfigError, match="no plain NAME.tar"):
        DatasetManifest.load(tmp_path, check_shards=False)


def test_a_copy_of_the_manifest_loads_without_shards(tmp_path):
    make_dataset(tmp_path / "data", [5])
    text = (tmp_path / "data" / MANIFEST_NAME).read_text()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / MANIFEST_NAME).write_text(text)
    assert DatasetManifest.load(tmp_path / "run", check_shards=False).num_samples == 5


def edit(**changes):
    def apply(folder):
        path = folder / MANIFEST_NAME
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def drop(name):
    def apply(folder):
        path = folder / MANIFEST_NAME
        content = json.loads(path.read_text())
        del content[name]
        path.write_text(json.dumps(content))

    return apply


def change_shape(folder):
    path = folder / MANIFEST_NAME
    path.write_text(path.read_text().replace('"shape": [\n   8,', '"shape": [\n   16,'))


def cut_shard(folder):
    path = folder / "00001.tar"
    path.write_bytes(path.read_bytes()[:-512])


def edit_vae(**values):
    """A function that changes what the manifest says of the VAE."""

    def apply(folder):
        path = folder / MANIFEST_NAME
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"vae": content["vae"] | values}))

    return apply


def name_a_class_twice(folder):
    path = folder / MANIFEST_NAME
    content = json.loads(path.read_text())
    content["classes"][1]["id"] = content["classes"][0]["id"]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            lambda f: (f / MANIFEST_NAME).unlink(),
            "has shards (00000.tar) but no dataset.json; copy ",
        ),
        (lambda f: (f / MANIFEST_NAME).write_text("{"), "dataset.json: is not JSON"),
        (lambda f: (f / MANIFEST_NAME).write_text("[" * 100_000), "dataset.json: is not JSON"),
        (name_a_class_twice, "dataset.json: two classes have the same id"),
        (lambda f: (f / MANIFEST_NAME).write_text("[]"), "lacks ['classes', 'image'"),
        (edit(format_version=9), "was written by a newer program (format 9, this one knows 3); "),
        (edit(format_version=1), "is of format 1, and this program reads 2 to 3; "),
        (edit(format_version=True), "format_version is True, which is no number of a format"),
        (drop("format_version"), "the content lacks ['format_version']"),
        (drop("vae"), "the content lacks ['vae'] and has the unknown []"),
        (edit(extra=1), "lacks [] and has the unknown ['extra']"),
        (edit(num_samples="7"), "num_samples is '7', which is no int"),
        (edit(num_samples=8), "num_samples is 8, the shards hold 7"),
        (edit(num_samples=True), "num_samples is True, which is no int"),
        (change_shape, "has stride"),
        (edit_vae(latents_mean=[0.0] * 4), "latents_mean and latents_std are no 4 numbers"),
        (edit_vae(latents_mean=[0.0], latents_std=[1.0]), "latents_std are no 4 numbers each"),
        (edit_vae(latents_mean=[0.0] * 4, latents_std=[0.0] * 4), "are no 4 numbers each"),
        (lambda f: (f / "00001.tar").unlink(), "00001.tar: is missing, dataset.json says 10240"),
        (cut_shard, "00001.tar: has 9728 bytes, dataset.json says 10240 bytes; copy the shard"),
    ],
)
def test_a_damaged_data_set_is_refused_in_one_sentence(tmp_path, damage, sentence):
    make_dataset(tmp_path, [5, 2])
    damage(tmp_path)
    with pytest.raises(ConfigError) as error:
        DatasetManifest.load(tmp_path)
    assert sentence in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_folder_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="--data .*nowhere: does not exist; make it: "):
        DatasetManifest.load(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--data .*file: is not a folder; name one with a "):
        DatasetManifest.load(tmp_path / "file")
    (tmp_path / "link").symlink_to("purged")
    with pytest.raises(ConfigError, match="link: is a link to purged, which does not exist; res"):
        DatasetManifest.load(tmp_path / "link")


def overwrite(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize(
    ("offset", "data", "what"),
    [
        (0, b"X", "holds other bytes"),  # the key of the label differs from that of the array
        (9, b"x", "holds other bytes"),  # KEY.xls
        (512, b"a", "holds a label that is not a number"),
        (1024 + 10, b"X", "holds other bytes"),
        (1024 + 512 + 3, b"X", "holds other bytes"),  # the npy header: type and shape
    ],
)
def test_a_damaged_header_is_an_error_and_never_garbage(tmp_path, offset, data, what):
    manifest = make_dataset(tmp_path, [5, 4])
    overwrite(tmp_path / "00001.tar", 2 * manifest.latent.record_layout.stride + offset, data)
    assert read(manifest, [0, 6, 8])[0].tolist() == [0, 0, 2]
    with pytest.raises(ConfigError, match=rf"00001\.tar: {what}.*; run python .*verify_sh"):
        read(manifest, [0, 7, 8])


def test_a_shard_that_ends_early_is_an_error(tmp_path):
    """It may be cut after it was opened; what is cut before is found when it is opened."""
    data = data_of(make_dataset(tmp_path, [5, 4]))
    path = tmp_path / "00001.tar"
    path.write_bytes(path.read_bytes()[: 3 * data.manifest.latent.record_layout.stride + 1600])
    reader = SampleReader(
        data, data.stores("size", None), lambda _: os.open(path, os.O_RDONLY), num_open_shards=1
    )
    out = torch.empty((1, *SHAPE), dtype=torch.float16)
    assert reader.read(np.array([7]), np.zeros(1, bool), out).tolist() == [1]
    with pytest.raises(ConfigError, match=r"00001\.tar: ends inside a sample"):
        reader.read(np.array([8]), np.zeros(1, bool), out)
    reader.close()


def test_a_shard_of_another_data_set_is_an_error(tmp_path):
    manifest = make_dataset(tmp_path / "a", [4], has_flip=True)
    make_dataset(tmp_path / "b", [8], has_flip=False)
    (tmp_path / "a" / "00000.tar").write_bytes((tmp_path / "b" / "00000.tar").read_bytes())
    with pytest.raises(ConfigError, match="holds other bytes than a sample"):
        read(manifest, [0, 1, 2, 3], use_flip=True)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(path, fail)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"
