"""A refused encoding leaves nothing behind, and a finished data set stays what it is."""

import shutil

import pytest

from data_tools.encode_latents import main
from data_tools.encoding import trial
from data_tools.errors import ConfigError
from data_tools.shards.manifest import MANIFEST_NAME
from tests.support.encode_jobs import content, flags, make_pictures
from tests.support.image_inputs import make_tar, picture


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def test_images_of_which_none_can_be_decoded_are_refused_before_anything_is_written(
    tmp_path, capsys
):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    for name in "ab":
        (tmp_path / f"photos/{name}").mkdir(parents=True)
        (tmp_path / f"photos/{name}/0.jpg").write_text(pointer)

    with pytest.raises(ConfigError, match=r"none of its 2 files could .* \([ab]/0\.jpg: is a git"):
        main(flags(tmp_path / "photos", tmp_path / "new/set", **{"--shard-size": 1}))

    assert "skipped" not in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]


def test_a_refusal_after_tars_were_read_leaves_no_index_and_no_folder(tmp_path):
    members = [(name, data) for i in (3, 999) for name, data in _sample(i)]
    tars = make_tar(tmp_path / "tars/0.tar", members).parent
    (tmp_path / "there").mkdir()

    for output in (tmp_path / "a/b/set", tmp_path / "there"):
        with pytest.raises(ConfigError, match="998 of 1,000 classes have no image"):
            main(flags(tars, output))
        with pytest.raises(ConfigError, match="^--vae nowhere: "):
            main([*flags(tars, output, **{"--allow-empty-classes": True}), "--vae", "nowhere"])

    assert sorted(path.name for path in tmp_path.iterdir()) == ["tars", "there"]
    assert not list((tmp_path / "there").iterdir())


def _sample(label):
    return (f"{label}.png", picture(1)), (f"{label}.cls", b"%d" % label)


def test_a_refused_precision_begins_no_data_set(images, tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "MAX_PRECISION_ERROR", 0.0)
    with pytest.raises(ConfigError, match=r"^--precision bf16: .* use fp32\.$"):
        main(flags(images, tmp_path / "set", **{"--precision": "bf16"}))
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_shard_of_a_finished_set_never_becomes_another_one(images, tmp_path, damage):
    photos, output = tmp_path / "photos", tmp_path / "set"
    shutil.copytree(images, photos)
    main(flags(photos, output))
    whole = content(output)
    shard = output / "00001.tar"
    shard.write_bytes(b"short") if damage == "cut" else shard.unlink()
    left = content(output)
    for path in sorted(photos.rglob("*.png"))[:8]:
        path.write_bytes(picture(9))

    with pytest.raises(ConfigError, match=r"its 00001\.tar is missing or damaged, and encoding it"):
        main(flags(photos, output))

    assert content(output) == left
    assert left[MANIFEST_NAME] == whole[MANIFEST_NAME]
    shutil.rmtree(photos)
    shutil.copytree(images, photos)
    main(flags(photos, output))
    assert content(output) == whole
