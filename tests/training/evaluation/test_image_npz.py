"""ADM's npz files: numpy reads ours, we read numpy's, and bytes depend on the arrays alone."""

import zipfile

import numpy as np
import pytest

from data_tools.errors import ConfigError
from training.evaluation.image_npz import ImageNpz, write_npz

SHAPE = (7, 4, 6, 3)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, SHAPE).astype(np.uint8)


def write(path, images, cuts=(2, 5)):
    write_npz(path, np.split(images, cuts), images.shape, {"arr_1": np.arange(7), "mu": np.ones(3)})


def test_numpy_reads_what_is_written(tmp_path, images):
    write(tmp_path / "a.npz", images)

    found = np.load(tmp_path / "a.npz")

    assert sorted(found) == ["arr_0", "arr_1", "mu"]
    np.testing.assert_array_equal(found["arr_0"], images)
    np.testing.assert_array_equal(found["arr_1"], np.arange(7))


def test_the_bytes_depend_on_the_arrays_alone(tmp_path, images):
    write(tmp_path / "a.npz", images)
    write(tmp_path / "b.npz", images, cuts=(1, 2, 3))

    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:  # and not on when they were written
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_writes_is_read_in_pieces(tmp_path, images, save):
    save(tmp_path / "a.npz", images, np.arange(7), mu=np.ones(3))

    found = ImageNpz(tmp_path / "a.npz", "--reference")

    assert (found.num_images, found.image_size) == (7, (4, 6))
    batches = list(found.batches(3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(batches), images)
    np.testing.assert_array_equal(found.array("mu"), np.ones(3))


def test_a_file_of_statistics_alone_has_no_images(tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.ones(3))

    found = ImageNpz(tmp_path / "a.npz", "--reference")

    assert (found.num_images, found.image_size, found.names) == (0, None, {"mu"})


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), "its arr_0 is float32 (2, 4, 4, 3); images are uint8"),
        (np.zeros((2, 3, 4, 4), np.uint8), "its arr_0 is uint8 (2, 3, 4, 4); images are uint8 (N,"),
        (np.zeros(5, np.uint8), "its arr_0 is uint8 (5,); images are uint8 (N, height, width, 3)."),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path, array, sentence):
    np.savez(tmp_path / "a.npz", array)

    with pytest.raises(ConfigError) as error:
        ImageNpz(tmp_path / "a.npz", "--reference")

    assert str(error.value).startswith(f"--reference {tmp_path}/a.npz: {sentence}")


@pytest.mark.parametrize("kept", [0, 100, 0.9])
def test_damaged_files_are_refused(tmp_path, images, kept):
    path = tmp_path / "a.npz"
    write(path, images)
    data = path.read_bytes()
    path.write_bytes(data[: kept if kept != 0.9 else int(0.9 * len(data))])

    with pytest.raises(ConfigError, match="is damaged or no npz file"):
        ImageNpz(path, "--reference")


def test_one_flipped_bit_is_found_while_reading(tmp_path, images):
    path = tmp_path / "a.npz"
    write(path, images)
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    path.write_bytes(data)

    with pytest.raises(ConfigError, match="is damaged or no npz file"):
        list(ImageNpz(path, "--reference").batches(3))


def test_a_writer_that_fails_leaves_nothing(tmp_path, images):
    with pytest.raises(AssertionError):
        write_npz(tmp_path / "a.npz", [images[:3]], SHAPE, {})

    assert list(tmp_path.iterdir()) == []
