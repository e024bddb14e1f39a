"""Which files of an input are images, which class each has, and what is said of the others."""

import hashlib
import json
import random
import tarfile

import pytest

from data_tools.encoding.input_summary import refuse_mostly_empty, summary
from data_tools.errors import ConfigError
from data_tools.sources.inputs import open_source
from data_tools.sources.reading import Reading
from tests.support.image_inputs import described, make_tar, names, picture, save


def left_out(source):
    return {entry.kind: entry.count for entry in source.left_out}


def sentence_of(text, **reading):
    with pytest.raises(ConfigError) as error:
        refuse_mostly_empty(open_source(str(text), reading=Reading(**reading)))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_hidden_and_system_folders_are_no_classes_and_are_said(tmp_path):
    for path in ("cat/1.png", "dog/2.png", ".ipynb_checkpoints/1.png", "__MACOSX/cat/._1.png"):
        save(tmp_path / path)
    for path in ("@eaDir/1.png/thumb.png", "cat/._1.png", "dog/.thumbs/2.png"):
        save(tmp_path / path)

    found = open_source(str(tmp_path))

    assert names(found) == ["cat/1.png", "dog/2.png"]
    assert left_out(found) == {"hidden or system files": 5}
    assert summary(found)[-1].startswith(
        "left out: hidden or system files 5 (.ipynb_checkpoints, @eaDir, __MACOSX, ...)"
    )


def test_hidden_members_of_tars_are_left_out_too(tmp_path):
    members = [("./cat/1.png", b"x"), ("./cat/._1.png", b"x"), ("__MACOSX/cat/1.png", b"x")]
    make_tar(tmp_path / "a.tar", members)
    (tmp_path / "._a.tar").write_bytes(b"apple double")

    found = open_source(str(tmp_path))

    assert names(found) == ["a.tar/cat/1.png"]
    assert left_out(found) == {"hidden or system files": 3}


SUFFIXES = ["jpg", "JPEG", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "TIFF", "ppm"]
SUFFIXES += ["pgm", "pbm", "pnm", "avif"]


def test_folders_and_tars_know_the_same_images_and_count_the_others(tmp_path):
    files = [f"{i:02d}.{suffix}" for i, suffix in enumerate(SUFFIXES)]
    files += ["IMG.2020.01.jpg", "a.HEIC", "b.heic", "da39a3ee", "notes.txt", "x.d41d8cd98f00b204"]
    for name in files:
        save(tmp_path / "folder" / "a" / name)
    make_tar(tmp_path / "tars" / "t.tar", [(f"a/{name}", picture()) for name in files])

    folder, tar = (open_source(str(tmp_path / name)) for name in ("folder", "tars"))

    wanted = [f"a/{name}" for name in sorted(files[: len(SUFFIXES) + 1])]
    assert names(folder) == wanted
    assert sorted(names(tar)) == [f"t.tar/{name}" for name in wanted]
    assert left_out(folder) == left_out(tar)
    assert left_out(folder) == {".heic": 2, "files without a suffix": 2, ".txt": 1}


def test_a_folder_without_any_image_says_what_is_in_it(tmp_path):
    for name in ("1.HEIC", "2.HEIC"):
        save(tmp_path / "a" / name)

    assert "in it; left out: .heic 2 (a/1.HEIC, a/2.HEIC); give a folder" in sentence_of(tmp_path)


@pytest.mark.parametrize(
    "order",
    [
        "0.jpg 1.jpg 2.jpg 0.cls 1.cls 2.cls",
        "0.cls 1.cls 2.cls 0.jpg 1.jpg 2.jpg",
        "0.jpg 2.cls 1.jpg 1.cls 0.cls 2.jpg",
        "./0.jpg ./2.cls 1.jpg 1.cls 0.cls 2.jpg",
    ],
)
def test_labels_are_found_wherever_they_stand_in_their_tar(tmp_path, order):
    members = [
        (name, b"%d" % (int(name.removeprefix("./")[0]) + 1) if name.endswith("cls") else b"x")
        for name in order.split()
    ]

    found = open_source(str(make_tar(tmp_path / "a.tar", members)))

    assert names(found) == [f"a.tar/{i}.jpg" for i in range(3)]
    assert found.labels.tolist() == [1, 2, 3]


def test_labels_stay_with_their_images_where_joined_tars_use_the_same_names(tmp_path):
    halves = []
    for shift in (0, 3):
        members = [(f"{i}.jpg", picture(shift + i)) for i in range(3)]
        members += [(f"{i}.cls", b"%d" % (shift + i)) for i in range(3)]
        halves.append(make_tar(tmp_path / f"{shift}.tar", members).read_bytes())
    (tmp_path / "joined").mkdir()
    (tmp_path / "joined" / "all.tar").write_bytes(b"".join(halves))

    found = open_source(str(tmp_path / "joined"))

    assert found.labels.tolist() == list(range(6))
    assert [found.read(i) for i in range(6)] == [picture(i) for i in range(6)]


def test_masks_stay_with_their_images_where_joined_tars_use_the_same_names(tmp_path):
    members = [(f"{i}.{s}", picture(i)) for i in range(3) for s in ("jpg", "seg.png")]
    half = make_tar(tmp_path / "half.tar", members).read_bytes()
    (tmp_path / "joined.tar").write_bytes(half + half)

    found = open_source(str(tmp_path / "joined.tar"))

    assert names(found) == 2 * [f"joined.tar/{i}.jpg" for i in range(3)]
    assert left_out(found) == {".seg.png beside the image of its key": 6}


def test_labels_without_an_image_are_counted(tmp_path):
    members = [("0.cls", b"1"), ("0.jpg", b"x"), ("1.cls", b"1"), ("1.heic", b"x")]

    found = open_source(str(make_tar(tmp_path / "a.tar", members)))

    assert found.labels.tolist() == [1]
    assert left_out(found) == {".heic": 1, "labels without an image": 1}


def companions(tmp_path, *suffixes):
    members = [
        (f"{i:04d}.{suffix}", b"%d" % (i % 2) if suffix.endswith("cls") else picture(i))
        for i in range(4)
        for suffix in suffixes
    ]
    return make_tar(tmp_path / "a.tar", members)


@pytest.mark.parametrize("label", [[], ["cls"]])
def test_a_mask_beside_the_image_of_its_key_is_no_image(tmp_path, label):
    found = open_source(str(companions(tmp_path, *label, "jpg", "seg.png", "depth.png")))

    assert names(found) == [f"a.tar/{i:04d}.jpg" for i in range(4)]
    assert found.labels.tolist() == ([0, 1, 0, 1] if label else [0] * 4)
    assert left_out(found) == {
        ".seg.png beside the image of its key": 4,
        ".depth.png beside the image of its key": 4,
    }


def test_images_behind_two_suffixes_are_taken_when_they_are_named(tmp_path):
    path = companions(tmp_path, "input.jpg", "output.cls", "seg.png")

    asks = sentence_of(path)
    message = sentence_of(companions(tmp_path / "b", "input.jpg", "output.cls"))
    found = open_source(str(path), reading=Reading("", "input.JPG", "output.cls"))

    assert asks.endswith("for example --image-suffix input.jpg --label-suffix output.cls.")
    assert "4 of its keys have .input.jpg and .seg.png; say which is the image" in asks
    assert "4 .cls (0000.output.cls, ...) have no image beside them" in message
    assert "for example --image-suffix input.jpg --label-suffix output.cls." in message
    assert names(found) == [f"a.tar/{i:04d}.input.jpg" for i in range(4)]
    assert found.labels.tolist() == [0, 1, 0, 1]
    assert left_out(found) == {".seg.png": 4}


def test_two_images_of_each_key_ask_which_is_meant(tmp_path):
    message = sentence_of(companions(tmp_path, "input.jpg", "seg.png"))

    assert "4 of its keys have .input.jpg and .seg.png; say which is the image" in message


def test_photographs_with_dots_in_their_names_are_images(tmp_path):
    files = ["at 10.05.33.png", "at 10.05.35.png", "trip.beach.jpg", "trip.hotel.jpg", "22.05.jpg"]

    found = open_source(str(make_tar(tmp_path / "a.tar", [(name, b"x") for name in files])))

    assert names(found) == [f"a.tar/{name}" for name in files]


def test_keys_with_dots_have_labels_of_the_same_key(tmp_path):
    members = [(f"22.{i:02d}.{s}", b"%d" % i) for i in range(3) for s in ("cls", "jpg")]

    assert open_source(str(make_tar(tmp_path / "a.tar", members))).labels.tolist() == [0, 1, 2]


def test_labels_may_be_a_field_of_a_json_file(tmp_path):
    members = [
        (f"{i}.{suffix}", json.dumps({"text": "a", "label": i % 2}).encode())
        for i in range(4)
        for suffix in ("jpg", "json")
    ]
    path = make_tar(tmp_path / "a.tar", members)

    assert left_out(open_source(str(path))) == {".json": 4}
    assert open_source(str(path), reading=Reading(label_suffix="json:label")).labels.tolist() == [
        *(0, 1, 0, 1)
    ]
    assert "which is no number of a class" in sentence_of(path, label_suffix="json:class")
    assert "no sample of --input" in sentence_of(path, label_suffix="cls")
    with pytest.raises(ConfigError, match="^--label-suffix json:: is no suffix"):
        Reading(label_suffix="json:")
    with pytest.raises(ConfigError, match="^--label-suffix cls: names the classes, and so does"):
        Reading(label_suffix="cls", class_from="folder")


def test_labels_are_left_out_where_folders_are_asked_for(tmp_path):
    members = [(f"{name}/0.{s}", b"a cat") for name in ("b", "a") for s in ("cls", "jpg")]

    found = open_source(
        str(make_tar(tmp_path / "a.tar", members)), reading=Reading(class_from="folder")
    )

    assert described(found) == [(0, "a", 1), (1, "b", 1)]
    assert left_out(found) == {".cls": 2}


def test_a_tar_as_webdataset_writes_it_keeps_its_fingerprint(tmp_path):
    members = [(f"{i:04d}.{s}", b"%d" % (i % 3)) for i in range(9) for s in ("cls", "jpg", "txt")]
    lines = b"".join(b"a.tar/%04d.jpg\t%d\n" % (i, i % 3) for i in range(9))

    found = open_source(str(make_tar(tmp_path / "a.tar", members)))

    assert found.fingerprint() == hashlib.sha256(lines).hexdigest()


def test_links_and_sparse_members_are_counted(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("0.jpg"))
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
            member = tarfile.TarInfo("x.jpg")
            member.type, member.linkname = kind, "0.jpg"
            tar.addfile(member)

    assert left_out(open_source(str(tmp_path / "a.tar"))) == {"links": 2}


def test_a_tar_for_each_class_is_said_and_taken_on_demand(tmp_path):
    for name in ("n02", "n01"):
        make_tar(tmp_path / f"{name}.tar", [(f"{name}_{i}.JPEG", b"x") for i in range(2)])

    found = open_source(str(tmp_path))
    by_tar = open_source(str(tmp_path), reading=Reading(class_from="tar"))

    assert "add --class-from tar if each tar is a class" in "".join(summary(found))
    assert found.classes == ()
    assert described(by_tar) == [(0, "n01", 2), (1, "n02", 2)]


def test_tars_in_a_tar_and_packed_tars_say_what_to_do(tmp_path):
    make_tar(tmp_path / "outer.tar", [("n01.tar", b"x"), ("n02.tar", b"x")])
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "a.tar.gz").write_bytes(b"x")

    assert "holds 2 tars (outer.tar/n01.tar, ...) and no images; unpack it once, tar -xf" in (
        sentence_of(tmp_path / "outer.tar")
    )
    for text in (tmp_path / "packed", tmp_path / "packed" / "a.tar.gz"):
        assert "a.tar.gz: is a compressed tar, so that no single image" in sentence_of(text)
    assert "x.zip: is an archive that is not read in place" in sentence_of(tmp_path / "x.zip")


def test_what_lies_beside_tars_is_counted(tmp_path):
    make_tar(tmp_path / "0.tar", [("1.jpg", b"x")])
    save(tmp_path / "more" / "1.png")
    save(tmp_path / "2.png")

    assert left_out(open_source(str(tmp_path))) == {"folders beside the tars": 1, ".png": 1}


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_folders_called_by_numbers_are_in_the_order_of_numbers(tmp_path, kind):
    paths = [f"{label}/{i}.png" for label in range(12) for i in range(2)]
    for path in paths:
        save(tmp_path / "folder" / path)
    make_tar(tmp_path / "tar" / "a.tar", [(path, b"x") for path in paths])

    found = open_source(str(tmp_path / kind))

    assert described(found) == [(i, str(i), 2) for i in range(12)]
    assert all(f"{label}/" in name for label, name in zip(found.labels, names(found), strict=True))
    assert found.notes == []


def test_a_folder_whose_number_is_not_its_class_is_named(tmp_path):
    for name in ("1", "2", "10", "007"):
        save(tmp_path / name / "x.png")

    found = open_source(str(tmp_path))

    assert [entry.id for entry in found.classes] == ["1", "2", "007", "10"]
    assert found.notes == ["the folder 1 is class 0: classes count from 0, without gaps"]


def test_a_folder_without_images_is_named_and_is_no_class(tmp_path):
    for name in ("a", "c"):
        save(tmp_path / name / "1.png")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "readme.txt").write_text("to be filled")

    found = open_source(str(tmp_path))

    assert [entry.id for entry in found.classes] == ["a", "c"]
    assert left_out(found) == {".txt": 1, "folders without images, which are no classes": 1}


def labelled_tar(path, labels):
    members = [(f"{i}.{s}", str(n).encode()) for i, n in enumerate(labels) for s in ("cls", "jpg")]
    return make_tar(path, members)


def test_labels_that_begin_at_one_or_have_gaps_are_said(tmp_path):
    one = open_source(str(labelled_tar(tmp_path / "one.tar", [1, 2, 3, 1])))
    two = open_source(str(labelled_tar(tmp_path / "two.tar", [0, 1, 3, 5])))

    assert summary(one) == [
        "images per class: 0 0, 1 2, 2 1, 3 1",
        "class 0 has no image; do the labels begin at 1?",
    ]
    assert summary(two)[1] == "2 of 6 classes have no image: 2, 4"
    assert sentence_of(labelled_tar(tmp_path / "x.tar", [412, 88])).endswith(
        "x.tar: 411 of 413 classes have no image, only 88, 412 have; number the classes from 0 "
        "without gaps, or pass --allow-empty-classes if the others come later."
    )


def test_many_classes_are_said_in_one_line(tmp_path):
    for i in range(21):
        save(tmp_path / f"c{i:02d}" / "1.png")

    assert summary(open_source(str(tmp_path))) == [
        "images per class: c00 1, c01 1, c02 1, ...; 1 to 1 in each, median 1"
    ]


def test_parts_of_a_data_set_are_no_classes(tmp_path):
    for part in ("train", "val"):
        save(tmp_path / "data" / part / "cat" / "1.png")
    save(tmp_path / "vehicles" / "train" / "1.png")
    tar = make_tar(tmp_path / "a.tar", [("train/cat/1.png", b"x"), ("test/cat/1.png", b"x")])

    message = sentence_of(tmp_path / "data")
    asked_for = open_source(str(tmp_path / "data"), reading=Reading(class_from="folder"))

    assert f"called train and val, as parts of a data set are called; give --input {tmp_path}" in (
        message
    )
    assert "/data/train, or add --class-from folder" in message
    assert [entry.id for entry in asked_for.classes] == ["train", "val"]
    assert "give tars that hold test only" in sentence_of(tar)
    assert [c.id for c in open_source(str(tmp_path / "vehicles")).classes] == ["train"]


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_folders_in_class_folders_are_said_and_taken_on_demand(tmp_path, kind):
    paths = ["p/a/abbey/1.png", "p/b/bakery/shop/1.png", "p/b/bakery/shop/2.png"]
    for path in paths:
        save(tmp_path / "folder" / path)
    make_tar(tmp_path / "tar" / "a.tar", [(f"/{path}", b"x") for path in paths])

    found = open_source(str(tmp_path / kind))
    by_path = open_source(str(tmp_path / kind), reading=Reading(class_from="path"))
    without = open_source(str(tmp_path / kind), reading=Reading(class_from="none"))

    assert found.notes == [
        "all images lie in the folder p, which is the only class: the folders in it are not "
        "classes, add --class-from path if they should be"
    ]
    assert described(by_path) == [(0, "a/abbey", 1), (1, "b/bakery/shop", 2)]
    assert without.classes == () and not without.labels.any()


def test_labels_in_the_dataset_json_of_stylegan_and_edm_are_used(tmp_path):
    labels = [[f"{i // 2:05d}/img{i:08d}.png", i % 3] for i in range(6)]
    for name, _ in labels:
        save(tmp_path / name)
    stored = tmp_path / "dataset.json"
    stored.write_text(json.dumps({"labels": labels[::-1] + [["00009/gone.png", 1]]}))

    found = open_source(str(tmp_path))

    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert described(found) == [(0, "0", 2), (1, "1", 2), (2, "2", 2)]
    assert found.notes == ["classes are the labels in dataset.json"]
    assert left_out(found) == {"labels of dataset.json without an image": 1}

    stored.write_text(json.dumps({"labels": None}))
    assert open_source(str(tmp_path)).classes == ()
    stored.write_text(json.dumps({"labels": labels[1:]}))
    assert "names no label for 1 of 6 images (00000/img00000000.png" in sentence_of(tmp_path)
    stored.write_text(json.dumps({"labels": [[name, [0.0, 1.0]] for name, _ in labels]}))
    assert "has the label [0.0, 1.0], no class number; correct it" in sentence_of(tmp_path)
    assert len(open_source(str(tmp_path), reading=Reading(class_from="folder")).classes) == 3


def test_masks_in_folders_are_said(tmp_path):
    for i in range(3):
        for suffix in ("png", "seg.png", "2.png"):
            save(tmp_path / "a" / f"{i}.{suffix}")

    assert open_source(str(tmp_path)).notes == [
        "3 images are called as a/0.seg is, beside one without .seg: if they are masks or the "
        "like, name the images in a list"
    ]


@pytest.mark.parametrize(
    ("reading", "sentence"),
    [
        (Reading(image_suffix="jpg"), "--image-suffix jpg: --input {} is a folder of images, whi"),
        (Reading(label_column="x"), "--label-column x: --input {} is a folder of images, which"),
        (Reading(class_from="tar"), "--class-from tar: --input {} holds no tars; leave it out."),
    ],
)
def test_flags_for_another_kind_of_input_are_refused(tmp_path, reading, sentence):
    save(tmp_path / "1.png")

    with pytest.raises(ConfigError) as error:
        open_source(str(tmp_path), reading=reading)

    assert str(error.value).startswith(sentence.format(tmp_path))


PARTS = ["a", "b", ".x", "__MACOSX", "1", "10", "c.d", "é"]
ENDS = ["jpg", "PNG", "seg.png", "2.jpg", "cls", "txt", "HEIC", "npy", "json"]


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_every_file_is_an_image_a_label_or_counted_or_all_are_refused(tmp_path, kind, seed):
    draw = random.Random(seed)
    paths = {
        f"{draw.choice(PARTS)}/{draw.choice(PARTS)}{draw.randrange(4)}.{draw.choice(ENDS)}"
        for _ in range(draw.randrange(1, 12))
    }
    for path in paths:
        save(tmp_path / "folder" / path)
    contents = [(path, b"1" if path.endswith("cls") else b"x") for path in paths]
    make_tar(tmp_path / "tar" / "a.tar", contents)

    try:
        found = open_source(str(tmp_path / kind))
    except ConfigError as err:
        assert str(err).startswith("--input ") and "\n" not in str(err)
        return

    counted = left_out(found)
    if kind == "folder":
        # Folders are counted, and not what is in them.
        paths = {path for path in paths if not path.startswith((".x/", "__MACOSX/"))}
        top = {path.name for path in (tmp_path / "folder").iterdir()} & {".x", "__MACOSX"}
        counted["hidden or system files"] = counted.get("hidden or system files", 0) - len(top)
        counted.pop("folders without images, which are no classes", None)
        assert len(found) + sum(counted.values()) == len(paths)
        return
    num_labels = int((found.indexes[0].labels >= 0).sum())
    assert len(found) + num_labels + sum(counted.values()) == len(paths)
