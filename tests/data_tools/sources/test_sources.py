"""Where images come from: folders, lists, tars; what their classes are; what is refused."""

import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from data_tools.errors import ConfigError
from data_tools.sources.image_folders import scan_folder
from data_tools.sources.images import BadImageError
from data_tools.sources.inputs import open_source, read_class_names
from data_tools.sources.source import MAX_IMAGE_BYTES, Classes, FileSource, Names
from data_tools.sources.tar_images import scan_tar
from tests.support.image_inputs import described, make_tar, names, picture, save


def test_names_come_back_and_take_their_bytes_and_eight_more():
    wanted = [f"n{i % 1000:08d}/n{i:08d}.JPEG".encode() * (i != 5) for i in range(200_000)]
    found = Names(wanted)
    assert list(found) == wanted
    assert [found[i] for i in (0, 4, 5, 6, 199_999)] == [wanted[i] for i in (0, 4, 5, 6, 199_999)]
    assert found.blob.nbytes + found.ends.nbytes == sum(map(len, wanted)) + 8 * len(wanted)
    assert sys.getsizeof(wanted[0]) > 48  # what a Python string of this length takes
    assert list(Names()) == []


def test_class_folders_become_sorted_classes(tmp_path):
    for name in ("b/2.png", "b/1.JPEG", "a/deep/3.webp", "c d/x.png"):
        save(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "README.md").write_text("not an image")
    found = open_source(str(tmp_path))
    assert names(found) == ["a/deep/3.webp", "b/1.JPEG", "b/2.png", "c d/x.png"]
    assert found.labels.tolist() == [0, 1, 1, 2]
    assert described(found) == [(0, "a", 1), (1, "b", 2), (2, "c d", 1)]


def test_paths_are_in_the_order_of_the_whole_strings(tmp_path):
    paths = ["a/x.png", "a b/x.png", "a-b/x.png", "a.b/x.png", "ab/x.png", "a/b.png", "a/b/c.png"]
    paths += ["a/b-1.png", "é/x.png", "A/x.png"]
    for path in paths:
        save(tmp_path / path)
    found = scan_folder(tmp_path, "--input")
    assert names(found) == sorted(paths)
    assert [entry.id for entry in found.classes] == sorted({p.split("/")[0] for p in paths})


def test_the_fingerprint_is_that_of_a_simple_loop(tmp_path):
    for name in ("a/1.png", "b/1.png", "b/2.png"):
        save(tmp_path / name)
    digest = hashlib.sha256(b"a/1.png\t0\nb/1.png\t1\nb/2.png\t1\n")
    assert open_source(str(tmp_path)).fingerprint() == digest.hexdigest()


def test_sizes_are_of_images_everywhere_in_the_set():
    class Numbered(FileSource):
        def num_bytes(self, index):
            return index

    for count, wanted in ((2, [0, 1]), (3500, [i * 3500 // 64 for i in range(64)])):
        names = Names(b"%d.png" % i for i in range(count))
        numbered = Numbered("set", Path("set"), names, Classes.none(count))
        assert numbered.sizes(64) == wanted
        assert numbered.sizes() == list(range(count))


@pytest.mark.parametrize("kind", ["folder", "list", "tar"])
def test_sets_of_the_same_names_have_different_sizes(tmp_path, kind):
    for content in (picture(), picture() + b"0"):
        folder = tmp_path / str(len(content))
        save(folder / "0.png")
        (folder / "0.png").write_bytes(content)
        (folder / "list.txt").write_text("0.png\ngone.png\n")
        make_tar(folder / "tars" / "0.tar", [("0.png", content)])
        text = {"folder": folder, "list": folder / "list.txt", "tar": folder / "tars" / "0.tar"}
        source = open_source(str(text[kind]))
        assert source.read(0) == content
        assert source.sizes() == [len(content), *([-1] if kind == "list" else [])]


def test_class_folders_may_be_links_and_endless_ones_are_refused(tmp_path):
    save(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "cats").symlink_to(tmp_path / "elsewhere")
    assert names(scan_folder(tmp_path / "set", "--input")) == ["cats/1.png"]
    (tmp_path / "elsewhere" / "again").symlink_to(tmp_path / "set")
    with pytest.raises(ConfigError, match=r"^--input .*again: is a link to a folder above it"):
        scan_folder(tmp_path / "set", "--input")


def test_a_flat_folder_has_no_classes(tmp_path):
    save(tmp_path / "2.png")
    save(tmp_path / "1.png")
    found = scan_folder(tmp_path, "--input")
    assert (names(found), found.labels.tolist(), found.classes) == (["1.png", "2.png"], [0, 0], ())


def test_names_that_are_no_text_are_escaped_and_still_read(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(picture(7))
    found = scan_folder(tmp_path, "--input")
    assert found.name(0) == "caf\\xe9.png"
    assert found.read(0) == picture(7)
    assert len(found.fingerprint()) == 64


def test_wrong_folders_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match=r"^--input .*gone: does not exist; give a folder"):
        open_source(str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match=r"^--input .*: no image files \(\.avif, .*in it; give"):
        open_source(str(tmp_path))
    save(tmp_path / "loose.png")
    with pytest.raises(
        ConfigError, match=r"loose\.png: is a file, and neither a list .* give a folder"
    ):
        open_source(str(tmp_path / "loose.png"))
    save(tmp_path / "a" / "1.png")
    with pytest.raises(ConfigError, match=r"1 image lies beside class folders \(loose\.png, "):
        open_source(str(tmp_path))


@pytest.mark.parametrize("suffix", ["", ".tar", ".txt"])
def test_a_path_that_cannot_be_looked_at_is_refused_in_one_sentence(suffix):
    text = "n" * 300 + suffix
    with pytest.raises(ConfigError) as error:
        open_source(text)
    assert str(error.value).startswith(f"--input {text}: cannot be read (File name too long); give")


def test_braces_may_be_longer_than_a_path(tmp_path):
    for name in "ab":
        make_tar(tmp_path / f"{name * 140}.tar", labelled(0, 1))
    assert len(open_source(f"{tmp_path}/{{{'a' * 140},{'b' * 140}}}.tar")) == 2


@pytest.mark.parametrize(
    ("content", "labels", "classes"),
    [
        ("b/2.png\na/1.png\r\n\nb/2.png\n", [0, 0, 0], []),
        ("b/2.png\tdog\na/1.png\tcat\n", [1, 0], [(0, "cat", 1), (1, "dog", 1)]),
        (
            "b/2.png\t003\na/1.png\t1\n",
            [3, 1],
            [(0, "0", 0), (1, "1", 1), (2, "2", 0), (3, "3", 1)],
        ),
    ],
)
def test_a_list_keeps_its_order_and_its_numbers(tmp_path, content, labels, classes):
    save(tmp_path / "a" / "1.png", 1)
    save(tmp_path / "b" / "2.png", 2)
    (tmp_path / "list.tsv").write_bytes(content.encode())
    found = open_source(str(tmp_path / "list.tsv"))
    assert found.labels.tolist() == labels and described(found) == classes
    assert found.read(0) == picture(2) and found.read(1) == picture(1)


def test_a_list_may_name_files_anywhere_but_only_files(tmp_path):
    save(tmp_path / "there" / "1.png", 9)
    (tmp_path / "lists").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    lines = [tmp_path / "there" / "1.png", "../there/1.png", "/dev/zero", "../pipe.png", "../there"]
    lines.append("gone.png")
    (tmp_path / "lists" / "l.txt").write_text("".join(f"{line}\n" for line in lines))
    found = open_source(str(tmp_path / "lists" / "l.txt"))
    assert found.read(0) == found.read(1) == picture(9)
    for index in (2, 3, 4):
        with pytest.raises(BadImageError, match="is no file"):
            found.read(index)
    with pytest.raises(FileNotFoundError):
        found.read(5)


def test_a_file_of_a_senseless_size_is_not_read(tmp_path):
    with (tmp_path / "1.png").open("wb") as file:
        file.truncate(MAX_IMAGE_BYTES + 1)  # sparse
    with pytest.raises(BadImageError, match="has 1,073,741,825 bytes, more than 1,073,741,824"):
        open_source(str(tmp_path)).read(0)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "names no images; write a path per line."),
        ("a.png\tx\ty\n", "line 1 is no path, or path, tab and class; correct it."),
        ("a.png\n\tx\n", "line 2 is no path"),
        ("a.png\tcat\nb.png\n", "1 of 2 lines name no class; name one in every line, or in none."),
        ("a.png\t1000000\n", "has a class number above 999,999, which seems to be something else"),
        ("a.png\t" + "9" * 5000 + "\n", "has a class number above 999,999, which seems"),
    ],
)
def test_wrong_lists_are_refused_in_one_sentence(tmp_path, content, sentence):
    (tmp_path / "list.txt").write_text(content)
    with pytest.raises(ConfigError) as error:
        open_source(str(tmp_path / "list.txt"))
    assert sentence in str(error.value) and "\n" not in str(error.value)


def labelled(first, count):
    for i in range(first, first + count):
        yield f"{i:06d}.cls", str(i % 3).encode()
        yield f"{i:06d}.jpg", picture(i)
        yield f"{i:06d}.json", b"{}"


def test_tars_are_read_as_webdataset_reads_them(tmp_path):
    for part in range(3):
        make_tar(tmp_path / f"{part:03d}.tar", labelled(5 * part, 5))
    found = open_source(str(tmp_path / "{000..002}.tar"))
    assert names(found) == [f"{i // 5:03d}.tar/{i:06d}.jpg" for i in range(15)]
    urls = [str(tmp_path / f"{part:03d}.tar") for part in range(3)]
    for index, sample in enumerate(wds.WebDataset(urls, shardshuffle=False)):
        assert found.read(index) == sample["jpg"]
        assert found.labels[index] == int(sample["cls"])
    assert described(found) == [(0, "0", 5), (1, "1", 5), (2, "2", 5)]
    assert open_source(str(tmp_path)).fingerprint() == found.fingerprint()
    assert len(open_source(str(tmp_path / "001.tar"))) == 5


def test_several_tars_are_named_by_wildcards_by_words_or_by_their_folder(tmp_path):
    folder = tmp_path / "photos, {2024} [v1]"
    for k in range(3):
        make_tar(folder / f"train_{k}a{k}.tar", labelled(2 * k, 2))
    wanted = open_source(str(folder)).fingerprint()

    assert len(open_source(str(folder))) == 6
    assert open_source(*map(str, sorted(folder.iterdir()))).fingerprint() == wanted
    assert open_source(str(folder / "train_1a1.tar")).raw_name(0).startswith(b"train_1a1.tar/")
    folder = folder.rename(tmp_path / "plain")
    for text in ("*.tar", "train_?a?.tar", "train_{0..2}a[0-2].tar"):
        assert open_source(f"{folder}/{text}").fingerprint() == wanted
    with pytest.raises(ConfigError, match="nothing is called so, and nothing matches"):
        open_source(f"{folder}/x*.tar")
    with pytest.raises(
        ConfigError, match="names 2 files and folders, such as .*, and only tars ca"
    ):
        open_source(str(folder / "train_1a1.tar"), str(tmp_path))
    with pytest.raises(ConfigError, match="/my does not exist; a path with blanks needs quotes"):
        open_source(str(tmp_path / "my"), "photos")
    with pytest.raises(ConfigError, match="^--input: is empty; name a file"):
        open_source("")


def test_tars_without_labels_have_their_folders_as_classes_or_none(tmp_path):
    flat = make_tar(tmp_path / "flat.tar", [("./b.PNG", picture()), ("a.webp", picture())])
    found = open_source(str(flat))
    assert (found.classes, names(found)) == ((), ["flat.tar/b.PNG", "flat.tar/a.webp"])
    tree = [("dog/1.png", picture(1)), ("./cat/1.jpeg", picture(2)), ("cat/x/2.png", picture(3))]
    found = open_source(str(make_tar(tmp_path / "tree.tar", tree)))
    assert described(found) == [(0, "cat", 2), (1, "dog", 1)]
    assert found.labels.tolist() == [1, 0, 0]


def test_long_names_and_hostile_ones_only_name_samples(tmp_path):
    hostile = ["../../evil.jpg", "/etc/evil.jpg", "x" * 300 + ".jpg", "é.jpg"]
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name in hostile:
            info = tarfile.TarInfo(name)
            info.size = len(picture())
            tar.addfile(info, io.BytesIO(picture()))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    index = scan_tar(tmp_path / "a.tar")
    assert [name.decode() for name in index.names] == hostile
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_indexes_of_tars_are_kept_until_the_tar_changes(tmp_path, monkeypatch):
    path, cache = make_tar(tmp_path / "a.tar", labelled(0, 4)), tmp_path / "out" / "cache"
    scanned = []
    original = scan_tar
    monkeypatch.setattr(
        "data_tools.sources.image_tars.scan_tar",
        lambda path, how: scanned.append(path) or original(path),
    )
    first = open_source(str(path), cache=cache)
    second = open_source(str(path), cache=cache)
    assert len(scanned) == 1 and first.fingerprint() == second.fingerprint()
    assert second.read(2) == picture(2)
    (stored,) = cache.iterdir()
    stored.write_bytes(stored.read_bytes()[:100])
    assert len(open_source(str(path), cache=cache)) == 4 and len(scanned) == 2
    make_tar(path, labelled(0, 6))
    assert len(open_source(str(path), cache=cache)) == 6 and len(scanned) == 3


def test_an_index_that_another_process_takes_away_while_it_is_written_is_not_missed(
    tmp_path, monkeypatch
):
    path, cache = make_tar(tmp_path / "a.tar", labelled(0, 4)), tmp_path / "out" / "cache"
    monkeypatch.setattr("numpy.savez", lambda file, **arrays: shutil.rmtree(cache))

    assert len(open_source(str(path), cache=cache)) == 4
    assert not cache.exists()


def cut(path, end):
    path.write_bytes(path.read_bytes()[:end])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda p: cut(p, 5 * 1024), "is cut off or damaged after"),  # between two members
        (lambda p: cut(p, 5 * 1024 + 100), "has a damaged header after 5,120 bytes"),
        (
            lambda p: cut(p, 1024 + 600),
            "is cut off inside or behind '000000.jpg' (unex",
        ),
        (lambda p: p.write_bytes(b""), "is empty; copy it again."),
        (
            lambda p: p.write_bytes(b"\x1f\x8b" * 600),
            "is compressed with gzip, so that",
        ),
        (lambda p: p.unlink(), "does not exist (1 of 1 tars); give tars that are there."),
        (
            lambda p: make_tar(p, [("a.txt", b"")]),
            "in its 1 tar; left out: .txt 1 (a.tar/a.txt);",
        ),
        (
            lambda p: make_tar(p, [("a.cls", b"cat"), ("a.jpg", b"x")]),
            "a.cls holds 'cat', which is no number of a class; write the label into it.",
        ),
        (
            lambda p: make_tar(p, [("a.cls", b"1"), ("a.jpg", b"x"), ("b.jpg", b"x")]),
            "1 of 2 images (a.tar/b.jpg, ...) have no .cls; give every sample one, or none.",
        ),
        (
            lambda p: make_tar(p, [("a.jpg", b"x"), ("a.png", b"x")]),
            "a.jpg and a.png are one sample; leave one image per sample, or say with --image-suf",
        ),
        (
            lambda p: make_tar(p, [("a.jpg", b"x"), ("a.jpg", b"y")]),
            "holds a.jpg twice; leave one, or rename it.",
        ),
        (
            lambda p: make_tar(p, [("cat/a.jpg", b"x"), ("b.png", b"x")]),
            "1 of 2 images lie in no folder of their tar; give",
        ),
    ],
)
def test_damaged_and_unclear_tars_are_refused_in_one_sentence(tmp_path, damage, sentence):
    path = make_tar(tmp_path / "a.tar", labelled(0, 4))
    damage(path)
    with pytest.raises(ConfigError) as error:
        open_source(str(path))
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith("--input ")


def test_one_flipped_byte_of_a_header_is_seen(tmp_path):
    path = make_tar(tmp_path / "a.tar", labelled(0, 4))
    data = bytearray(path.read_bytes())
    data[5 * 1024 + 20] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"header after 5,120 bytes, behind '000001\.jpg'; copy"):
        open_source(str(path))


def test_a_tar_that_shrinks_meanwhile_is_named(tmp_path):
    path = make_tar(tmp_path / "a.tar", labelled(0, 4))
    found = open_source(str(path))
    cut(path, 1024 + 512 + 20)
    with pytest.raises(ConfigError, match=r"a\.tar: became shorter since its headers were read"):
        found.read(0)


def test_wrong_braces_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"its braces are wrong .*; write .* or \{000\.\.146\}"):
        open_source(str(tmp_path / "{0..3.tar"))


def source_of(*ids):
    classes = tuple(
        type("Class", (), {"index": i, "id": name, "count": 1})() for i, name in enumerate(ids)
    )
    return FileSource("x", ".", Names([b"a"] * len(ids)), Classes(np.arange(len(ids)), classes))


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("n.json", '{"n01": "tench", "n02": "shark"}', ("n01", "tench")),
        ("n.json", '{"n01": ["fish", "tench"], "n02": "shark"}', ("fish", "tench")),
        ("n.tsv", "n01\ttench, Tinca\n\nn02\tshark\nn99\tunused\n", ("n01", "tench, Tinca")),
    ],
)
def test_class_names_give_ids_and_names(tmp_path, name, content, wanted):
    (tmp_path / name).write_text(content)
    found = read_class_names(tmp_path / name, source_of("n01", "n02").classes)
    assert (found["n01"], found["n02"]) == (wanted, ("n02", "shark"))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read (No such file or directory); give a JSON or TSV file."),
        ("{", "is no JSON object and no lines of id, tab, name (Expecting"),
        ('["a"]', "is JSON and no object; write {id: name} or {id: [id, name]}."),
        ("{}", "names 0 of the 2 classes and not 'n01'; add the others."),
        ('{"0": "x"}', "names '0', ..., while the input calls its classes 'n01', ...; write the"),
        ('{"n01": "x"}', "names 1 of the 2 classes and not 'n02'; add the others."),
        ('{"n01": 3, "n02": "x"}', "'n01' has 3; write a name, or [id, name]."),
        ('{"n01": ["a", "x"], "n02": ["a", "y"]}', "two classes get the id 'a'; correct it."),
    ],
)
def test_wrong_class_names_are_refused_in_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "names.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as error:
        read_class_names(path, source_of("n01", "n02").classes)
    assert str(error.value).startswith(f"--class-names {path}: ") and sentence in str(error.value)
    (tmp_path / "names.tsv").write_text("n01 tench")
    with pytest.raises(ConfigError, match=r"tab, name \(line 1 has no tab\); correct it"):
        read_class_names(tmp_path / "names.tsv", source_of("n01").classes)


def test_imagenets_index_of_classes_is_understood(tmp_path):
    (tmp_path / "index.json").write_text(json.dumps({"0": ["n01440764", "tench"]}))
    names = read_class_names(tmp_path / "index.json", source_of("0").classes)
    assert names == {"0": ("n01440764", "tench")}
