"""Walking tars as people have them: joined, damaged, compressed, with all kinds of members."""

import bz2
import gzip
import io
import lzma
import tarfile

import pytest

from data_tools.sources.tar_members import BadTarError, content_of, walk
from tests.support.image_inputs import make_tar


def walked(path):
    with path.open("rb") as file:
        return [(m.archive, m.name, content_of(file, m)) for m in walk(file) if m.is_plain]


def files(first, count):
    return [(f"{i:04d}.txt", b"%d" % i * i) for i in range(first, first + count)]


def test_members_come_in_order_with_their_content(tmp_path):
    found = walked(make_tar(tmp_path / "a.tar", files(0, 50)))

    assert found == [(0, *entry) for entry in files(0, 50)]


def test_archives_that_were_joined_are_read_to_the_end(tmp_path):
    parts = [make_tar(tmp_path / f"{i}.tar", files(10 * i, 3)).read_bytes() for i in range(3)]
    (tmp_path / "all.tar").write_bytes(b"".join(parts))

    found = walked(tmp_path / "all.tar")

    assert found == [(i, *entry) for i in range(3) for entry in files(10 * i, 3)]


@pytest.mark.parametrize("num_zeros", [512, 1024, 9 * 512, (1 << 20) + 512])
def test_any_number_of_zero_blocks_may_stand_between_joined_archives(tmp_path, num_zeros):
    part = make_tar(tmp_path / "a.tar", files(1, 2)).read_bytes().rstrip(b"\0")
    part += bytes(-len(part) % 512)
    (tmp_path / "all.tar").write_bytes(part + bytes(num_zeros) + part + bytes(1024))

    assert [archive for archive, _, _ in walked(tmp_path / "all.tar")] == [0, 0, 1, 1]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_names_of_any_length_and_bytes_come_back(tmp_path, form):
    names = ["x" * 300 + ".jpg", "d/" * 90 + "y.jpg", "é.jpg", "caf\udce9.jpg", "/abs.jpg", "../u"]
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))

    found = [name for _, name, _ in walked(tmp_path / "a.tar")]

    assert found == names


def test_links_folders_and_sparse_members_have_no_content_of_their_own(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo("x.jpg")
            member.type, member.linkname = kind, "y.jpg"
            tar.addfile(member)
        sparse = tarfile.TarInfo("x.jpg")
        sparse.pax_headers = {"GNU.sparse.map": "0,3", "GNU.sparse.size": "9"}
        sparse.size = 3
        tar.addfile(sparse, io.BytesIO(b"abc"))

    with (tmp_path / "a.tar").open("rb") as file:
        assert [member.is_plain for member in walk(file)] == [False] * 5


def changed(data, place, value):
    return data[:place] + bytes([data[place] ^ value]) + data[place + 1 :]


@pytest.mark.parametrize(
    ("damage", "clause"),
    [
        (lambda d: b"", "is empty; copy it again"),
        (lambda d: b"<html>" * 200, "is no tar, or damaged at its beginning"),
        (lambda d: d[:100], "is no tar, or damaged at its beginning"),
        (gzip.compress, "is compressed with gzip, so that no single file can be read from it; "),
        (bz2.compress, "is compressed with bzip2"),
        (lzma.compress, "is compressed with xz"),
        (lambda d: b"\x28\xb5\x2f\xfd" + d, "is compressed with zstd"),
        (lambda d: b"PK\x03\x04" + d, "is a ZIP archive"),
        (lambda d: changed(d, 1024 + 3, 1), "has a damaged header after 1,024 bytes, behind '0001"),
        (lambda d: d[: 1024 + 200], "has a damaged header after 1,024 bytes, behind '0001.txt'"),
        (lambda d: d[:1024], "is cut off or damaged after 1,024 bytes: it does not end as a tar"),
        (lambda d: d[:600], "is cut off inside or behind '0001.txt'"),
        (lambda d: d + b"\1" * 512, "has a damaged header after 10,240 bytes, behind '0002.txt'"),
        (lambda d: d + changed(d, 3, 1), "has a damaged header after 10,240 bytes, behind"),
        (lambda d: d + d[:1024], "is cut off or damaged after 11,264 bytes"),
    ],
)
def test_what_may_have_lost_files_is_refused(tmp_path, damage, clause):
    data = make_tar(tmp_path / "a.tar", files(1, 2)).read_bytes()
    assert len(data) == 10240
    (tmp_path / "a.tar").write_bytes(damage(data))

    with pytest.raises(BadTarError) as error:
        walked(tmp_path / "a.tar")

    assert str(error.value).startswith(clause) and "\n" not in str(error.value)
