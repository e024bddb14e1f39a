"""Tars that others wrote: indexed once, checked, then read like our own."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import torch
import webdataset as wds

from data_tools.errors import ConfigError
from data_tools.index_shards import main
from data_tools.inspect_dataset import page
from data_tools.shards.foreign_arrays import doubts
from data_tools.shards.manifest import MANIFEST_NAME, DatasetManifest
from data_tools.stream.loader import LatentStream
from data_tools.stream.reader import SampleReader
from data_tools.stream.training_data import open_data
from data_tools.verification.verify import verify
from tests.support.launch import REPOSITORY, run

VAE = str(REPOSITORY / "data_tools" / "demo_vae")
WITH = ("--array", "latent.npy", "--vae", VAE)
SHAPE = (4, 6, 5)


def latent(i, dtype=np.float32, shape=SHAPE):
    return np.random.default_rng(i).standard_normal(shape).astype(dtype)


def write_tars(folder, sizes=(5, 3), dtype=np.float32, shape=SHAPE, flip=False, **extra):
    """As webdataset's own writer makes them, with members nobody asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for number, size in enumerate(sizes):
        with wds.TarWriter(str(folder / f"part-{number}.tar")) as writer:
            for i in range(first, first + size):
                sample = {"__key__": f"dir.x/img{i}", "latent.npy": latent(i, dtype, shape)}
                sample |= {"cls": i % 3, "json": {"label": i % 2}, "txt": "a picture"}
                if flip:
                    sample["flip.npy"] = -latent(i, dtype, shape)
                writer.write(sample | extra)
        first += size


def index(folder, *flags):
    tars = str(folder / "part-{0,1}.tar")
    main(["--input", tars, "--array", "latent.npy", "--kind", "latents", "--vae", VAE, *flags])


def read_all(data, use_flip=False):
    reader = SampleReader(data, data.stores("sha256", None))
    count = data.manifest.num_samples
    dtype = getattr(torch, data.manifest.latent.dtype)
    out = torch.empty((count, *data.manifest.latent.shape), dtype=dtype)
    labels = reader.read(np.arange(count), np.full(count, use_flip), out)
    reader.close()
    return labels.tolist(), out.numpy()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("flip", [False, True])
def test_indexed_tars_are_read_in_place(tmp_path, dtype, flip, monkeypatch):
    monkeypatch.setenv("SWITCH_DIT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tars"
    write_tars(folder, dtype=dtype, flip=flip)
    index(folder, *(["--flip", "flip.npy"] if flip else []))

    data = open_data(str(folder))
    labels, arrays = read_all(data)

    assert labels == [i % 3 for i in range(8)]
    np.testing.assert_array_equal(arrays, np.stack([latent(i, dtype) for i in range(8)]))
    if flip:
        np.testing.assert_array_equal(read_all(data, use_flip=True)[1], -arrays)
    manifest = data.manifest
    assert (manifest.latent.kind, manifest.latent.dtype) == ("latents", np.dtype(dtype).name)
    assert (manifest.latent_channels, manifest.latent_height, manifest.latent_width) == SHAPE
    assert manifest.has_flip == flip
    assert [entry.count for entry in manifest.classes] == [3, 3, 2]
    mean = arrays.astype(np.float64).mean(axis=(0, 2, 3))
    np.testing.assert_allclose(manifest.statistics.mean, mean, atol=1e-5)
    settings = {"seed": 0, "window": 2, "global_batch_size": 8, "micro_batch_size": 8}
    with LatentStream(data, rank=0, world_size=1, horizontal_flip=flip, **settings) as stream:
        batch = next(stream)
    assert sorted(batch.labels.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2]


def test_indexes_may_lie_elsewhere_and_labels_in_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SWITCH_DIT_CACHE", str(tmp_path / "cache"))
    write_tars(tmp_path / "tars")
    (tmp_path / "names").write_text("even\nodd one\n")
    output = tmp_path / "indexed"
    flags = ["--output", str(output), "--label", "json:label"]
    index(tmp_path / "tars", *flags, "--class-names", str(tmp_path / "names"))

    assert "8 samples in 2 tars, latents 4x6x5 float32, 2 classes" in capsys.readouterr().out
    data = open_data(str(output), data_shards=str(tmp_path / "tars"))
    assert read_all(data)[0] == [i % 2 for i in range(8)]
    assert [entry.id for entry in data.manifest.classes] == ["even", "odd one"]


def test_moments_have_the_statistics_of_their_draws_and_no_labels_are_one_class(tmp_path):
    write_tars(tmp_path, shape=(8, 4, 4), dtype=np.float16)
    index(tmp_path, "--kind", "moments", "--label", "none")
    manifest = DatasetManifest.load(tmp_path)
    arrays = np.stack([latent(i, np.float16, (8, 4, 4)) for i in range(8)]).astype(np.float64)
    mean, variance = arrays[:, :4], np.exp(arrays[:, 4:])
    expected = np.sqrt((mean**2 + variance).mean((0, 2, 3)) - mean.mean((0, 2, 3)) ** 2)
    np.testing.assert_allclose(manifest.statistics.std, expected, rtol=1e-5)
    assert manifest.latent_channels == 4 and manifest.num_classes == 0


def test_indexing_continues_where_it_was(tmp_path):
    write_tars(tmp_path)
    index(tmp_path)
    text = (tmp_path / MANIFEST_NAME).read_bytes()
    (tmp_path / MANIFEST_NAME).unlink()
    (tmp_path / "part-1.index.npy").unlink()
    kept = (tmp_path / "part-0.index.npy").stat().st_ino
    index(tmp_path)
    assert (tmp_path / MANIFEST_NAME).read_bytes() == text
    assert (tmp_path / "part-0.index.npy").stat().st_ino == kept, "indexed once"
    write_tars(tmp_path, sizes=(6, 3))
    index(tmp_path)
    manifest = DatasetManifest.load(tmp_path)
    assert manifest.num_samples == 9, "a tar that changed is indexed again"
    write_tars(tmp_path, sizes=(6, 3), txt="other text")
    index(tmp_path)
    assert DatasetManifest.load(tmp_path).hash != manifest.hash, "also where its size is the same"


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was loaded')",))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda i: latent(i)[None], "holds float32 (1, 4, 6, 5), a batch of one; write array[0]"),
        (lambda i: np.stack([latent(i)] * 2), "holds float32 (2, 4, 6, 5), a batch; write each"),
        (lambda i: latent(i).reshape(4, 30).T.copy(), "holds float32 (30, 4), as of tokens; resh"),
        (lambda i: latent(i, np.float64), "holds float64 (4, 6, 5); float16 and float32 can be r"),
        (lambda i: latent(i).astype("i1"), "holds int8 (4, 6, 5); float16 and float32 can be read"),
        (lambda i: latent(i, np.float16).view("V2"), "2 bytes without a type, as bfloat16 is st"),
        (lambda i: latent(i).transpose(1, 2, 0).copy(), "has 4 latent channels, part-0.tar 6 in "),
        (lambda i: latent(i).transpose(1, 2, 0).copy(), "if these are the channels, write transpo"),
    ],
)
def test_arrays_as_other_programs_store_them_are_refused_with_what_to_write(
    tmp_path, make, sentence
):
    with wds.TarWriter(str(tmp_path / "part-0.tar")) as writer:
        writer.write({"__key__": "a", "latent.npy": npy(make(0)), "cls": 0})
    with pytest.raises(ConfigError) as error:
        main([*WITH, "--input", str(tmp_path / "part-0.tar"), "--kind", "latents"])
    assert sentence in str(error.value)
    assert not (tmp_path / MANIFEST_NAME).exists()


def test_standard_deviations_in_the_place_of_log_variances_are_refused(tmp_path):
    std = np.random.default_rng(0).uniform(0.01, 0.3, SHAPE).astype(np.float32)
    for name, second in (("std", std), ("log", 2 * np.log(std))):
        (tmp_path / name).mkdir()
        with wds.TarWriter(str(tmp_path / name / "0.tar")) as writer:
            array = np.concatenate([latent(0), second])
            writer.write({"__key__": "a", "latent.npy": array, "cls": 0})
    with pytest.raises(ConfigError) as error:
        main([*WITH, "--input", str(tmp_path / "std"), "--output", str(tmp_path / "new" / "set")])
    assert not (tmp_path / "new").exists()
    assert str(error.value) == (
        "--kind moments: the second half of every array in 0.tar is positive, so it seems to hold "
        "standard deviations and no log-variances; write 2 * log(std) in their place, or the first "
        "half alone with --kind latents."
    )
    main([*WITH, "--input", str(tmp_path / "log")])


@pytest.mark.parametrize(("factor", "is_doubted"), [(1.0, False), (0.2, True), (40.0, True)])
def test_the_size_of_latents_is_shown_and_doubted(tmp_path, capsys, factor, is_doubted):
    with wds.TarWriter(str(tmp_path / "0.tar")) as writer:
        for i in range(9):
            writer.write({"__key__": f"{i}", "latent.npy": latent(i) * np.float32(factor)})
    main([*WITH, "--input", str(tmp_path), "--kind", "latents", "--label", "none"])

    said = capsys.readouterr().out
    std = DatasetManifest.load(tmp_path).scaled_std
    assert "scaled std " + "  ".join(f"{value:.3f}" for value in std) in said
    doubt = "per channel where 1 is usual; see that --vae is the one that made them, and that they"
    assert ("warning: " in said) == (doubt in said) == is_doubted
    assert f"{std[0]:7.4f}" in page(DatasetManifest.load(tmp_path))


def test_latents_that_are_scaled_already_are_told_from_those_of_another_vae():
    assert doubts([0.9, 1.1], 0.18215) == ""
    assert doubts([0.16, 0.2], 0.18215) == (
        "a model would see a standard deviation of 0.16 to 0.2 per channel where 1 is usual; they "
        "seem to be multiplied by the scaling factor (0.18215) already: divide them by it and "
        "index again"
    )
    assert doubts([0.16, 1.0], 0.18215).endswith("and that they are not scaled")


def last_member_only(folder):
    path = folder / "part-1.tar"
    with tarfile.open(path) as tar:
        cut = tar.getmembers()[-4].offset
    path.write_bytes(path.read_bytes()[:cut])


def damage_a_header(folder):
    path = folder / "part-1.tar"
    with tarfile.open(path) as tar:
        start = tar.getmembers()[-4].offset  # of the last sample
    content = bytearray(path.read_bytes())
    content[start + 150] ^= 1  # in the header's sum
    path.write_bytes(content)


def damaged_header(content):
    return content[:8] + b"\1" + content[9:]  # the length of the npy header


@pytest.mark.parametrize(
    ("extra", "flags", "sentence"),
    [
        ({"latent.npy": latent(0, shape=(4, 6, 6))}, [], "must have one shape and dtype"),
        ({"latent.npy": npy(np.array([Bomb()]), allow_pickle=True)}, [], "holds object"),
        ({"latent.npy": npy(latent(0).astype(">f4"))}, [], "not written by numpy.save of"),
        (
            {"latent.npy": npy(np.asfortranarray(latent(0)))},
            [],
            "in Fortran order; write numpy.asc",
        ),
        ({"latent.npy": npy(latent(0))[:-4]}, [], "shorter or longer than its shape"),
        ({"latent.npy": damaged_header(npy(latent(0)))}, [], "is no .npy file of numbers"),
        ({"latent.npy": b"PK\x03\x04"}, [], "is no .npy file but a ZIP archive, as .npz and .pt"),
        ({"latent.npy": pickle.dumps(Bomb())}, [], "is no .npy file but a pickle, which is never"),
        ({"latent.npy": b"<html>"}, [], "dir.x/img5.latent.npy is no .npy file but HTML; write ea"),
        (
            {"latent.npy": np.full(SHAPE, np.nan, np.float32)},
            [],
            "img5.latent.npy holds a value that is",
        ),
        (
            {"latent.npy": np.full(SHAPE, np.inf, np.float32)},
            [],
            "img5.latent.npy holds a value tha",
        ),
        ({"cls": b"tench"}, [], "sample dir.x/img5 has 'tench' as its cls"),
        ({"cls": -1}, [], "has the label -1; labels count from 0"),
        ({}, ["--label", "json:class"], "as its json:class, which gives no whole number"),
        ({}, ["--flip", "flip.npy"], "has no .flip.npy"),
        ({}, ["--label", "id"], "has no .id"),
        ({}, ["--array", "moments.npy"], "has no .moments.npy (5 such samples); see --array"),
        ({}, ["--array", "moments.npy"], "; the tar has .json 5 (dir.x/img0.json, "),
        ({}, ["--array", "x.npy", "--label", "none"], "holds no samples (it has .cls 5 (dir.x/img"),
    ],
)
def test_tars_that_cannot_be_read_are_refused_in_one_sentence(tmp_path, extra, flags, sentence):
    write_tars(tmp_path)
    with wds.TarWriter(str(tmp_path / "part-1.tar"), encoder=True) as writer:
        sample = {"__key__": "dir.x/img4", "latent.npy": latent(4), "cls": 0, "json": {"label": 1}}
        writer.write(sample)
        writer.write(sample | {"__key__": "dir.x/img5"} | extra)
    with pytest.raises(ConfigError, match="^--input .*part-[01].tar: ") as error:
        index(tmp_path, *flags)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / MANIFEST_NAME).exists()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (last_member_only, "does not end as a tar does, so its last files may be missing"),
        (damage_a_header, "has a damaged header after"),
        (lambda f: (f / "part-1.tar").write_bytes(b"no tar" * 500), "is no tar, or damaged at"),
        (lambda f: (f / "part-1.tar").write_bytes(bytes(10240)), "holds no samples"),
        (lambda f: (f / "part-1.tar").unlink(), "cannot be read (No such file"),
    ],
)
def test_damaged_tars_are_refused_in_one_sentence(tmp_path, damage, sentence):
    write_tars(tmp_path)
    damage(tmp_path)
    with pytest.raises(ConfigError, match="^--input .*part-1.tar: ") as error:
        index(tmp_path)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--input", "a/{0,1}.tar", "--array", "x"], "cannot be read (No such file"),
        (["--input", "{a,b}/0.tar", "--array", "x"], "lie in one folder under different names"),
        (["--input", "a/0.zip", "--array", "x"], "is not called NAME.tar"),
        (["--input", "pipe:cat {}", "--array", "x"], "cannot be cut into folder and name"),
        (["--input", "http://h/0.tar", "--array", "x"], "--output: say in which folder"),
    ],
)
def test_wrong_flags_are_refused(tmp_path, monkeypatch, flags, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        main([*flags, "--vae", VAE])
    assert sentence in str(error.value)


def test_an_empty_line_moves_no_class_name(tmp_path):
    write_tars(tmp_path)
    names = tmp_path / "names.txt"
    names.write_text("cat\n\ndog\nbird\n")
    with pytest.raises(ConfigError, match=r"^--class-names .*names.txt: line 2 is empty; "):
        index(tmp_path, "--class-names", str(names))


def test_an_index_that_was_changed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SWITCH_DIT_CACHE", str(tmp_path / "cache"))
    write_tars(tmp_path)
    index(tmp_path)
    rows = np.load(tmp_path / "part-1.index.npy")
    np.save(tmp_path / "part-1.index.npy", rows[::-1])
    with pytest.raises(ConfigError, match=r"part-1\.tar: its index part-1\.index\.npy is not the"):
        read_all(open_data(str(tmp_path)))


@pytest.mark.processes
def test_training_describes_indexed_tars_in_a_dry_run(tmp_path):
    write_tars(tmp_path / "tars", shape=(4, 16, 16))
    index(tmp_path / "tars")
    output = run(
        *("python", "training/main.py", "--deepspeed", "ds_configs/zero2.json", "--dry-run"),
        *("--data", tmp_path / "tars", "--no-horizontal-flip", "--run-dir", tmp_path / "run"),
        DS_ACCELERATOR="cpu",
    )
    assert "8 samples, 2 shards, 0.00 GiB, latents 4x16x16 float32, 3 classes" in output
    assert json.loads((tmp_path / "tars" / MANIFEST_NAME).read_text())["num_samples"] == 8


def test_the_description_of_a_data_set_of_ours_is_not_replaced(demo_latents):
    before = (demo_latents / "dataset.json").read_bytes()

    with pytest.raises(ConfigError, match="encode_latents.py made it, and its dataset.json would"):
        main(
            ["--input", f"{demo_latents}/00000.tar", "--array", "moments.npy", "--kind", "moments"]
            + ["--output", str(demo_latents), "--vae", "data_tools/demo_vae"]
        )

    assert (demo_latents / "dataset.json").read_bytes() == before


def test_latents_of_joined_and_unsorted_tars_are_found_by_their_key(tmp_path, monkeypatch):
    monkeypatch.setenv("SWITCH_DIT_CACHE", str(tmp_path / "cache"))
    write_tars(tmp_path / "sorted")
    (tmp_path / "tars").mkdir()
    parts = []
    for part in range(2):
        with tarfile.open(tmp_path / "sorted" / f"part-{part}.tar") as tar:
            members = [(m, tar.extractfile(m).read()) for m in tar]
        members.sort(key=lambda item: not item[0].name.endswith(".npy"))  # labels at the end
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for member, data in members:
                tar.addfile(member, io.BytesIO(data))
        parts.append(buffer.getvalue())
    (tmp_path / "tars" / "all.tar").write_bytes(b"".join(parts))
    tar = str(tmp_path / "tars" / "all.tar")

    main(["--input", tar, "--array", "latent.npy", "--kind", "latents", "--vae", VAE])

    labels, arrays = read_all(open_data(str(tmp_path / "tars")))
    assert labels == [i % 3 for i in range(8)]
    np.testing.assert_array_equal(arrays, np.stack([latent(i) for i in range(8)]))
    manifest = DatasetManifest.load(tmp_path / "tars")
    assert {entry.kind: entry.count for entry in manifest.left_out} == {".json": 8, ".txt": 8}
    assert not verify(tmp_path / "tars", is_quick=False, num_workers=1).damaged()
