"""Tell what a file is by its first bytes, so that a message can say why it is not used."""

import re
from pathlib import Path

from data_tools.errors import ConfigError

HEAD_BYTES = 512  # of a file; enough for every kind below
_LFS_POINTER = re.compile(rb"\s*version https://git-lfs\.github\.com/spec/")
_MAX_POINTER_BYTES = 1024  # by the specification of Git LFS
LFS_REASON = "is a git-lfs pointer and not the file itself; run git lfs pull in its folder"
# The four letters after "ftyp" in files made of boxes, as HEIF and MP4 are.
_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis"), "HEIC"),
    **dict.fromkeys((b"mif1", b"msf1"), "HEIF"),
    b"crx ": "a Canon raw photograph",
}
_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"8BPS", "a Photoshop file"),
    (b"%PDF", "a PDF"),
    (b"%!PS", "PostScript"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"DDS ", "a DDS texture"),
    (b"\x00\x00\x01\x00", "a Windows icon"),
    (b"qoif", "QOI"),
    (b"gimp xcf", "a GIMP file"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ", "xz"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"\x1a\x45\xdf\xa3", "a Matroska or WebM video"),
    (b"PAR1", "Parquet"),
    (b"ARROW1", "Arrow"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF", "HDF5"),
    (b"SQLite format 3", "an SQLite database"),
)
_MARKUP = (
    (re.compile(rb"<!doctype html|<html|<head|<body", re.IGNORECASE), "HTML"),
    (re.compile(rb"<svg", re.IGNORECASE), "SVG"),
    (re.compile(rb"<\?xml|<Error>", re.IGNORECASE), "XML"),
)


def content_kind(head: bytes) -> str | None:
    """Name what a file is; None if its first bytes are of no kind known here."""
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], "a video (MP4 or QuickTime)")
    if head[:4] == b"RIFF":
        return "WebP" if head[8:12] == b"WEBP" else "RIFF (a video or a sound)"
    if re.match(rb"P[1-7fF]\s", head):
        return "a Netpbm picture"
    for signature, name in _SIGNATURES:
        if head.startswith(signature):
            return name
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for pattern, name in _MARKUP:
        if pattern.match(text) or (text.startswith(b"<") and pattern.search(text)):
            return name
    if text[:1] in (b"{", b"["):
        return "JSON"
    if text and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in text):
        return "text"
    return None


def is_lfs_pointer(head: bytes) -> bool:
    """Tell whether git stores another file's checksum here, because Git LFS did not fetch it."""
    return _LFS_POINTER.match(head) is not None


def is_lfs_pointer_file(path: Path) -> bool:
    """Look into a file; one that cannot be read is left to its reader."""
    try:
        if path.stat().st_size > _MAX_POINTER_BYTES:
            return False
        with path.open("rb") as file:
            return is_lfs_pointer(file.read(HEAD_BYTES))
    except OSError:
        return False


def refuse_lfs_pointer(flag: str, path: Path) -> None:
    """Refuse a file that Git LFS did not fetch.

    Raises:
        ConfigError: it is a pointer.
    """
    if is_lfs_pointer_file(path):
        raise ConfigError(f"{flag} {path}: {LFS_REASON}.")
