"""What image files hold beside plain pixels: transparency, metadata, other formats than the name's.

H W image size.
"""

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from data_tools.sources.images import BadImageError, decode_image

SIZE = 8
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # colour types of PNG
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}
DEPTHS = [(GREY, 1), (GREY, 2), (GREY, 4), (GREY, 8), (GREY, 16), (RGB, 8), (RGB, 16)]
DEPTHS += [(PALETTE, 1), (PALETTE, 2), (PALETTE, 4), (PALETTE, 8)]
DEPTHS += [(GREY_ALPHA, 8), (GREY_ALPHA, 16), (RGBA, 8), (RGBA, 16)]


def png(samples, bits, colour, *chunks):
    """Write samples (H, W, channels) as a PNG of any depth."""

    def chunk(name, content):
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    height, width, _ = samples.shape
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    rows = b""
    for row in samples.reshape(height, -1).tolist():
        digits = "".join(f"{value:0{bits}b}" for value in row)
        digits += "0" * (-len(digits) % 8)
        rows += b"\0" + int(digits, 2).to_bytes(len(digits) // 8, "big")
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def pixel_on_white(values, bits, colour, palette, transparent):
    """Return one pixel as the PNG standard says, slowly: 8-bit RGB."""
    largest = (1 << bits) - 1
    to_byte = lambda value: value >> 8 if bits == 16 else value * (255 // largest)  # noqa: E731
    alpha = 255
    if colour == PALETTE:
        rgb = palette[values[0]]
        if transparent is not None and values[0] < len(transparent):
            alpha = transparent[values[0]]
    elif colour in (GREY, GREY_ALPHA):
        rgb = [to_byte(values[0])] * 3
    else:
        rgb = [to_byte(value) for value in values[:3]]
    if colour in (GREY_ALPHA, RGBA):
        alpha = to_byte(values[-1])
    if colour in (GREY, RGB) and transparent is not None and list(values) == list(transparent):
        alpha = 0
    return [(value * alpha + 255 * (255 - alpha)) / 255 for value in rgb]


@pytest.mark.parametrize(("colour", "bits"), DEPTHS)
@pytest.mark.parametrize("has_chunk", [False, True])
def test_transparent_parts_are_white_whatever_way_a_png_stores_them(colour, bits, has_chunk):
    rng = np.random.default_rng(bits + 100 * colour)
    samples = rng.integers(0, 1 << bits, (SIZE, SIZE, CHANNELS[colour]))
    # Next to the key: the same upper byte, which is not transparent.
    samples[0, :4] = samples[0, 0] ^ np.array([[0], [1], [0], [1]])
    palette = rng.integers(0, 256, (1 << min(bits, 8), 3)).tolist()
    chunks, transparent = [], None
    if colour == PALETTE:
        chunks.append((b"PLTE", bytes(itertools.chain(*palette))))
    if has_chunk and colour == PALETTE:
        transparent = rng.integers(0, 256, 1 << (bits - 1)).tolist()  # the other half is opaque
        chunks.append((b"tRNS", bytes(transparent)))
    elif has_chunk and colour in (GREY, RGB):
        transparent = samples[0, 0].tolist()
        chunks.append((b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)))
    expected = [
        [pixel_on_white(values, bits, colour, palette, transparent) for values in row]
        for row in samples.tolist()
    ]

    found = decode_image(png(samples, bits, colour, *chunks), SIZE)

    assert np.abs(found - np.array(expected)).max() <= 1


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def half_transparent(colour=(255, 0, 255)):
    """Return RGBA (8, 8): the left half invisible with a colour, the right half green."""
    pixels = np.zeros((SIZE, SIZE, 4), np.uint8)
    pixels[:, :4, :3] = colour
    pixels[:, 4:] = (0, 128, 0, 255)
    return Image.fromarray(pixels)


def on_palette():
    image = Image.fromarray(np.asarray(half_transparent())[..., 3] // 255)
    image = image.convert("P") if image.mode != "P" else image
    image.putpalette([255, 0, 255, 0, 128, 0])
    return image


@pytest.mark.parametrize(
    "data",
    [
        encoded(half_transparent(), "PNG"),
        encoded(half_transparent(), "TIFF"),
        encoded(half_transparent(), "TIFF", compression="tiff_lzw"),
        encoded(half_transparent(), "WEBP", lossless=True, exact=True),
        encoded(half_transparent(), "JPEG2000"),
        encoded(on_palette(), "GIF", transparency=0),
        encoded(on_palette(), "PNG", transparency=0),
        encoded(on_palette(), "PNG", transparency=bytes([0, 255])),
        encoded(
            half_transparent(),
            "PNG",
            save_all=True,
            append_images=[Image.new("RGBA", (SIZE, SIZE), "blue")],
            disposal=1,
        ),
        encoded(
            half_transparent(),
            "WEBP",
            save_all=True,
            append_images=[Image.new("RGBA", (SIZE, SIZE), "blue")],
            lossless=True,
            exact=True,
        ),
        encoded(
            on_palette(),
            "GIF",
            save_all=True,
            append_images=[on_palette().rotate(90)],
            transparency=0,
            disposal=2,
        ),
    ],
    ids=["png", "tiff", "tiff lzw", "webp", "jpeg 2000", "gif", "png palette", "png palette bytes"]
    + ["animated png", "animated webp", "animated gif"],
)
def test_what_a_transparent_part_hides_is_not_seen(data):
    found = decode_image(data, SIZE)
    assert (found[:, :4] == 255).all()
    assert (found[:, 4:] == (0, 128, 0)).all()


def test_a_premultiplied_tiff_is_unmultiplied_before_it_is_put_on_white():
    pixels = np.zeros((SIZE, SIZE, 4), np.uint8)
    pixels[:] = (100, 0, 50, 128)  # of the colour 200, 0, 100
    data = bytearray(encoded(Image.fromarray(pixels), "TIFF"))
    tag = data.find(struct.pack("<HHII", 338, 3, 1, 2))  # ExtraSamples: plain alpha
    data[tag + 8] = 1  # colours are multiplied by alpha
    assert np.abs(decode_image(bytes(data), SIZE).astype(int) - (227, 127, 177)).max() <= 2


def picture():
    rng = np.random.default_rng(5)
    return Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))


def texts(**options):
    info = PngImagePlugin.PngInfo()
    for name, text in options.items():
        info.add_text(name, text, zip=True)
    return info


def xmp_text(text):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", text, zip=True)
    return info


@pytest.mark.parametrize(
    "options",
    [
        {"pnginfo": texts(workflow="node " * 400_000)},
        {"pnginfo": xmp_text("<photoshop:DocumentAncestors/>" * 60_000)},
        {"pnginfo": texts(**{f"log{i}": "y" * 1_000_000 for i in range(66)})},
        {"icc_profile": bytes(3_000_000)},
        {"exif": b"Exif\0\0no EXIF at all"},
    ],
    ids=["text", "xmp", "many texts", "colour profile", "exif"],
)
def test_large_or_broken_metadata_of_a_png_does_not_hide_the_picture(options):
    found = decode_image(encoded(picture(), "PNG", **options), SIZE)
    np.testing.assert_array_equal(found, np.asarray(picture()))


def metadata():
    """Return EXIF with many kinds of values; the orientation says upright."""
    exif = Image.Exif()
    exif[0x010E], exif[0x0112], exif[0x011A] = "a picture", 1, 72.0
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    exif.get_ifd(0x8825)[1] = "N"
    return exif


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "MPO"])
def test_damage_in_the_metadata_never_hides_the_picture(kind):
    options = {"WEBP": {"lossless": True}, "MPO": {"save_all": True}}.get(kind, {})
    if kind == "MPO":
        options["append_images"] = [picture()]
    bare = encoded(picture(), kind, **options)
    expected = decode_image(bare, SIZE)
    data = encoded(picture(), kind, exif=metadata(), icc_profile=b"profile" * 20, **options)
    exif = metadata().tobytes().removeprefix(b"Exif\0\0")
    start = data.find(exif[8:])  # offsets depend on where it lies, so a TIFF's own is elsewhere
    if kind == "TIFF":
        start, length = 8, data.find(b"profileprofile") - 8  # the tags, which lie first
    else:
        assert start > 0
        length = len(exif) - 8
    rng = np.random.default_rng(0)
    ours = {256, 257, 258, 259, 262, 273, 277, 278, 279, 284}
    for _ in range(200):
        damaged = bytearray(data)
        for place in rng.integers(start, start + length, 5):
            damaged[place] = rng.integers(0, 256)
        if kind == "TIFF":  # the names of the tags stay, and those that store the pixels
            (count,) = struct.unpack_from("<H", data, 8)
            for entry in range(10, 10 + 12 * count, 12):
                kept = 12 if struct.unpack_from("<H", data, entry)[0] in ours else 2
                damaged[entry : entry + kept] = data[entry : entry + kept]
            (bits,) = struct.unpack_from("<I", data, data.find(struct.pack("<HHI", 258, 3, 3)) + 8)
            damaged[bits : bits + 6], damaged[8:10] = data[bits : bits + 6], data[8:10]
        found = decode_image(bytes(damaged), SIZE)
        turned = [np.rot90(expected, turn) for turn in range(4)]
        turned += [view[:, ::-1] for view in turned]  # the orientation itself may have been hit
        assert any((found == view).all() for view in turned)


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000", "PPM", "BMP", "MPO"])
def test_a_format_is_recognised_by_its_content(kind):
    found = decode_image(encoded(picture(), kind), SIZE).astype(float)
    difference = np.abs(found - np.asarray(picture())).mean()
    assert difference < (60 if kind in ("AVIF", "MPO") else 1)  # noise is hard to compress


@pytest.mark.parametrize("largest", [255, 1000, 65535])
def test_grey_netpbm_pictures_keep_their_upper_eight_bits(largest):
    values = np.arange(64).reshape(8, 8) * largest // 64
    stored = values.astype(">u2" if largest > 255 else np.uint8).tobytes()
    found = decode_image(b"P5 8 8 %d\n" % largest + stored, 8)
    assert np.abs(found[..., 0] - values * 255 / largest).max() <= 1


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a1" * 32 + b"\nsize 9\n"
HTML = b"<!DOCTYPE html><html><body>429 Too Many Requests</body></html>"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (HTML, "is HTML"),
        (b"\xef\xbb\xbf\n <html>", "is HTML"),
        (b'<?xml version="1.0"?><svg width="3"/>', "is SVG: convert it to PNG or JPEG"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "is HEIC: convert it to PNG or JPEG"),
        (b"\0\0\0\x18ftypavif" + bytes(40), "is a damaged AVIF file"),
        (b"\0\0\0\x18ftypisom" + bytes(40), "is a video (MP4 or QuickTime)"),
        (b"\xff\x0a" + bytes(40), "is JPEG XL: convert it to PNG or JPEG"),
        (POINTER, "is a git-lfs pointer and not the file itself; run git lfs pull in its folder"),
        (b"%PDF-1.7\n", "is a PDF"),
        (b"PK\x03\x04" + bytes(40), "is a ZIP archive"),
        (b'{"error": "rate limit"}', "is JSON"),
        (b"not found\r\n", "is text"),
        (bytes(40), "is no image of a known format"),
        (b"\x89PNG\r\n\x1a\n" * 9, "is a damaged PNG file"),
        (encoded(Image.new("LAB", (8, 8)), "TIFF"), "its colours are LAB, which are not converted"),
    ],
)
def test_a_file_that_is_no_picture_is_called_what_it_is(data, reason):
    with pytest.raises(BadImageError) as error:
        decode_image(data, SIZE)
    assert str(error.value).startswith(reason)
    assert "object at" not in str(error.value)
