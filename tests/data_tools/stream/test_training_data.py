"""What --data names: unions, mixtures, their agreement, and the one description of all."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_tools.errors import ConfigError
from data_tools.shards.manifest import DATASET, MANIFEST_NAME, DatasetManifest
from data_tools.stream.loader import LatentStream
from data_tools.stream.training_data import (
    NamedSet,
    in_thousandths,
    is_absent,
    open_data,
    parse_data,
)
from tests.support.synthetic import make_dataset, moments_of
from training.config.command_line import parse_command_line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", [(("a",), 1.0)]),
        ("a,b", [(("a", "b"), 1.0)]),
        ("x/{a,b},c", [(("x/a", "x/b", "c"), 1.0)]),
        ("p{0..2}=3,c=1.5", [(("p0", "p1", "p2"), 3.0), (("c",), 1.5)]),
        ("a=2,b", [(("a",), 2.0), (("b",), 1.0)]),
        ("http://h/a?key=3", [(("http://h/a?key=3",), 1.0)]),
        ("s3://b/a=1,gs://c/d=2", [(("s3://b/a",), 1.0), (("gs://c/d",), 2.0)]),
        ("lr=3/", [(("lr=3/",), 1.0)]),
        ("pipe:cat {}, x=3", [(("pipe:cat {}, x=3",), 1.0)]),
        ("a=2,pipe:ssh {h,i} cat {}=4", [(("a",), 2.0), (("pipe:ssh {h,i} cat {}=4",), 1.0)]),
    ],
)
def test_the_text_of_data_is_understood(text, expected):
    assert parse_data(text) == [NamedSet(places, weight) for places, weight in expected]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a,,b", "names nothing beside a comma"),
        ("a,", "names nothing beside a comma"),
        ("a=0", "its weight is no number above 0"),
        ("a=-1", "its weight is no number above 0"),
        ("a=x", "its weight is no number above 0"),
        ("a=nan", "its weight is no number above 0"),
        ("ftp://h/a", "is no URL that can be read"),
        ("pipe:cat", "has no {} for the file's name"),
    ],
)
def test_what_cannot_be_understood_is_refused(text, sentence):
    with pytest.raises(ConfigError, match="^--data ") as error:
        open_data(text)
    assert sentence in str(error.value)


def test_weights_are_rounded_to_thousandths():
    assert in_thousandths([3, 1]) == (750, 250)
    assert sorted(in_thousandths([1, 1, 1])) == [333, 333, 334]
    assert sum(in_thousandths([0.1, 7, 2.22, 5])) == 1000
    with pytest.raises(ConfigError, match="weight 1 is less than a thousandth"):
        in_thousandths([1, 3000])


def change(folder, edit):
    manifest = DatasetManifest.load(folder).described()
    DATASET.write(folder / MANIFEST_NAME, edit(manifest))


def rename_classes(manifest):
    """Of class_0, class_1, class_2: class_2, new, class_0."""
    ids = ["class_2", "new", "class_0"]
    classes = [replace(c, id=i) for c, i in zip(manifest.classes, ids, strict=True)]
    return replace(manifest, classes=classes)


@pytest.fixture
def folders(tmp_path):
    """Two sets; samples of the second have the ids from 1000 on, and other classes."""
    make_dataset(tmp_path / "a", [7, 5])
    make_dataset(
        tmp_path / "b", [4, 9, 2], moments=lambda i, flip=False: moments_of(1000 + i, flip)
    )
    change(tmp_path / "b", rename_classes)
    return tmp_path


def read(data, count, **changes):
    settings = {"seed": 1, "window": 2, "global_batch_size": 9, "micro_batch_size": 9}
    with LatentStream(
        data, rank=0, world_size=1, horizontal_flip=False, **(settings | changes)
    ) as stream:
        batches = [next(stream) for _ in range(count)]
    ids = torch.cat([batch.raw_latents[:, 0, 0, 0].long() for batch in batches])
    return ids.tolist(), torch.cat([batch.labels for batch in batches]).tolist()


def class_of(sample):
    """In the union: class_0, class_1, class_2, new."""
    return sample % 3 if sample < 1000 else [2, 3, 0][(sample - 1000) % 3]


def test_a_union_is_one_data_set_with_the_classes_of_all(folders):
    data = open_data(f"{folders}/{{a,b}}")
    ids, labels = read(data, 3)
    assert sorted(ids) == [*range(12), *range(1000, 1015)]
    assert labels == [class_of(sample) for sample in ids]
    manifest = data.manifest
    assert [entry.id for entry in manifest.classes] == ["class_0", "class_1", "class_2", "new"]
    assert [entry.index for entry in manifest.classes] == [0, 1, 2, 3]
    assert sum(entry.count for entry in manifest.classes) == manifest.num_samples == 27
    assert "b: 15 samples, 3 shards" in data.describe()


def test_a_mixture_has_exact_shares_and_exact_epochs_of_each_set(folders):
    data = open_data(f"{folders}/a=3,{folders}/b=1")
    ids, labels = read(data, 10, global_batch_size=100, micro_batch_size=100)
    first, second = [i for i in ids if i < 1000], [i for i in ids if i >= 1000]
    assert (len(first), len(second)) == (750, 250)
    for own, known in ((first, range(12)), (second, range(1000, 1015))):
        size = len(known)
        for start in range(0, len(own) - size + 1, size):
            assert sorted(own[start : start + size]) == list(known)
    assert labels == [class_of(sample) for sample in ids]
    assert "75.0% of the samples" in data.describe()


def test_the_description_of_all_can_be_kept_and_read_again(folders):
    data = open_data(f"{folders}/a=3,{folders}/b=1")
    (folders / "run").mkdir()
    DATASET.write(folders / "run" / MANIFEST_NAME, data.manifest.described())
    copy = DatasetManifest.load(folders / "run", check_shards=False)
    assert copy.classes == data.manifest.classes and copy.vae == data.manifest.vae


def test_what_is_read_decides_the_hash(folders):
    a, b = f"{folders}/a", f"{folders}/b"
    shutil.copytree(a, folders / "moved")
    assert open_data(a).manifest.hash == DatasetManifest.load(a).hash
    assert open_data(f"{folders}/moved").manifest.hash == open_data(a).manifest.hash
    texts = [a, b, f"{a},{b}", f"{b},{a}", f"{a}=1,{b}=1", f"{a}=3,{b}=1", f"{a}=6,{b}=2.01"]
    hashes = [open_data(text).manifest.hash for text in texts]
    assert len(set(hashes)) == len(texts)
    assert open_data(f"{a}=6,{b}=2").manifest.hash == hashes[5]


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (lambda m: replace(m, vae=replace(m.vae, sha256="1" * 64)), "VAE's sha256: 0000"),
        (lambda m: replace(m, vae=replace(m.vae, scaling_factor=2.0)), "VAE's scaling and shift:"),
        (lambda m: replace(m, classes=[]), "has classes: True and False"),
    ],
)
def test_sets_that_do_not_go_together_are_refused(folders, edit, what):
    change(folders / "b", edit)
    with pytest.raises(ConfigError, match="^--data: .*a and .*b do not go together") as error:
        open_data(f"{folders}/a,{folders}/b")
    assert what in str(error.value)


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"shape": (8, 4, 6)}, "shape"), ({"has_flip": False}, "mirrored images: True and False")],
)
def test_arrays_that_differ_are_refused(tmp_path, changes, what):
    make_dataset(tmp_path / "a", [2])
    shape = changes.get("shape", (8, 4, 4))
    values = {"moments": lambda i, flip=False: np.zeros(shape, np.float16)}
    make_dataset(tmp_path / "b", [2], **(values | changes))
    with pytest.raises(ConfigError, match=what):
        open_data(f"{tmp_path}/a,{tmp_path}/b")


def test_shards_may_lie_elsewhere(folders):
    for name in ("a", "b"):
        (folders / "tars" / name).mkdir(parents=True)
        for tar in (folders / name).glob("*.tar"):
            tar.rename(folders / "tars" / name / tar.name)
    with pytest.raises(ConfigError, match="is missing"):
        open_data(f"{folders}/a")
    data = open_data(f"{folders}/{{a,b}}", f"{folders}/tars/{{a,b}}")
    assert sorted(read(data, 3)[0]) == [*range(12), *range(1000, 1015)]
    with pytest.raises(ConfigError, match="^--data-shards .* names 1 place but --data 2 data"):
        open_data(f"{folders}/{{a,b}}", f"{folders}/tars/a")


def test_more_streams_than_samples_are_refused(folders):
    data = open_data(f"{folders}/a,{folders}/b")
    data.check_streams(27)
    with pytest.raises(ConfigError, match="--data-streams 13 is more than the 12 samples"):
        open_data(f"{folders}/a=1,{folders}/b=1").check_streams(13)


def test_only_folders_of_this_machine_can_be_absent(folders):
    assert is_absent(f"{folders}/nowhere")
    assert is_absent(f"{folders}/{{a,nowhere}}")
    assert not is_absent(f"{folders}/a,http://nowhere.invalid/x,pipe:cat {{}}")


def test_another_kind_of_array_is_refused(folders):
    path = folders / "a" / MANIFEST_NAME
    content = json.loads(path.read_text())
    content["latent"]["kind"] = "pixels"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="latent.kind is 'pixels', not moments or latents"):
        open_data(f"{folders}/a")


@pytest.mark.parametrize("name", ["lr=0.1,bs=2", "photos, 2024", "split=train", "{a,b}", "[v1]"])
def test_a_folder_is_meant_by_its_name_whatever_letters_are_in_it(tmp_path, name):
    made = make_dataset(tmp_path / name, [3])
    other = make_dataset(tmp_path / "other", [2])

    assert open_data(f"{tmp_path}/{name}").manifest.hash == made.hash
    mixed = open_data(f"{tmp_path}/{name}=3,{tmp_path}/other")
    assert [part.manifest.hash for part in mixed.parts] == [made.hash, other.hash]
    assert mixed.weights == (750, 250)
    assert not is_absent(f"{tmp_path}/{name}")


def test_a_part_of_a_list_that_is_not_there_is_named_with_what_the_letters_mean(tmp_path):
    make_dataset(tmp_path / "a", [3])

    with pytest.raises(ConfigError) as caught:
        open_data(f"{tmp_path}/a,{tmp_path}/lr=0.1,bs=2")

    assert f"its part {tmp_path}/lr does not exist; correct it (a comma, = or brace" in str(
        caught.value
    )


def test_the_words_that_a_shell_makes_of_a_wildcard_are_one_union(tmp_path):
    for name in ("a, b", "c"):
        make_dataset(tmp_path / name, [3])

    argv = ["--data", f"{tmp_path}/a, b", f"{tmp_path}/c", "--max-steps", "1"]
    text = parse_command_line(argv).config.data.data

    assert [part.location.text for part in open_data(text).parts] == argv[1:3]
    assert open_data(f"{tmp_path}/*").manifest.hash == open_data(text).manifest.hash
