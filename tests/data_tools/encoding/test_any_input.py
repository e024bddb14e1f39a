"""Whatever lies in an input, each file is encoded, named as damaged, or counted as left out.

Or the input is refused in one sentence, and there is no data set. The inputs are made of the odd
parts that people's folders, tars and lists have.
"""

import contextlib
import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools.encode_latents import parse_arguments
from data_tools.encoding import command
from data_tools.encoding.command import EncodingRun
from data_tools.errors import ConfigError
from data_tools.shards.manifest import MANIFEST_NAME, DatasetManifest
from data_tools.vae.autoencoder import load_vae
from data_tools.verification.verify import verify

VAE = load_vae("data_tools/demo_vae", device=torch.device("cpu"))
FLAGS = (
    *("--vae", "data_tools/demo_vae", "--device", "cpu", "--size", "8", "--no-flip"),
    *("--shard-size", "3", "--batch-size", "2", "--workers", "1"),
    "--dry-run",  # keeps no indexes of tars
)
JUNK_FOLDERS = ("__MACOSX", "@eaDir")
BOUNDED = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def encoded(kind: str, mode: str = "RGB") -> bytes:
    """Return a small picture as a file."""
    buffer = io.BytesIO()
    Image.new(mode, (20, 12), 90).save(buffer, kind)
    return buffer.getvalue()


PNG = encoded("PNG")
CONTENTS = {
    "picture": PNG,
    "jpeg": encoded("JPEG"),
    "gray": encoded("PNG", "LA"),
    "gif": encoded("GIF", "P"),
    "empty": b"",
    "cut": PNG[: len(PNG) // 2],
    "page": b"<!DOCTYPE html><title>Sign in</title>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "label": b"1",
    "other label": b"0\n",
    "no label": b"tench",
}
# Pictures are likely, so that many inputs can be encoded.
contents = st.sampled_from(["picture"] * 8 + list(CONTENTS))
folders = st.sampled_from(
    ["a", "b", "a", "b", "A", "a/deep", "007", "7", "a.b", "größe", "bad\udcff", "new\nline", "''"]
    + ["with blank ", "back\\slash", ".hidden", "a/.hidden", "train", "test", *JUNK_FOLDERS]
)
stems = st.sampled_from(
    [
        "1",
        "2",
        "3",
        "1.seg",
        "22.05",
        "ü",
        "\udcfe",
        "a\tb",
        "n\nl",
        ".x",
        "._1",
        "{a,b}",
        "*",
        "-r",
    ]
)
suffixes = st.sampled_from(
    [".png"] * 6 + [".PNG", ".jpg", ".webp", ".jfif", ".cls", ".txt", ".heic", ".json", ".", ""]
)
rarely = st.sampled_from([False] * 5 + [True])
BESIDE = ("link", "link to nothing", "link to a folder", "loop", "pipe", "empty folder")


@st.composite
def files(draw: st.DrawFn) -> list[tuple[str, bytes]]:
    """Names with their contents; flat, or in folders."""
    is_flat = draw(st.booleans())
    names = st.tuples(st.just("") if is_flat else folders, stems, suffixes)
    found = draw(st.lists(st.tuples(names, contents), max_size=7, unique_by=lambda one: one[0]))
    return [
        (
            f"{folder}/{stem}{suffix}".removeprefix("/"),
            # What a label holds is a number, as a rule.
            CONTENTS["label" if suffix == ".cls" and kind == "picture" else kind],
        )
        for (folder, stem, suffix), kind in found
    ]


@pytest.fixture(autouse=True, scope="module")
def one_vae() -> Iterator[None]:
    """Read the VAE from the disk once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "load_vae", lambda *args, **options: VAE)
        yield


@contextlib.contextmanager
def new_folder() -> Iterator[Path]:
    """Make a folder for one example."""
    folder = Path(tempfile.mkdtemp())
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@dataclass
class Outcome:
    """What became of an input.

    Attributes:
        refusal: the sentence; "" where it was encoded.
        num_images: that were looked at, the damaged ones too.
        left_out: how many of each kind.
    """

    refusal: str = ""
    num_images: int = 0
    left_out: dict[str, int] = field(default_factory=dict)


def outcome(text: Path, output: Path) -> Outcome:
    """Encode; check all that holds for every input."""
    is_begun = False
    try:
        run = EncodingRun(parse_arguments([*FLAGS, "--input", str(text), "--output", str(output)]))
        run.describe()
        assert not output.exists(), "written before it was described"
        is_begun = True
        manifest = run.encode()
    except ConfigError as err:
        sentence = str(err)
        assert sentence.isprintable() and sentence.endswith("."), sentence
        assert sentence.startswith("--"), sentence
        assert not (output / MANIFEST_NAME).exists()
        assert is_begun or not output.exists(), (
            f"refused, and yet something was written: {sentence}"
        )
        return Outcome(sentence)
    skipped = [name for shard in manifest.shards for name in shard.skipped]
    assert manifest.num_samples + len(skipped) == len(run.source) == manifest.source.num_files
    assert manifest.source.num_skipped == len(skipped)
    assert not manifest.classes or sum(c.count for c in manifest.classes) == manifest.num_samples
    assert all(entry.count > 0 and entry.examples for entry in manifest.left_out)
    read = DatasetManifest.load(output)
    assert read.described() == manifest
    findings = verify(output, is_quick=False, num_workers=1).findings
    assert [finding for finding in findings if finding.part != "note"] == []
    left_out = {entry.kind: entry.count for entry in manifest.left_out}
    return Outcome("", len(run.source), left_out)


def write_tree(root: Path, named: list[tuple[str, bytes]], beside: list[str]) -> None:
    """Write files, and things that are none."""
    root.mkdir()
    for name, content in named:
        with contextlib.suppress(FileExistsError, NotADirectoryError, IsADirectoryError):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
    place = next((path for path in sorted(root.iterdir()) if path.is_dir()), root)
    for what in beside:
        if what == "link" and named:
            (place / "linked.png").symlink_to(root / named[0][0])
        elif what == "link to nothing":
            (place / "gone.png").symlink_to("nothing")
        elif what == "link to a folder":
            (root / "linked").symlink_to(place if place != root else root.parent / "none")
        elif what == "loop":
            (place / "loop").symlink_to(root)
        elif what == "pipe":
            os.mkfifo(place / "pipe.png")
        elif what == "empty folder":
            (root / "empty").mkdir(exist_ok=True)


def visible(folder: Path, above: tuple[Path, ...] = ()) -> int:
    """Count files, and what is hidden as one each; raise RecursionError for a loop."""
    if folder.resolve() in above:
        raise RecursionError
    count = 0
    for entry in os.scandir(folder):
        if entry.name.startswith(".") or entry.name in JUNK_FOLDERS or not entry.is_dir():
            count += 1
        else:
            count += visible(folder / entry.name, (*above, folder.resolve()))
    return count


@BOUNDED
@given(files(), st.lists(st.sampled_from(BESIDE), max_size=2, unique=True))
def test_every_file_of_a_folder_is_accounted_for(named, beside):
    with new_folder() as here:
        write_tree(here / "in", named, beside)
        found = outcome(here / "in", here / "out")
        if not found.refusal:
            left = sum(n for kind, n in found.left_out.items() if not kind.startswith("folders"))
            assert found.num_images + left == visible(here / "in")


@st.composite
def archives(draw: st.DrawFn) -> tuple[bytes, list[str]]:
    """One tar, joined of up to two, perhaps cut off; and the names of its files."""
    content, names = b"", []
    for named in draw(st.lists(files(), min_size=1, max_size=2)):
        buffer = io.BytesIO()
        kind = draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
        with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
            tar.addfile(_member("a", tarfile.DIRTYPE))
            for name, data in named:
                info = _member(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            if named and draw(rarely):
                link = _member(
                    "a/link.png", draw(st.sampled_from([tarfile.LNKTYPE, tarfile.SYMTYPE]))
                )
                link.linkname = named[0][0]
                tar.addfile(link)
                names.append(link.name)
        names += [name for name, _ in named]
        content += buffer.getvalue()
    if draw(rarely):
        content = content[: draw(st.integers(0, len(content) - 1))]
        names.clear()
    return content, names


def _member(name: str, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    return info


@BOUNDED
@given(archives())
def test_every_member_of_a_tar_is_accounted_for(archive):
    content, names = archive
    with new_folder() as here:
        (here / "in.tar").write_bytes(content)
        found = outcome(here / "in.tar", here / "out")
        if found.refusal or not names:
            return
        num_used = len(names) - sum(found.left_out.values())
        num_labels = sum(name.endswith(".cls") for name in names)
        with_labels = found.num_images * 2
        assert num_used == found.num_images or num_used == with_labels <= 2 * num_labels


@st.composite
def lists(draw: st.DrawFn) -> tuple[bytes, int]:
    """A list as an editor may have saved it, and how many images it names."""
    paths = st.sampled_from(
        ["1.png", "a/2.png", "./1.png", "ü.png", "1.png", "n.txt", "a", "no.png"]
    )
    named = draw(st.lists(paths, min_size=1, max_size=6))
    mend = draw(st.sampled_from(["{}", "{}", '"{}"', " {} ", "a\\..\\{}", "{}\t"]))
    label = draw(st.sampled_from(["", "", "\t0", "\tcat", "\t 1", "\t1\t2", " 1"]))
    lines = [mend.format(path) + label for path in named]
    if draw(rarely):
        lines[0] = named[0]
    if draw(st.booleans()):
        lines.insert(0, "")
    text = draw(st.sampled_from(["\n", "\r\n"])).join(lines)
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"]))
    end = draw(st.sampled_from([b"", b"\n", b"\0", b"\xff\n"])) if draw(rarely) else b""
    return text.encode(encoding) + end, len(named) + (end == b"\xff\n")


@BOUNDED
@given(lists())
def test_every_line_of_a_list_is_accounted_for(made):
    content, num_named = made
    with new_folder() as here:
        (here / "a").mkdir()
        for name in ("1.png", "a/2.png", "ü.png"):
            (here / name).write_bytes(PNG)
        (here / "n.txt").write_bytes(b"no picture")
        (here / "in.txt").write_bytes(content)
        found = outcome(here / "in.txt", here / "out")
        if not found.refusal:
            assert found.num_images == num_named
