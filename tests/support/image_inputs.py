"""Small inputs for encoding: pictures, folders and tars of them, and what is found in them."""

import io
import tarfile

from PIL import Image


def picture(shade=0):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def save(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(shade))


def make_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def names(source):
    listed = [name.decode() for name in source.raw_names()]
    assert [source.name(i) for i in range(len(source))] == listed
    return listed


def described(source):
    return [(c.index, c.id, c.count) for c in source.classes]
