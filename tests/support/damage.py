"""Damage to an encoded set, as disks and people do it: one function each."""

import json
import shutil

from data_tools.shards.manifest import DatasetManifest

SHARD = "00001.tar"


def layout_of(folder):
    return DatasetManifest.load(folder, check_shards=False).latent.record_layout


def overwrite(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def cut(folder):
    path = folder / SHARD
    path.write_bytes(path.read_bytes()[: 3 * layout_of(folder).stride + 900])


def lengthen(folder):
    with (folder / SHARD).open("ab") as file:
        file.write(bytes(10240))


def flip_header(folder):
    layout = layout_of(folder)
    overwrite(folder / SHARD, 3 * layout.stride + layout.moments_offset + 105, b"\xff")  # its mode


def flip_value(of_mirrored):
    def apply(folder):
        layout = layout_of(folder)
        path = folder / SHARD
        place = 3 * layout.stride + 1001
        place += layout.flip_offset if of_mirrored else layout.moments_offset
        overwrite(path, place, bytes([path.read_bytes()[place] ^ 1]))

    return apply


def change_npy_header(folder):
    layout = layout_of(folder)
    path = folder / SHARD
    place = 3 * layout.stride + layout.moments_offset + 512
    overwrite(path, place, path.read_bytes()[place:][:128].replace(b"<f2", b"<i2"))


def change_label(label):
    def apply(folder):
        overwrite(folder / SHARD, 3 * layout_of(folder).stride + 512, label)

    return apply


def copy_shard(other):
    return lambda folder: shutil.copy(folder / other, folder / SHARD)
