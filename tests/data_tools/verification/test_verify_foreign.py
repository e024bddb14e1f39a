"""Verification of tars that others wrote and that are read through an index."""

import dataclasses
import hashlib
import io
import json
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_tools.shards.manifest import DatasetManifest, LatentFormat, Members, Shard
from data_tools.shards.shard_check import read_shard
from data_tools.verification.preview import choose_samples
from tests.support.synthetic import make_dataset

SHAPE = (4, 3, 5)


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def sample_files(key, label, scale=1.0):
    """As others do: a number in words around the label, members in any order, other things too."""
    array = np.arange(60, dtype=np.float32).reshape(SHAPE) * scale
    return [
        (f"part/{key}.json", b"{}"),
        (f"part/{key}.latent.npy", npy(array)),
        (f"part/{key}.cls.txt", f"{label}\n".encode()),
    ]


def write_tar(path, files):
    """Write members and return the offset of each one's content."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with tarfile.open(path) as tar:
        return {member.name: member.offset_data for member in tar}


def foreign(folder, files, labels=(2, 0, 1), num_samples=3) -> tuple[DatasetManifest, Shard]:
    """Describe a tar with an index of what it should hold: keys 1, 2, 3."""
    base = make_dataset(folder / "base", [1])
    offsets = write_tar(folder / "a.tar", files)
    rows = [
        (offsets.get(f"part/{key}.latent.npy", 0), -1, label)
        for key, label in zip((1, 2, 3), labels, strict=True)
    ]
    np.save(folder / "a.index.npy", np.array(rows, np.int64))
    tar, index = ((folder / name).read_bytes() for name in ("a.tar", "a.index.npy"))
    digests = [hashlib.sha256(data).hexdigest() for data in (tar, index)]
    shard = Shard("a.tar", num_samples, len(tar), digests[0], 0, digests[1], "", [])
    latent = LatentFormat("latents", list(SHAPE), "float32", "", False, "unknown")
    changes = {"shards": [shard], "latent": latent, "members": Members("latent.npy", "", "cls.txt")}
    manifest = dataclasses.replace(base, folder=folder, num_samples=num_samples, **changes)
    return manifest, shard


def good_files():
    return [
        *sample_files(1, 2),
        *sample_files(2, 0, 2.0),
        *sample_files(3, 1, 3.0),
    ]


def replaced(name, data):
    return [(n, data if n == name else d) for n, d in good_files()]


def test_a_sound_foreign_tar_is_sound_and_summed(tmp_path):
    manifest, shard = foreign(tmp_path, good_files())
    content = read_shard(tmp_path, shard, manifest)
    assert content.problems == []
    assert content.num_samples == 3
    assert content.totals.class_counts == {"2": 1, "0": 1, "1": 1}
    values = np.arange(60.0).reshape(SHAPE)
    np.testing.assert_allclose(content.totals.channel_sum, 6 * values.sum((1, 2)))
    np.testing.assert_allclose(content.totals.channel_square_sum, 14 * (values**2).sum((1, 2)))


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (good_files()[:-3], "holds 2 samples, not 3"),
        ([f for f in good_files() if f[0] != "part/2.latent.npy"], "'part/2' has no .latent.npy"),
        ([f for f in good_files() if f[0] != "part/3.cls.txt"], "'part/3' has no .cls.txt"),
        ([*good_files(), *sample_files(1, 2)], "holds the key 'part/1' twice"),
        ([*good_files(), good_files()[-1]], "holds the key 'part/3' twice"),
        (
            replaced("part/2.cls.txt", b"cat"),
            "part/2 has 'cat' as its cls.txt, which gives no whole",
        ),
        (replaced("part/2.cls.txt", b"7"), "label 7 of 'part/2' is beyond the 3 classes"),
        (replaced("part/2.cls.txt", b"1"), "index a.index.npy does not say where its samples lie"),
        (replaced("part/2.latent.npy", b"garbage"), "part/2.latent.npy is no .npy file but text"),
        (
            replaced("part/2.latent.npy", npy(np.zeros(SHAPE, np.float64))),
            r"part/2.latent.npy holds float64 \(4, 3, 5\)",
        ),
        (
            replaced("part/2.latent.npy", npy(np.zeros((4, 3, 6), np.float32))),
            r"part/2.latent.npy is float32 \[4, 3, 6\], dataset.json says float32 \[4, 3, 5\]",
        ),
        (
            replaced("part/2.latent.npy", npy(np.array([Bomb()], object))),
            r"part/2.latent.npy holds object \(1,\), pickled objects, which are never loaded",
        ),
        (
            replaced("part/2.latent.npy", pickle.dumps(Bomb())),
            "2.latent.npy is no .* a pickle",
        ),
        (
            replaced("part/2.latent.npy", b"\x93NUMPY\1\0\1\0{" + bytes(100)),
            "part/2.latent.npy is no .npy file of numbers",
        ),
        (
            replaced("part/2.latent.npy", npy(np.full(SHAPE, np.nan, np.float32))),
            "a value that is no number in part/2.latent.npy",
        ),
    ],
)
def test_what_is_wrong_with_a_foreign_tar_is_named(tmp_path, files, problem, monkeypatch):
    monkeypatch.chdir(tmp_path)
    manifest, shard = foreign(tmp_path, files)
    problems = "; ".join(read_shard(tmp_path, shard, manifest).problems)
    assert re.search(problem, problems), problems
    assert not (tmp_path / "exploded").exists()


def test_a_damaged_foreign_tar_or_index_is_named(tmp_path):
    manifest, shard = foreign(tmp_path, good_files())
    data = (tmp_path / "a.tar").read_bytes()
    header = data.index(b"part/3.json")
    (tmp_path / "a.tar").write_bytes(data[:header] + b"X" + data[header + 1 :])
    problems = read_shard(tmp_path, shard, manifest).problems
    assert problems[0] == "its sha256 is not that of dataset.json"
    assert "has a damaged header after 6,144 bytes, behind 'part/2.cls.txt'" in problems
    (tmp_path / "a.tar").write_bytes(data[: header + 600])
    assert read_shard(tmp_path, shard, manifest).problems == [
        f"is cut off: has {header + 600} of {len(data)} bytes"
    ]
    (tmp_path / "a.tar").write_bytes(data)
    index = (tmp_path / "a.index.npy").read_bytes()
    (tmp_path / "a.index.npy").write_bytes(index[:-1] + b"\1")
    assert read_shard(tmp_path, shard, manifest).problems == [
        "the sha256 of its index a.index.npy is not that of dataset.json"
    ]
    (tmp_path / "a.index.npy").unlink()
    assert read_shard(tmp_path, shard, manifest).problems == [
        "its index a.index.npy cannot be read (No such file or directory)"
    ]
    pickled = json.dumps([1]).encode()
    (tmp_path / "a.index.npy").write_bytes(pickled)
    digest = hashlib.sha256(pickled).hexdigest()
    other = dataclasses.replace(shard, index_sha256=digest)
    (problem,) = read_shard(tmp_path, other, manifest).problems
    assert problem.startswith("its index a.index.npy is no array")


def test_labels_in_json_and_previews_are_read_where_the_index_says(tmp_path):
    files = [
        (name, json.dumps({"class": int(name[5]) - 1}).encode() if name.endswith("json") else data)
        for name, data in good_files()
    ]
    manifest, shard = foreign(tmp_path, files, labels=(0, 1, 2))
    members = dataclasses.replace(manifest.members, label="json:class")
    manifest = dataclasses.replace(manifest, members=members)
    assert read_shard(tmp_path, shard, manifest).problems == []
    samples = choose_samples(manifest)
    assert [sample.label for sample in samples] == [0, 1, 2]
    for scale, sample in enumerate(samples, start=1):
        expected = np.arange(60, dtype=np.float32).reshape(SHAPE) * scale
        np.testing.assert_array_equal(sample.latent.numpy(), expected)
