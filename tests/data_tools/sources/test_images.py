"""Image files: what is found, how it is cropped, what is refused; and the demo picture set."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_tools.errors import ConfigError
from data_tools.make_demo_images import parse_arguments
from data_tools.sources.emoji import (
    all_emoji,
    draw_emoji,
    emoji_classes,
    evenly,
    make_demo_images,
    without_skin_tone,
)
from data_tools.sources.image_folders import scan_folder
from data_tools.sources.images import BadImageError, decode_image, square_crop
from tests.support.launch import run


def noise_image(width, height, mode="RGB"):
    rng = np.random.default_rng(width * 1000 + height)
    pixels = rng.integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(), mode if mode == "RGBA" else None)


def load_pixels(path, size):
    return decode_image(path.read_bytes(), size)


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
    with pytest.raises(BadImageError):
        load_pixels(path, 32)


def test_sixteen_bits_keep_the_upper_eight(tmp_path):
    shades = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    grey = save(tmp_path / "grey.png", Image.fromarray(shades))
    with Image.open(grey) as image:
        assert image.mode == "I;16"
    expected = np.repeat((shades >> 8).astype(np.uint8)[..., None], 3, axis=2)
    np.testing.assert_array_equal(load_pixels(grey, 8), expected)
    tiff = save(tmp_path / "grey.tif", Image.fromarray(shades))
    np.testing.assert_array_equal(load_pixels(tiff, 8), expected)
    colour = tmp_path / "colour.png"
    colour.write_bytes(png48(np.stack([shades, shades[::-1], shades.T], axis=2)))
    expected = np.stack([shades, shades[::-1], shades.T], axis=2) >> 8
    np.testing.assert_array_equal(load_pixels(colour, 8), expected)


def png48(pixels):
    """Write 16-bit colours, which Pillow cannot: uint16 (H, W, 3)."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(("mode", "suffix"), [("I", "tif"), ("F", "tif")])
def test_pixels_without_a_known_range_are_refused(tmp_path, mode, suffix):
    path = save(tmp_path / f"a.{suffix}", Image.new(mode, (8, 8), 70_000))
    with pytest.raises(BadImageError, match=rf"pixels \(mode {mode}\) have no known range"):
        load_pixels(path, 8)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_of_an_animation_the_first_frame_counts(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    with Image.open(path) as image:
        assert image.n_frames == 3
    assert (load_pixels(path, 8) == (255, 0, 0)).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "RGBA", "1"])
def test_one_pixel_fills_the_picture(tmp_path, mode):
    path = save(tmp_path / "a.tif", Image.new(mode, (1, 1)))
    pixels = load_pixels(path, 32)
    assert pixels.shape == (32, 32, 3) and (pixels == pixels[0, 0]).all()


def test_a_wrong_suffix_does_not_matter(tmp_path):
    image = noise_image(8, 8)
    for kind, name in (("PNG", "a.jpg"), ("BMP", "a.png"), ("TIFF", "a.webp"), ("WEBP", "a.gif")):
        options = {"lossless": True} if kind == "WEBP" else {}
        image.save(tmp_path / name, kind, **options)
        np.testing.assert_array_equal(load_pixels(tmp_path / name, 8), np.asarray(image))


def test_large_images_are_read_and_senseless_ones_refused_before_they_are_decoded(tmp_path):
    wide = save(tmp_path / "wide.png", Image.new("1", (20_000, 100), 1))
    assert (load_pixels(wide, 16) == 255).all()
    huge = save(tmp_path / "huge.png", Image.new("1", (20_000, 20_000)))  # 50 kB of file
    with pytest.raises(BadImageError, match=r"400,?000,?000 pixels"):
        load_pixels(huge, 16)
    line = save(tmp_path / "line.png", Image.new("1", (20_000, 1)))
    with pytest.raises(BadImageError, match=r"20000 x 1 are 327,680,000 pixels when scaled to 128"):
        load_pixels(line, 128)
    assert load_pixels(line, 16).shape == (16, 16, 3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"])
def test_damage_anywhere_in_a_file_is_a_bad_image_or_a_picture(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if kind in ("PNG", "JPEG", "TIFF", "WEBP") else {}
    buffer = io.BytesIO()
    noise_image(20, 24).save(buffer, kind, **options)
    rng = np.random.default_rng(0)
    num_refused = 0
    for _ in range(150):
        data = bytearray(buffer.getvalue())
        reach = len(data) if rng.random() < 0.4 else 200
        for place in rng.integers(0, min(reach, len(data)), 4):
            data[place] = rng.integers(0, 256)
        cut = len(data) if rng.random() < 0.6 else rng.integers(0, len(data))
        try:
            assert decode_image(bytes(data[:cut]), 16).shape == (16, 16, 3)
        except BadImageError as err:
            num_refused += 1
            assert str(err)
    assert num_refused > 30


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
        (["--per-class", "0"], "--per-class must be at least 1, not 0."),
        (["--output", __file__], f"--output {__file__}: is a file; give a folder."),
    ],
)
def test_wrong_flags_of_make_demo_images_are_named(argv, sentence):
    with pytest.raises(ConfigError) as error:
        parse_arguments(argv)
    assert str(error.value) == sentence


@pytest.mark.processes
def test_make_demo_images_runs_as_a_script(tmp_path):
    flags = ("--output", tmp_path / "set", "--size", 16, "--per-class", 2)
    output = run("python", "data_tools/make_demo_images.py", *flags)
    assert "20 pictures in 10 classes" in output
    assert len(scan_folder(tmp_path / "set", "--input").classes) == 10
    error = run("python", "data_tools/make_demo_images.py", "--size", 0, expect=2)
    assert error == "error: --size 0: must be at least 8 pixels.\n"
