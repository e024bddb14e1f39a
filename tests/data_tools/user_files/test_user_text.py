"""Lists, names of classes and configuration files as editors on any system save them."""

import codecs
import json
import shutil

import pytest

from data_tools.encode_latents import main
from data_tools.errors import ConfigError
from data_tools.index_shards import main as index_shards
from data_tools.sources.inputs import open_source, read_class_names
from data_tools.user_files.user_text import TextError, read_text, text_lines
from tests.support.encode_jobs import content, flags, make_pictures
from training.config.deepspeed_config import load_deepspeed_json
from training.config.preset import PRESET_FOLDER, load_preset
from training.config.tree import Config

WAYS = {
    "plain": lambda text: text.encode(),
    "mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "windows": lambda text: codecs.BOM_UTF8 + text.replace("\n", "\r\n").encode(),
    "utf-16": lambda text: text.replace("\n", "\r\n").encode("utf-16"),
    "utf-16 big": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "utf-32": lambda text: text.encode("utf-32"),
}


@pytest.fixture
def pictures(tmp_path):
    """The names of pictures in two folders, one of them with an umlaut and a blank."""
    folder = make_pictures(tmp_path / "photos", 6)
    (folder / "blue_cars").rename(folder / "blaue \u00c4utos")
    return sorted(path.relative_to(tmp_path).as_posix() for path in folder.rglob("*.png"))


def listed(pictures):
    return "".join(f"{path}\t{path.split('/')[1]}\n" for path in pictures)


def names(source):
    return [name.decode() for name in source.raw_names()]


@pytest.mark.parametrize("way", WAYS)
def test_a_list_is_the_same_whatever_editor_saved_it(tmp_path, pictures, way):
    path = tmp_path / "list.tsv"
    path.write_bytes(WAYS[way](listed(pictures)))
    found = open_source(str(path))
    assert names(found) == pictures
    assert [entry.id for entry in found.classes] == ["blaue \u00c4utos", "red_cars"]
    path = tmp_path / "LIST.TSV"
    path.write_bytes(listed(pictures).encode())
    assert open_source(str(path)).fingerprint() == found.fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        lambda line: line.replace("/", "\\"),
        lambda line: '"{}"\t"{}"'.format(*line.split("\t")),
        lambda line: "{}  \t{} ".format(*line.split("\t")),
        lambda line: ' "{}" \t {}'.format(*line.replace("/", "\\").split("\t")),
    ],
    ids=["backslashes", "quotes", "blanks at the ends", "all of them"],
)
def test_paths_of_a_list_may_be_written_as_on_windows(tmp_path, pictures, change):
    path = tmp_path / "list.tsv"
    path.write_text("".join(change(line) + "\n" for line in listed(pictures).splitlines()))
    found = open_source(str(path))
    assert names(found) == pictures
    assert [entry.id for entry in found.classes] == ["blaue \u00c4utos", "red_cars"]


def test_a_name_that_needs_no_mending_is_not_changed(tmp_path):
    odd = ['"quoted".png', "back\\slash.png", " blanks .png"]
    for name in odd:
        shutil.copy(__file__, tmp_path / name)
    for name in odd:
        (tmp_path / "list.txt").write_text(f"{name}\n")
        assert names(open_source(str(tmp_path / "list.txt"))) == [name]


def test_lines_of_a_list_may_be_written_in_several_ways(tmp_path, pictures):
    """As a table editor does, which writes quotes around some names only."""
    changes = [str, lambda name: f'"{name}"', lambda name: name.replace("/", "\\")]
    mixed = [changes[i % 3](name) for i, name in enumerate(pictures)]
    (tmp_path / "list.txt").write_text("".join(f"{name}\n" for name in mixed))
    assert names(open_source(str(tmp_path / "list.txt"))) == pictures


def test_a_missing_file_in_the_first_line_does_not_hide_the_others(tmp_path, pictures):
    path = tmp_path / "list.txt"
    lines = ["photos\\gone.png", *(name.replace("/", "\\") for name in pictures)]
    path.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(ConfigError, match=r"1 of 7 files do not exist \(photos/gone\.png\); bring"):
        main(flags(path, tmp_path / "set"))
    path.write_text("photos/gone.png 0\n" + "".join(f"{name} 1\n" for name in pictures))
    with pytest.raises(ConfigError, match="line 2: .* path and class are separated by a tab"):
        main(flags(path, tmp_path / "set"))


@pytest.mark.parametrize("name", ["~/photos/0.png", "$DATA/0.png"])
def test_a_list_says_that_its_names_stand_for_themselves(tmp_path, name):
    (tmp_path / "list.txt").write_text(f"{name}\n")
    with pytest.raises(ConfigError, match="stand for themselves in a list, without ~ and .NAME; "):
        main(flags(tmp_path / "list.txt", tmp_path / "set"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"{0} 0\n", "line 1: {0} 0: no such file; path and class are separated by a tab."),
        (b"{0},0\n", "line 1: {0},0: no such file; path and class are separated by a tab."),
        (b"{0}\t0\0\n", "is no text that can be read: line 1 holds a NUL byte; save it as UTF-8."),
        (b"C:\\photos\\0.jpg\t0\n", "line 1: C:\\photos\\0.jpg: is a path of Windows, and no such"),
        (b"\\\\server\\0.jpg\n", "line 1: \\\\server\\0.jpg: is a path of Windows, and no such"),
        (codecs.BOM_UTF16_LE + b"a\0b", "is no text that can be read: it is no whole utf-16; save"),
    ],
)
def test_what_is_wrong_with_a_list_is_said_in_one_sentence(tmp_path, pictures, text, sentence):
    (tmp_path / "list.txt").write_bytes(text.replace(b"{0}", pictures[0].encode()))
    with pytest.raises(ConfigError) as error:
        open_source(str(tmp_path / "list.txt"))
    message = str(error.value)
    assert message.startswith(f"--input {tmp_path}/list.txt: ") and "\n" not in message
    assert sentence.replace("{0}", pictures[0]) in message


def test_a_list_counts_labels_from_0_as_tars_do(tmp_path, pictures):
    (tmp_path / "list.tsv").write_text(f"{pictures[0]}\t-1\n{pictures[1]}\t0\n")
    with pytest.raises(
        ConfigError, match=r"list\.tsv: has the class number -1; labels count from 0"
    ):
        open_source(str(tmp_path / "list.tsv"))


def test_a_list_is_one_in_any_letters_and_other_files_are_not(tmp_path, pictures):
    (tmp_path / "LIST.TXT").write_text(f"{pictures[0]}\n")
    assert names(open_source(str(tmp_path / "LIST.TXT"))) == pictures[:1]
    with pytest.raises(
        ConfigError, match=r"is a file, and neither a list \(\.txt, \.tsv\) nor a tar"
    ):
        open_source(str(tmp_path / pictures[0]))
    for address in ("https://host/a.tar", "s3://bucket/photos", "pipe:cat a.tar"):
        with pytest.raises(ConfigError, match=f"^--input {address}: is an address; images are rea"):
            open_source(address)


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_a_table_given_as_a_list_is_told_what_a_list_is(tmp_path, suffix):
    (tmp_path / f"paths{suffix}").write_text("path,label\n")
    with pytest.raises(ConfigError, match=rf"a \{suffix} file is no list of images; write a \.tsv"):
        open_source(str(tmp_path / f"paths{suffix}"))


def test_the_same_command_goes_on_when_its_list_was_mended(tmp_path, pictures):
    path, output = tmp_path / "list.tsv", tmp_path / "set"
    path.write_text(listed(pictures).replace(pictures[3], "gone.png"))
    with pytest.raises(ConfigError, match=r"1 of 6 files do not exist \(gone\.png\); bring them"):
        main(flags(path, output))
    assert not output.exists()
    path.write_bytes(WAYS["utf-16"](listed(pictures)))
    main(flags(path, output))
    (output / "dataset.json").unlink()
    before = content(output)
    path.write_bytes(WAYS["windows"](listed(pictures)))
    main(flags(path, output))
    assert content(output).items() > before.items()


@pytest.mark.parametrize("way", WAYS)
def test_names_of_classes_and_configurations_are_read_whatever_editor_saved_them(tmp_path, way):
    classes = open_source(str(make_pictures(tmp_path / "photos", 6))).classes
    wanted = {"blue_cars": ("blue_cars", "\u00c4utos"), "red_cars": ("red_cars", "cars")}
    for name, text in (
        ("n.json", '{"blue_cars": "\u00c4utos", "red_cars": "cars"}'),
        ("n.tsv", "blue_cars\t\u00c4utos\nred_cars\tcars\n"),
    ):
        (tmp_path / name).write_bytes(WAYS[way](text))
        assert read_class_names(tmp_path / name, classes) == wanted
    zero = "ds_configs/zero2.json"
    (tmp_path / "zero2.json").write_bytes(WAYS[way](read_text(PRESET_FOLDER / ".." / ".." / zero)))
    assert load_deepspeed_json(tmp_path / "zero2.json")["zero_optimization"]["stage"] == 2
    (tmp_path / "s.yaml").write_bytes(WAYS[way](read_text(PRESET_FOLDER / "s.yaml")))
    assert isinstance(load_preset(str(tmp_path / "s.yaml")), Config)


def test_text_that_cannot_be_read_is_refused_with_its_place(tmp_path):
    path = tmp_path / "names.json"
    for data, sentence in (
        (b'{"a": "\xe4"}', "byte 7 is not utf-8; save it as UTF-8"),
        ('{"a": "b"}'.encode("utf-16-le"), "it holds NUL bytes; save it as UTF-8"),
    ):
        path.write_bytes(data)
        with pytest.raises(TextError, match=sentence):
            read_text(path)
        with pytest.raises(ConfigError, match=rf"^--class-names .*\({sentence}\); correct it\.$"):
            read_class_names(path, ())
    path.write_bytes(b"a\n\xe4\n")  # names of files may be any bytes
    assert list(text_lines(path)) == [b"a\n", b"\xe4\n"]


def test_class_names_of_other_tars_are_text_too(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes(b"\xff\xfea")
    argv = ["--input", str(tmp_path / "0.tar"), "--class-names", str(path)]
    argv += ["--array", "x.npy", "--vae", "data_tools/demo_vae"]
    with pytest.raises(ConfigError, match=r"^--class-names .*: is no text that can be read; give"):
        index_shards(argv)


def test_an_image_that_was_edited_after_encoding_is_named(tmp_path, capsys):
    images, output = make_pictures(tmp_path / "photos", 23), tmp_path / "set"
    main(flags(images, output))
    before = content(output)
    capsys.readouterr()
    main(flags(images, output))
    text = capsys.readouterr().out
    assert "finished before: nothing was encoded, the sizes of 23 of its 23 images were" in text
    edited = images / "red_cars" / "04.png"
    edited.write_bytes(edited.read_bytes() + b"0")
    main(flags(images, output))
    text = capsys.readouterr().out
    assert (
        "images edited since they were encoded, by the sizes of their files: 1 (red_cars/04.png); "
        "the shards hold the old pictures" in text
    )
    settings = json.loads((output / "encoding.json").read_text())
    settings["sizes"] = [(images / name).stat().st_size for name in sized(images, 5)]
    (output / "encoding.json").write_text(json.dumps(settings))
    main(flags(images, output))
    assert "the sizes of 5 of its 23 images were compared" in capsys.readouterr().out
    assert {k: v for k, v in content(output).items() if k != "encoding.json"} == {
        k: v for k, v in before.items() if k != "encoding.json"
    }


def sized(images, count):
    source = open_source(str(images))
    return [source.name(i * len(source) // count) for i in range(count)]
