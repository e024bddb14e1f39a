"""Cut the metadata out of an image file, so that damage in it does not hide the picture.

Pillow reads texts, colour profiles and EXIF before the pixels, and gives the whole file up where
one of them is damaged or unusually large. Pixels, palettes and transparent colours stay as they
are.
"""

import struct
from collections.abc import Iterator

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Chunks that do not decide the pixels; of the others, those of animations choose the frame.
_PNG_DROPPED = frozenset({b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"pHYs", b"tIME", b"sPLT", b"hIST"})
_JPEG_START, _JPEG_SCAN = 0xD8, 0xDA
_JPEG_COMMENT = 0xFE
# JFIF and Adobe's segment say how the colours are stored.
_JPEG_APPLICATIONS = frozenset(range(0xE0, 0xF0)) - {0xE0, 0xEE}
# Tags that say how a TIFF's pixels are stored; everything else is left out.
_TIFF_KEPT = frozenset(
    [254, 255, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 280, 281, 284, 292, 293]
    + [317, 320, 322, 323, 324, 325, 332, 334, 338, 339, 340, 341, 347, 512, 513, 514, 515]
    + [517, 518, 519, 520, 521, 529, 530, 531, 532]
)
_TIFF_ORIENTATION = 274
_TIFF_ENTRY = 12  # bytes


def without_metadata(data: bytes) -> Iterator[bytes]:
    """Go through versions of an image file with ever less metadata; none for other formats."""
    if data.startswith(_PNG_SIGNATURE):
        yield _png(data, _PNG_DROPPED)
        yield _png(data, _PNG_DROPPED | {b"eXIf"})
    elif data.startswith(b"\xff\xd8\xff"):
        # EXIF says which side is up: the others go first.
        yield _jpeg(data, keeps_exif=True)
        yield _jpeg(data, keeps_exif=False)
    elif data[:4] in (b"II*\x00", b"MM\x00*"):
        yield _tiff(data, _TIFF_KEPT | {_TIFF_ORIENTATION})
        yield _tiff(data, _TIFF_KEPT)


def _png(data: bytes, dropped: frozenset[bytes]) -> bytes:
    parts, place = [_PNG_SIGNATURE], len(_PNG_SIGNATURE)
    while place + 12 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        end = place + 12 + size  # length, name and checksum beside the content
        if data[place + 4 : place + 8] not in dropped:
            parts.append(data[place:end])
        place = end
    parts.append(data[place:])
    return b"".join(parts)


def _jpeg(data: bytes, keeps_exif: bool) -> bytes:
    parts, place = [data[:2]], 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != _JPEG_SCAN:
        marker = data[place + 1]
        if marker == 0xFF:  # markers may be padded
            place += 1
            continue
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        is_exif = data[place + 4 : place + 10] == b"Exif\x00\x00"
        is_dropped = marker == _JPEG_COMMENT or marker in _JPEG_APPLICATIONS
        if not is_dropped or (is_exif and keeps_exif):
            parts.append(data[place:end])
        place = end
    parts.append(data[place:])
    return b"".join(parts)


def _tiff(data: bytes, kept_tags: frozenset[int]) -> bytes:
    """Shorten the list of tags of the first picture in its place; nothing else moves."""
    order = "<" if data[:2] == b"II" else ">"
    try:
        (start,) = struct.unpack_from(order + "I", data, 4)
        (count,) = struct.unpack_from(order + "H", data, start)
    except struct.error:
        return data
    table = data[start + 2 : start + 2 + count * _TIFF_ENTRY]
    whole = len(table) - len(table) % _TIFF_ENTRY  # the file may be cut off
    entries = (table[i : i + _TIFF_ENTRY] for i in range(0, whole, _TIFF_ENTRY))
    kept = [part for part in entries if struct.unpack_from(order + "H", part)[0] in kept_tags]
    tags = struct.pack(order + "H", len(kept)) + b"".join(kept) + bytes(4)  # no further picture
    return data[:start] + tags + data[start + len(tags) :]
