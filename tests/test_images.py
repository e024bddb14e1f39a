"""Image files: what is found, how it is cropped, what is refused; and the demo picture set."""

import io

import numpy as np
import pytest
from PIL import Image

from data_tools.emoji import all_emoji, draw_emoji, emoji_classes, without_skin_tone
from data_tools.errors import ConfigError
from data_tools.images import BadImageError, load_pixels, square_crop
from data_tools.make_demo_images import evenly, make_demo_images, parse_arguments
from data_tools.sources import scan_folder
from tests.launch import run


def noise_image(width, height, mode="RGB"):
    rng = np.random.default_rng(width * 1000 + height)
    pixels = rng.integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(), mode if mode == "RGBA" else None)


def save(path, image=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or noise_image(8, 8)).save(path, **options)
    return path


def test_an_image_of_the_right_size_is_returned_unchanged(tmp_path):
    image = noise_image(32, 32)
    pixels = load_pixels(save(tmp_path / "a.png", image), 32)
    assert pixels.dtype == np.uint8 and pixels.shape == (32, 32, 3)
    np.testing.assert_array_equal(pixels, np.asarray(image))


@pytest.mark.parametrize("size", [(32, 50), (51, 32)])
def test_the_centre_is_cut_out(size):
    image = noise_image(*size)
    left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
    expected = np.asarray(image)[top : top + 32, left : left + 32]
    np.testing.assert_array_equal(square_crop(image, 32), expected)


def test_a_large_image_is_halved_by_box_averages_before_the_bicubic_step():
    image = noise_image(64, 64)
    pixels = np.asarray(image, np.float64)
    expected = pixels.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    assert np.abs(square_crop(image, 32) - expected).max() <= 1.0  # rounded twice
    # 100 pixels are halved once, then 50 become 32 by the bicubic filter.
    image = noise_image(100, 120)
    halved = image.resize((50, 60), Image.Resampling.BOX)
    scaled = halved.resize((32, 38), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(square_crop(image, 32), np.asarray(scaled)[3:35])


def test_a_small_image_is_enlarged():
    pixels = square_crop(Image.new("RGB", (7, 9), (10, 20, 30)), 32)
    assert pixels.shape == (32, 32, 3)
    assert (pixels == (10, 20, 30)).all()


def test_every_mode_becomes_rgb_on_white(tmp_path):
    for mode, colour, expected in [
        ("L", 100, (100, 100, 100)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("LA", (50, 255), (50, 50, 50)),
        ("1", 1, (255, 255, 255)),
    ]:
        path = save(tmp_path / "a.png", Image.new(mode, (8, 8), colour))
        assert (load_pixels(path, 8) == expected).all(), mode
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    assert (load_pixels(save(tmp_path / "b.png", palette), 8) == (10, 20, 30)).all()
    assert (load_pixels(save(tmp_path / "c.png", palette, transparency=0), 8) == 255).all()
    cmyk = save(tmp_path / "d.jpg", Image.new("CMYK", (8, 8), (0, 0, 0, 255)))
    assert load_pixels(cmyk, 8).max() < 10


def test_the_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (8, 8), "white")
    image.paste("black", (0, 0, 4, 8))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn by 90 degrees
    pixels = load_pixels(save(tmp_path / "a.png", image, exif=exif), 8)
    assert (pixels[:4] == 0).all() and (pixels[4:] == 255).all()


def png_bytes():
    buffer = io.BytesIO()
    noise_image(64, 64).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"no image at all", png_bytes()[:2000], png_bytes()[:20], b"\x89PNG\r\n\x1a\n" * 9],
    ids=["empty", "text", "cut in the data", "cut in the header", "nonsense"],
)
def test_a_file_that_is_no_image_is_a_bad_image(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(BadImageError, match=r"a\.png: "):
        load_pixels(path, 32)


def test_a_file_that_cannot_be_read_is_not_a_bad_image(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_pixels(tmp_path / "gone.png", 32)


def test_an_emoji_fills_its_picture_on_white():
    picture = draw_emoji("1F600", 64)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    assert (picture[0] == 255).all() and (picture[:, -1] == 255).all()
    drawn = np.argwhere(picture.min(axis=2) < 200)
    assert (np.ptp(drawn, axis=0) >= 56).all()
    yellow = (picture[..., 0] > 200) & (picture[..., 2] < 100)
    assert yellow.mean() > 0.3


def test_skin_tones_belong_to_one_family():
    assert without_skin_tone("1F44B-1F3FB") == without_skin_tone("1F44B-1F3FF") == "1F44B"
    assert without_skin_tone("1F468-1F3FD-200D-1F680") == "1F468-200D-1F680"


def test_the_demo_classes_are_large_and_share_no_emoji():
    classes = emoji_classes()
    assert list(classes) == sorted(classes) and len(classes) == 10
    assert all(80 <= len(evenly(members, 120)) <= 120 for members in classes.values())
    together = [sequence for members in classes.values() for sequence in members]
    assert len(set(together)) == len(together)
    assert set(together) <= set(all_emoji())


def test_the_demo_set_is_reproducible_and_even(tmp_path):
    for name in ("a", "b"):
        assert make_demo_images(tmp_path / name, size=16, per_class=5) == 50
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.png"))
    assert len(files) == 50
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert load_pixels(tmp_path / "a" / files[0], 16).shape == (16, 16, 3)
    with pytest.raises(ConfigError, match=r"^--output .*holds 40 other files \(animals/"):
        make_demo_images(tmp_path / "a", size=16, per_class=2)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--size", "4"], "--size 4: must be at least 8 pixels."),
        (["--per-class", "0"], "--per-class 0: must be at least 1."),
        (["--output", __file__], f"--output {__file__}: is a file; give a folder."),
    ],
)
def test_wrong_flags_of_make_demo_images_are_named(argv, sentence):
    with pytest.raises(ConfigError) as error:
        parse_arguments(argv)
    assert str(error.value) == sentence


def test_make_demo_images_runs_as_a_script(tmp_path):
    flags = ("--output", tmp_path / "set", "--size", 16, "--per-class", 2)
    output = run("python", "data_tools/make_demo_images.py", *flags)
    assert "20 pictures in 10 classes" in output
    assert len(scan_folder(tmp_path / "set", "--input").classes) == 10
    error = run("python", "data_tools/make_demo_images.py", "--size", 0, expect=2)
    assert error == "error: --size 0: must be at least 8 pixels.\n"
