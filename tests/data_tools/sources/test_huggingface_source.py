"""Images in data sets that Hugging Face `datasets` wrote: what is read, what is refused."""

import io
import json
import subprocess
import sys

import datasets
import numpy as np
import pytest
from PIL import Image

from data_tools.encode_latents import encode, parse_arguments
from data_tools.errors import ConfigError
from data_tools.sources.huggingface import HuggingFaceSource
from data_tools.sources.images import BadImageError
from data_tools.sources.inputs import open_source
from data_tools.sources.reading import Reading
from data_tools.sources.source import Classes
from tests.support.encode_jobs import content, flags, make_pictures
from tests.support.launch import REPOSITORY

datasets.disable_progress_bars()


def picture(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def save(folder, columns, max_shard_size=None, **features):
    """Write columns; `image` gets its type, others as in `features` or by their values."""
    found = datasets.Dataset.from_dict(columns)
    for name, feature in ({"image": datasets.Image()} | features).items():
        found = found.cast_column(name, feature)
    found.save_to_disk(folder, max_shard_size=max_shard_size)
    return folder


def rows(count, **columns):
    images = [{"bytes": picture(i), "path": f"n{i:02d}.png"} for i in range(count)]
    return {"image": images} | columns


ANIMALS = datasets.ClassLabel(names=["tench", "shark", "hen"])


def test_rows_are_images_and_a_class_label_their_classes(tmp_path):
    labels = [i % 2 * 2 for i in range(7)]
    folder = save(tmp_path / "set", rows(7, label=labels, note=["x"] * 7), label=ANIMALS)
    found = open_source(str(folder))
    assert [found.read(i) for i in range(7)] == [picture(i) for i in range(7)]
    assert list(found.raw_names()) == [b"%d/n%02d.png" % (i, i) for i in range(7)]
    assert found.name(3) == "3/n03.png"
    assert found.labels.tolist() == labels and found.labels.dtype == np.int32
    assert [(c.index, c.id, c.count) for c in found.classes] == [
        (0, "tench", 4),
        (1, "shark", 0),
        (2, "hen", 3),
    ]


def test_rows_are_found_across_files_and_record_batches(tmp_path):
    shuffled = datasets.Dataset.from_dict(rows(50)).cast_column("image", datasets.Image())
    order = np.random.default_rng(0).permutation(50)
    shuffled.select(order).save_to_disk(tmp_path / "set", num_shards=3)
    assert len([*(tmp_path / "set").glob("*.arrow")]) == 3
    found = open_source(str(tmp_path / "set"))
    assert [found.read(i) for i in range(50)] == [picture(int(i)) for i in order]
    assert found.classes == () and not found.labels.any()
    assert found.fingerprint() == open_source(str(tmp_path / "set")).fingerprint()


@pytest.mark.parametrize(
    ("labels", "wanted"), [([2, 0, 2], [2, 0, 2]), ([-1, -1, -1], None), ([None] * 3, None)]
)
def test_classes_may_be_numbers_or_none(tmp_path, labels, wanted):
    folder = save(tmp_path / "set", rows(3, cls=labels), cls=datasets.Value("int64"))
    found = open_source(str(folder))
    assert found.labels.tolist() == (wanted or [0, 0, 0])
    assert [c.count for c in found.classes] == ([1, 0, 2] if wanted else [])


@pytest.mark.parametrize("kind", ["uint8", "uint64", "int8"])
def test_class_numbers_may_have_any_whole_type(tmp_path, kind):
    folder = save(tmp_path / "set", rows(3, label=[2, 0, 2]), label=datasets.Value(kind))
    assert open_source(str(folder)).labels.tolist() == [2, 0, 2]


def test_any_column_of_values_may_be_chosen_as_classes(tmp_path):
    words = ["owl", "cat", "owl", "dog"]
    folder = save(
        tmp_path / "set",
        rows(4, category=words, flag=[True, False, True, True], number=[2, 0, 2, 1], text=words),
    )
    columns = {
        "category": ([2, 0, 2, 1], ["cat", "dog", "owl"]),
        "flag": ([1, 0, 1, 1], ["false", "true"]),
        "number": ([2, 0, 2, 1], ["0", "1", "2"]),
    }

    plain = open_source(str(folder))

    assert plain.classes == () and plain.notes == [
        "columns that are not used: category (string, 3 values), flag (bool, 2 values), number "
        "(int64, 3 values), text (string, 3 values); add --label-column NAME if one holds classes"
    ]
    for name, (labels, ids) in columns.items():
        found = open_source(str(folder), reading=Reading(label_column=name))
        assert (found.labels.tolist(), [entry.id for entry in found.classes]) == (labels, ids)
        assert found.notes == []


@pytest.mark.parametrize(
    ("columns", "name", "sentence"),
    [
        ({"label": ["a", "b"]}, "", "column label holds string and no class numbers; add --label-"),
        ({"a": ["x", ""]}, "a", "--label-column a: has an empty value, which can be no classes; "),
        ({"a": ["x", None]}, "a", "1 of 2 images (row 1, ...) have no class in column a; give ev"),
        ({"a": [0.5, 1.0]}, "a", "column a holds double and no class numbers; cast it to datasets"),
        ({"a": [1, 2]}, "b", "--label-column b: is no column of labels of --input {}, which has a"),
        ({"a": [1, 2]}, "image", "--label-column image: is no column of labels of --input {}, whi"),
    ],
)
def test_columns_that_are_no_classes_are_refused_in_one_sentence(tmp_path, columns, name, sentence):
    folder = save(tmp_path / "set", rows(2, **columns))
    with pytest.raises(ConfigError) as error:
        open_source(str(folder), reading=Reading(label_column=name))
    assert sentence.format(folder) in str(error.value) and "\n" not in str(error.value)


def test_of_two_columns_with_names_of_classes_one_has_to_be_chosen(tmp_path):
    coarse = datasets.ClassLabel(names=["fish", "bird"])
    columns = rows(2, fine=[0, 2], coarse=[0, 1])
    folder = save(tmp_path / "set", columns, fine=ANIMALS, coarse=coarse)
    with pytest.raises(ConfigError, match=r"\(fine, coarse\); choose one, --label-column fine\."):
        open_source(str(folder))
    found = open_source(str(folder), reading=Reading(label_column="coarse"))
    assert [entry.id for entry in found.classes] == ["fish", "bird"]


def test_pictures_beside_the_data_set_are_taken_into_it(tmp_path):
    (tmp_path / "1.png").write_bytes(picture(9))
    folder = save(tmp_path / "set", {"image": [str(tmp_path / "1.png")]})
    (tmp_path / "1.png").unlink()
    assert open_source(str(folder)).read(0) == picture(9)


def test_rows_without_bytes_are_bad_images(tmp_path):
    folder = save(tmp_path / "set", {"image": [{"bytes": picture(1), "path": None}, None]})
    found = open_source(str(folder))
    assert (found.read(0), found.name(0), found.name(1)) == (picture(1), "0/", "1/")
    with pytest.raises(BadImageError, match="has no bytes in its row"):
        found.read(1)
    assert found.sizes() == [len(picture(1)), -1]


def test_encoding_gives_the_latents_of_the_same_images_in_folders(tmp_path):
    images = make_pictures(tmp_path / "images")
    paths = sorted(images.rglob("*.png"))
    names = sorted({path.parent.name for path in paths})
    columns = {
        "image": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
        "label": [names.index(path.parent.name) for path in paths],
    }
    saved = save(tmp_path / "saved", columns, label=datasets.ClassLabel(names=names))
    for source, output in ((images, "a"), (saved, "b")):
        encode(parse_arguments(flags(source, tmp_path / output)), is_quiet=True)
    one, other = content(tmp_path / "a"), content(tmp_path / "b")
    shards = [name for name in one if name.endswith(".tar")]
    assert shards and all(one[name] == other[name] for name in shards)
    classes = [json.loads(found["dataset.json"])["classes"] for found in (one, other)]
    assert classes[0] == classes[1]


def two_images(folder):
    images = rows(2)["image"]
    found = datasets.Dataset.from_dict({"a": images, "b": images})
    found.cast_column("a", datasets.Image()).cast_column("b", datasets.Image()).save_to_disk(folder)


def no_rows(folder):
    found = datasets.Dataset.from_dict(rows(2)).cast_column("image", datasets.Image())
    found.select([]).save_to_disk(folder)


def cut(folder, part):
    save(folder, rows(9))
    (file,) = folder.glob("*.arrow")
    file.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])


def parquet(folder):
    (folder / "data").mkdir(parents=True)
    datasets.Dataset.from_dict({"x": [1]}).to_parquet(folder / "data" / "0.parquet")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda f: datasets.DatasetDict(
                {"train": datasets.Dataset.from_dict({"x": [1]})}
            ).save_to_disk(f),
            "holds the splits train; give one of them, such as --input {}/train.",
        ),
        (
            lambda f: datasets.Dataset.from_dict({"x": [1], "y": [2]}).save_to_disk(f),
            "none of its columns (x, y) is of type Image; cast one with cast_column",
        ),
        (two_images, "has 2 columns of type Image (a, b); save it again without all but one"),
        (no_rows, "has no rows; give a data set with images."),
        (lambda f: save(f, {"image": []}), "has no rows; give a data set with images."),
        (
            lambda f: save(f, rows(3, label=[0, -1, -1])),
            "2 of 3 images (row 1, ...) have no class in column label; give every image one",
        ),
        (
            lambda f: save(f, rows(2, label=[0, 1_000_000_000_000])),
            "has a class number above 999,999, which seems to be something else than a label;",
        ),
        (
            lambda f: save(f, rows(2, label=np.array([0, 2**64 - 1], np.uint64))),
            "has a class number above 999,999, which seems to be something else than a label;",
        ),
        (
            lambda f: save(f, rows(2, label=[0, 3]), label=ANIMALS),
            "column label has a class above 2 and names 3 classes; correct it and save the data",
        ),
        (
            lambda f: save(f, rows(1, label=[[0, 1]])),
            "several values for an image; write one class for each into a column of its own",
        ),
        (lambda f: cut(f, 0.05), "cannot be read as a data set of Hugging Face datasets ("),
        (lambda f: cut(f, 0.8), "cannot be read as a data set of Hugging Face datasets ("),
        (parquet, "holds Parquet files; write them to disk as Arrow once, with datasets.load_data"),
    ],
)
def test_unclear_and_damaged_sets_are_refused_in_one_sentence(tmp_path, make, sentence):
    folder = tmp_path / "set"
    make(folder)
    with pytest.raises(ConfigError) as error:
        open_source(str(folder))
    assert str(error.value).startswith(f"--input {folder}: ") and "\n" not in str(error.value)
    assert sentence.format(folder) in str(error.value)


def without(content, key):
    return {name: value for name, value in content.items() if name != key}


def with_feature(info, column, feature):
    return info | {"features": info["features"] | {column: feature}}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state.json", lambda _: []),
        ("state.json", lambda _: 3),
        ("state.json", lambda old: old | {"_data_files": 3}),
        ("state.json", lambda old: old | {"_data_files": [3]}),
        ("state.json", lambda old: without(old, "_data_files")),
        ("state.json", lambda old: without(old, "_split")),
        ("state.json", lambda old: old | {"_format_kwargs": 3}),
        ("state.json", lambda old: old | {"_split": 3}),
        ("dataset_info.json", lambda _: []),
        ("dataset_info.json", lambda old: old | {"features": {"image": 3}}),
        ("dataset_info.json", lambda old: old | {"features": {"image": {"_type": "Value"}}}),
        ("dataset_info.json", lambda old: old | {"features": {"image": {"_type": []}}}),
        ("dataset_info.json", lambda old: with_feature(old, "label", {"_type": "Image"})),
        (
            "dataset_info.json",
            lambda old: with_feature(old, "label", {"_type": "ClassLabel", "names": [1, 2]}),
        ),
        ("dataset_info.json", lambda old: old | {"splits": 3}),
        ("dataset_info.json", lambda old: old | {"version": [1]}),
        ("dataset_dict.json", lambda _: []),
        ("dataset_dict.json", lambda _: {"splits": "train"}),
        ("dataset_dict.json", lambda _: {"splits": [3]}),
        ("dataset_dict.json", lambda _: {"splits": ["../elsewhere"]}),
    ],
)
def test_what_is_no_description_of_a_data_set_is_refused_in_one_sentence(tmp_path, name, content):
    folder = save(tmp_path / "set", rows(2, label=[0, 1]))
    if name == "dataset_dict.json":
        (folder / "state.json").unlink()
        (folder / name).write_text("{}")
    (folder / name).write_text(json.dumps(content(json.loads((folder / name).read_text()))))
    with pytest.raises(ConfigError) as error:
        open_source(str(folder))
    message = str(error.value)
    assert message.startswith(
        f"--input {folder}: cannot be read as a data set of Hugging Face datasets ("
    )
    assert message.endswith("); copy or save it again.") and "\n" not in message


@pytest.mark.parametrize("name", ["../set2/data.arrow", "{}/set2/data.arrow", "gone.arrow", "", 3])
def test_only_files_in_the_folder_are_mapped(tmp_path, name):
    folder = save(tmp_path / "set", rows(2))
    (tmp_path / "set2").mkdir()
    next(folder.glob("*.arrow")).rename(tmp_path / "set2" / "data.arrow")
    name = name.format(tmp_path) if isinstance(name, str) else name
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"] = [{"filename": name}]
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(ConfigError) as error:
        open_source(str(folder))
    assert f"(state.json names {name!r}, which is no file in the folder)" in str(error.value)


def test_paths_that_are_no_text_are_escaped(tmp_path):
    import pyarrow as pa

    path = pa.array([b"caf\xe9.png"]).view("string")
    column = pa.StructArray.from_arrays([pa.array([picture(1)]), path], ["bytes", "path"])
    source = HuggingFaceSource("set", pa.chunked_array([column]), Classes(np.zeros(1, np.int32)))
    assert source.name(0) == "0/caf\\xe9.png"


@pytest.mark.processes
def test_without_the_package_a_sentence_says_what_to_install(tmp_path):
    folder = save(tmp_path / "set", rows(1))
    # As where only a folder of that name is found: an empty module.
    code = "import runpy, sys, types; sys.modules['datasets'] = types.ModuleType('datasets');"
    code += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, "data_tools/encode_latents.py"]
    command += flags(folder, tmp_path / "out")
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 2
    assert "is not installed; pip install datasets.\n" in done.stderr
    assert done.stderr.count("\n") == 1
