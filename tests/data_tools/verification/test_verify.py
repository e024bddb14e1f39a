"""Verification: damage is named, a quick look finds what it can; reports and previews."""

import dataclasses
import hashlib
import io
import json
import re
import shutil
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data_tools.errors import ConfigError
from data_tools.shards.manifest import MANIFEST_NAME
from data_tools.shards.records import RecordLayout, Sample
from data_tools.verification.verify import verify
from data_tools.verify_shards import main
from tests.support.damage import (
    SHARD,
    change_label,
    change_npy_header,
    copy_shard,
    cut,
    edit,
    flip_header,
    flip_value,
    layout_of,
    lengthen,
    overwrite,
)
from tests.support.launch import run
from tests.support.synthetic import make_dataset


def check(folder, is_quick=False):
    return verify(folder, is_quick=is_quick, num_workers=2)


def found(folder, is_quick=False):
    result = check(folder, is_quick)
    return [(f.part, f.name, f.what) for f in result.findings if f.part != "note"]


@pytest.fixture
def folder(demo_latents, tmp_path):
    """A copy of an encoded set: 80 samples of 10 classes in 5 shards, with sidecars."""
    shutil.copytree(demo_latents, tmp_path / "set")
    return tmp_path / "set"


def flip_key(folder):
    overwrite(folder / SHARD, 3 * layout_of(folder).stride + 2, b"9")


def write_values(value):
    def apply(folder):
        layout = layout_of(folder)
        place = 5 * layout.stride + layout.moments_offset + 512 + len(layout.npy_header) + 100
        overwrite(folder / SHARD, place, np.float16(value).tobytes())

    return apply


def with_true_checksum(damage):
    """As if it had been encoded like this: only looking at the content tells."""

    def apply(folder):
        damage(folder)
        data = (folder / SHARD).read_bytes()

        def correct(shard):
            shard.update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))

        edit(folder / MANIFEST_NAME, lambda content: correct(content["shards"][1]))
        edit((folder / SHARD).with_suffix(".json"), lambda content: correct(content["shard"]))

    return apply


def insert_member(folder):
    """Append before the end marker: the tar's size, a multiple of 10 KiB, stays the same."""
    stolen = folder / "note.txt"
    stolen.write_text("hello")
    with tarfile.open(folder / SHARD, "a") as tar:
        tar.add(stolen, "00000001.txt")
    stolen.unlink()


def twist_to_directory(folder):
    (folder / SHARD).unlink()
    (folder / SHARD).mkdir()


SHARD_DAMAGE = [
    ("missing", lambda f: (f / SHARD).unlink(), "is missing", "is missing"),
    ("no file", twist_to_directory, "cannot be read", "cannot be read|is no file"),
    ("cut", cut, r"is cut off, after sample 2: has \d+ of \d+ bytes", "is cut off: has"),
    ("longer", lengthen, r"has \d+ bytes, dataset.json says \d+", r"has \d+ bytes, dataset"),
    ("header", flip_header, "is not that .*; holds a damaged header in sample 3$", None),
    ("key", flip_key, "is not that .*; holds a damaged header in sample 3$", None),
    ("value", flip_value(True), "header is sound: values of mirrored images or padding were", None),
    ("value", flip_value(False), "header is sound: values were changed$", None),
    ("dtype", change_npy_header, "an array that is no float16 8x16x16 in sample 3", None),
    ("label", change_label(b"7"), "header is sound: labels were changed$", None),
    ("no label", change_label(b"x"), "holds a label that is not a number in sample 3", None),
    ("high label", change_label(b"99"), "holds a label beyond the 10 classes in sample 3", None),
    ("replaced", copy_shard("00003.tar"), "^holds the bytes of 00003.tar$", "as 00003.tar should"),
    (
        "extra member",
        insert_member,
        "'00000001.txt', which is no part of a sample",
        "goes on after",
    ),
    (
        "NaN",
        with_true_checksum(write_values(np.nan)),
        r"^holds a value that is no number \(moments.npy\) in sample 5$",
        None,
    ),
    ("infinity", with_true_checksum(write_values(-np.inf)), "no number .* in sample 5$", None),
]


@pytest.mark.parametrize(
    ("damage", "full", "quick"), [d[1:] for d in SHARD_DAMAGE], ids=[d[0] for d in SHARD_DAMAGE]
)
def test_a_damaged_shard_is_named_with_its_damage(folder, damage, full, quick):
    damage(folder)

    [(part, name, what)] = found(folder)
    assert (part, name) == ("shard", SHARD)
    assert re.search(full, what)

    quickly = found(folder, is_quick=True)
    assert bool(quickly) == (quick is not None)
    if quick:
        [(part, name, what)] = quickly
        assert (part, name) == ("shard", SHARD)
        assert re.search(quick, what)


def change_manifest(change):
    return lambda folder: edit(folder / MANIFEST_NAME, change)


def change_sidecar(change):
    return lambda folder: edit((folder / SHARD).with_suffix(".json"), change)


OTHER_DAMAGE = [
    (
        "wrong mean",
        change_manifest(lambda c: c["statistics"]["mean"].__setitem__(2, 0.5)),
        ("manifest", MANIFEST_NAME, "statistics.mean[2] is 0.5, the shards give "),
        False,
    ),
    (
        "wrong std, and only in the fifth decimal",
        change_manifest(
            lambda c: c["statistics"]["std"].__setitem__(0, c["statistics"]["std"][0] + 1e-5)
        ),
        ("manifest", MANIFEST_NAME, "statistics.std[0] is "),
        False,
    ),
    (
        "statistics of too few channels",
        change_manifest(lambda c: c["statistics"]["std"].pop()),
        ("manifest", MANIFEST_NAME, "statistics.std has 3 channels, the shards 4"),
        False,
    ),
    (
        "wrong count",
        change_manifest(lambda c: c["classes"][4].update(count=9)),
        ("manifest", MANIFEST_NAME, "class 'food' counts 9, the shards hold 8"),
        True,
    ),
    (
        "not JSON",
        lambda folder: (folder / MANIFEST_NAME).write_text("{"),
        ("manifest", MANIFEST_NAME, "is not JSON"),
        True,
    ),
    (
        "no manifest",
        lambda folder: (folder / MANIFEST_NAME).unlink(),
        ("manifest", MANIFEST_NAME, "no dataset.json"),
        True,
    ),
    (
        "inconsistent manifest",
        change_manifest(lambda c: c.update(num_samples=81)),
        ("manifest", MANIFEST_NAME, "num_samples is 81, the shards hold 80"),
        True,
    ),
    (
        "no sidecar",
        lambda folder: (folder / "00001.json").unlink(),
        ("sidecar", "00001.json", "is missing"),
        True,
    ),
    (
        "sidecar that is not JSON",
        lambda folder: (folder / "00001.json").write_text("{"),
        ("sidecar", "00001.json", "is no sidecar"),
        True,
    ),
    (
        "sidecar of another shard",
        lambda folder: shutil.copy(folder / "00000.json", folder / "00001.json"),
        ("sidecar", "00001.json", "disagrees with dataset.json on name, sha256, first_key"),
        True,
    ),
    (
        "wrong sum in a sidecar",
        change_sidecar(lambda c: c["totals"]["channel_sum"].__setitem__(0, 1.0)),
        ("sidecar", "00001.json", "its channel_sum is not that of the shard"),
        False,
    ),
    (
        "wrong count in a sidecar",
        change_sidecar(lambda c: c["totals"]["class_counts"].update({"0": 99})),
        ("sidecar", "00001.json", "counts other labels than the shard holds"),
        False,
    ),
]


@pytest.mark.parametrize(
    ("damage", "expected", "quick"),
    [d[1:] for d in OTHER_DAMAGE],
    ids=[d[0] for d in OTHER_DAMAGE],
)
def test_damage_of_the_small_files_is_named(folder, damage, expected, quick):
    damage(folder)

    [(part, name, what)] = found(folder)
    assert (part, name) == expected[:2]
    assert what.startswith(expected[2])
    assert bool(found(folder, is_quick=True)) == quick


def test_an_intact_set_is_intact(folder):
    assert found(folder) == found(folder, is_quick=True) == []
    result = check(folder)
    assert ("no sample twice", "80 keys") in result.checked
    assert ("samples per class", "10 of 10 classes") in result.checked


def test_a_shard_that_dataset_json_describes_wrongly_is_named(folder):
    """A shard that was exchanged with its sidecar, and a count of samples that is too low."""
    edit(folder / MANIFEST_NAME, lambda c: c["shards"][1].update(num_samples=15))
    edit(folder / MANIFEST_NAME, lambda c: c.update(num_samples=79))
    (part, name, what), *_ = found(folder)
    assert (part, name, what) == ("shard", SHARD, "holds more than 15 samples")


def test_samples_that_occur_twice_are_found(tmp_path):
    manifest = make_dataset(
        tmp_path, [3, 4], moments=lambda i, flip=False: np.zeros((8, 4, 4), "f2")
    )
    layout = RecordLayout((8, 4, 4), has_flip=True)
    array = np.zeros((8, 4, 4), np.float16)
    with (tmp_path / "00001.tar").open("wb") as file:
        layout.write(file, [Sample(key, key % 3, array, array) for key in (3, 2, 1, 6)])
    digest = hashlib.sha256((tmp_path / "00001.tar").read_bytes()).hexdigest()
    edit(tmp_path / MANIFEST_NAME, lambda c: c["shards"][1].update(sha256=digest))
    assert manifest.num_samples == 7
    assert ("shard", "00001.tar", "repeats sample 00000001 of 00000.tar and 1 more") in found(
        tmp_path
    )


def test_sums_are_those_of_the_definition(folder):
    """Against a slow reading by tarfile and plain numpy."""
    result = check(folder)
    for shard in result.manifest.shards:
        means, squares, labels = [], [], []
        with tarfile.open(folder / shard.name) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if member.name.endswith(".moments.npy"):
                    mean, log_variance = np.split(
                        np.load(io.BytesIO(file.read())).astype(np.float64), 2
                    )
                    means.append(mean.sum((1, 2)))
                    squares.append((mean**2 + np.exp(log_variance)).sum((1, 2)))
                elif member.name.endswith(".cls"):
                    labels.append(int(file.read()))
        content = result.contents[shard.name]
        totals = content.totals
        np.testing.assert_allclose(totals.channel_sum, sum(means), rtol=1e-12, atol=1e-9)
        np.testing.assert_allclose(totals.channel_square_sum, sum(squares), rtol=1e-12)
        assert totals.class_counts == {str(k): n for k, n in Counter(labels).items()}
        assert content.num_samples == shard.num_samples == len(labels)


def test_the_report_says_what_was_checked_found_and_to_do(folder, tmp_path, capsys):
    main(["--data", str(folder), "--report", str(tmp_path / "report.txt")])
    text = capsys.readouterr().out
    assert text.endswith("\nintact\n") and "80 samples in 5 shards" in text
    cut(folder)
    (folder / "00003.tar").unlink()
    (folder / "other.tar").touch()
    with pytest.raises(ConfigError) as error:
        main(["--data", str(folder), "--report", str(tmp_path / "report.txt")])
    assert str(error.value) == (
        f"--data {folder}: 2 of 5 shards are damaged: 00001.tar, 00003.tar; do what the report "
        f"{tmp_path / 'report.txt'} says."
    )
    text = capsys.readouterr().out
    assert "00001.tar  is cut off, after sample 2" in text
    assert "00003.tar  is missing" in text
    assert "other.tar  is not in dataset.json" in text
    assert f"--data {folder} --repair --input IMAGES" in text
    assert len(text.splitlines()) < 40
    assert (tmp_path / "report.txt").read_text().splitlines()[1:] == text.splitlines()[1:]


def test_a_page_holds_the_report_of_a_thousand_missing_shards(tmp_path, capsys):
    make_dataset(tmp_path, [1])
    shard = json.loads((tmp_path / MANIFEST_NAME).read_text())["shards"][0]
    shards = [shard | {"name": f"{i:05d}.tar"} for i in range(1000)]
    edit(tmp_path / MANIFEST_NAME, lambda c: c.update(shards=shards, num_samples=1000))
    with pytest.raises(
        ConfigError, match=r"999 of 1000 shards are damaged: 00001\.tar, .* 987 more"
    ):
        main(["--data", str(tmp_path), "--quick", "--report", str(tmp_path / "all.txt")])
    assert len(capsys.readouterr().out.splitlines()) < 60
    assert (tmp_path / "all.txt").read_text().count("is missing") == 999 + 1  # and encoding.json


@pytest.mark.processes
def test_the_command_exits_with_two_and_names_the_shard(folder):
    flip_value(True)(folder)
    output = run("python", "data_tools/verify_shards.py", "--data", folder, expect=2)
    assert f"error: --data {folder}: 1 of 5 shards is damaged: {SHARD}; do what" in output
    assert "Traceback" not in output


def test_a_preview_shows_every_class_and_leaves_damaged_shards_out(folder, tmp_path, capsys):
    cut(folder)
    (folder / "00003.tar").unlink()
    with pytest.raises(ConfigError):
        main(["--data", str(folder), "--preview", str(tmp_path / "p" / "all.png")])
    assert "all.png: 4" in capsys.readouterr().out  # of the 48 samples in whole shards
    with Image.open(tmp_path / "p" / "all.png") as picture:
        picture.load()
    other = shutil.copytree(folder, tmp_path / "other")
    edit(other / MANIFEST_NAME, lambda c: c["vae"].update(sha256="0" * 64))
    with pytest.raises(ConfigError, match="are not those that encoded the data"):
        main(["--data", str(other), "--preview", str(tmp_path / "wrong.png")])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--data", "nowhere"], "--data nowhere: does not exist; make it"),
        (["--data", "x", "--quick", "--repair"], "--repair: needs to read every byte first"),
        (["--data", "x", "--input", "y"], "--input: serves --repair only"),
        (["--data", "x", "--workers", "0"], "--workers must be at least 1, not 0"),
    ],
)
def test_wrong_flags_are_refused_in_one_sentence(flags, sentence):
    with pytest.raises(ConfigError) as error:
        main(flags)
    assert str(error.value).startswith(sentence)


def test_a_report_that_cannot_be_written_is_one_sentence(folder, tmp_path):
    with pytest.raises(ConfigError, match="--report .*: cannot be written .*; name another file"):
        main(["--data", str(folder), "--quick", "--report", str(tmp_path)])


def test_dataclasses_stay_serialisable(folder):
    """The findings are plain values, for whoever wants to print them otherwise."""
    flip_value(True)(folder)
    assert json.dumps([dataclasses.asdict(f) for f in check(folder).findings])
