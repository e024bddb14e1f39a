"""Encoding says what it found and what it left out, keeps it, and goes on with what it began."""

import json
from collections import Counter

import pytest

from data_tools import inspect_dataset, verify_shards
from data_tools.encode_latents import main
from data_tools.encoding.settings import SETTINGS_NAME
from data_tools.errors import ConfigError
from data_tools.shards.manifest import MANIFEST_NAME, DatasetManifest
from data_tools.sources.inputs import open_source
from data_tools.sources.reading import Reading
from tests.support.encode_jobs import content, flags, make_pictures
from tests.support.image_inputs import make_tar


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return [p.read_bytes() for p in make_pictures(tmp_path_factory.mktemp("p"), 9).rglob("*.png")]


def write(folder, pictures, names):
    for name, data in zip(names, pictures, strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_what_is_left_out_is_said_before_encoding_and_kept_in_the_data_set(
    tmp_path, pictures, capsys
):
    clean = write(tmp_path / "clean", pictures, ["a/1.png", "a/2.png", "b/3.png"])
    full = write(tmp_path / "full", pictures, ["a/1.png", "a/2.png", "b/3.png"])
    (full / "b" / "4.HEIC").write_bytes(b"x")
    (full / ".cache").mkdir()
    main(flags(clean, tmp_path / "one"))
    capsys.readouterr()

    main(flags(full, tmp_path / "two"))
    said = capsys.readouterr().out.splitlines()

    line = "left out: .heic 1 (b/4.HEIC), hidden or system files 1 (.cache)"
    assert said[1:3] == ["images per class: a 2, b 1", line]
    one, two = (DatasetManifest.load(tmp_path / name) for name in ("one", "two"))
    assert [entry.kind for entry in two.left_out] == [".heic", "hidden or system files"]
    assert one.left_out == [] and one.hash == two.hash
    inspect_dataset.main([str(tmp_path / "two")])
    assert f"  {line.replace(':', '   ')}\n" in capsys.readouterr().out
    verify_shards.main(["--data", str(tmp_path / "two"), "--quick"])
    assert line.replace("left out:", "left out of it:") in capsys.readouterr().out


def test_a_set_of_before_left_out_files_were_kept_is_read_and_stays_as_it_is(tmp_path, pictures):
    folder = write(tmp_path / "photos", pictures, ["a/1.png", "b/2.png"])
    (folder / "notes.txt").write_text("x")
    main(flags(folder, tmp_path / "set"))
    stored = json.loads((tmp_path / "set" / MANIFEST_NAME).read_text())
    new_hash = DatasetManifest.load(tmp_path / "set").hash
    del stored["left_out"]
    (tmp_path / "set" / MANIFEST_NAME).write_text(json.dumps(stored, indent=1) + "\n")
    before = content(tmp_path / "set")

    main(flags(folder, tmp_path / "set"))

    assert content(tmp_path / "set") == before
    assert DatasetManifest.load(tmp_path / "set").hash == new_hash


def test_numbered_folders_that_were_begun_in_the_order_of_text_go_on_so(tmp_path, pictures, capsys):
    names = [f"{label}/x.png" for label in (0, 1, 2, 10)]
    folder = write(tmp_path / "photos", pictures, names)
    output = tmp_path / "set"
    main(flags(folder, output, **{"--shard-size": 2}))
    assert [entry.id for entry in DatasetManifest.load(output).classes] == ["0", "1", "2", "10"]
    former = open_source(str(folder)).with_former_labels()
    settings = json.loads((output / SETTINGS_NAME).read_text()) | {"source": former.fingerprint()}
    assert "reading" not in settings  # nor had earlier versions it
    for path in output.iterdir():
        path.unlink()
    (output / SETTINGS_NAME).write_text(json.dumps(settings))
    capsys.readouterr()

    main(flags(folder, output, **{"--shard-size": 2}))

    assert "in the order of text: the folder 10 is class 2\n" in capsys.readouterr().out
    assert [c.id for c in DatasetManifest.load(output).classes] == ["0", "1", "10", "2"]
    (output / "00001.tar").write_bytes(b"short")
    data = ("--data", str(output), "--input", str(folder))
    verify_shards.main([*data, "--repair"])


def test_a_repair_reads_the_input_as_the_flags_said(tmp_path, pictures):
    folder = write(tmp_path / "photos", pictures, ["a/x/1.png", "a/y/2.png", "b/x/3.png"])
    output = tmp_path / "set"
    main([*flags(folder, output, **{"--shard-size": 2}), "--class-from", "path"])
    before = content(output)
    assert [c.id for c in DatasetManifest.load(output).classes] == ["a/x", "a/y", "b/x"]
    (output / "00001.tar").unlink()

    verify_shards.main(["--data", str(output), "--input", str(folder), "--repair"])

    assert content(output) == before
    with pytest.raises(
        ConfigError, match=r"was begun with other settings: other names .* \(see the"
    ):
        main(flags(folder, output, **{"--shard-size": 2}))


def test_encoding_asks_once_whether_nearly_empty_classes_are_meant(tmp_path, pictures):
    members = [("0.cls", b"30"), ("0.png", pictures[0]), ("1.png", pictures[1]), ("1.cls", b"2")]
    tar = make_tar(tmp_path / "a.tar", members)

    with pytest.raises(ConfigError, match="29 of 31 classes have no image, only 2, 30 have;"):
        main(flags(tar, tmp_path / "set"))
    assert not (tmp_path / "set" / SETTINGS_NAME).exists()
    main([*flags(tar, tmp_path / "set"), "--allow-empty-classes"])
    main(flags(tar, tmp_path / "set"))

    counts = Counter(entry.count for entry in DatasetManifest.load(tmp_path / "set").classes)
    assert counts == {0: 29, 1: 2}


def test_a_joined_and_unsorted_tar_is_encoded_whole(tmp_path, pictures):
    half = make_tar(
        tmp_path / "half.tar",
        [(f"{i}.png", pictures[i]) for i in range(4)] + [(f"{i}.cls", b"%d" % i) for i in range(4)],
    ).read_bytes()
    (tmp_path / "all.tar").write_bytes(half + half)

    main(flags(tmp_path / "all.tar", tmp_path / "set"))

    assert [c.count for c in DatasetManifest.load(tmp_path / "set").classes] == [2] * 4


def test_a_class_whose_images_are_all_damaged_is_named_at_the_end(tmp_path, pictures, capsys):
    folder = write(tmp_path / "photos", pictures, ["a/1.png", "b/2.png"])
    (folder / "b" / "2.png").write_bytes(b"x")

    main(flags(folder, tmp_path / "set"))

    assert capsys.readouterr().out.endswith("b/2.png\n1 of 2 classes has no image: b\n")
    assert [entry.count for entry in DatasetManifest.load(tmp_path / "set").classes] == [1, 0]


def test_what_is_said_of_odd_names_stays_in_its_line(tmp_path, pictures, capsys):
    folder = write(tmp_path / "photos", pictures, ["a\nb/\x1b[31mred.png", "c/1.png"])
    (folder / "c" / "\x1b[2J.png").write_bytes(b"x")

    main(flags(folder, tmp_path / "set"))

    out = capsys.readouterr().out
    assert "images per class: a\\nb 1, c 2\n" in out and "skipped c/\\x1b[2J.png: is text\n" in out
    assert "\x1b" not in out


def test_labels_that_are_left_unread_are_pointed_at(tmp_path, pictures, capsys):
    flat = write(tmp_path / "flat", pictures, ["1.png", "2.png"])
    (flat / "dataset.json").write_text('{"labels": [["1.png", 0]')
    members = [("1.png", pictures[0]), ("1.json", b'{"label": 1}')]
    tar = make_tar(tmp_path / "0.tar", members)

    notes = [open_source(str(place)).notes for place in (flat, tar)]

    assert notes[0] == ['dataset.json is not used: it holds no {"labels": [[file, number], ...]}']
    assert notes[1] == [
        "add --label-suffix json:FIELD if a field of the .json files holds the class"
    ]
    assert not open_source(str(tar), reading=Reading(class_from="none")).notes
