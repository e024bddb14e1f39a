"""Draw a picture of a data set: some samples, decoded, with the names of their classes.

C latent channels, H W latent size.
"""

import io
import itertools
import math
import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from data_tools.errors import ConfigError, count_of, told_as
from data_tools.files import replace_file
from data_tools.shards.foreign_tar import index_name
from data_tools.shards.manifest import DatasetManifest
from data_tools.shards.records import KEY_DIGITS, DamagedRecordError
from data_tools.vae.autoencoder import decode_pixels, load_vae
from models.latents import frozen_latents

MAX_PICTURES = 60  # ten by six
MAX_PER_CLASS = 8
_MAX_LOOKED_AT = 8192  # samples whose label is read in search of every class
_ASPECT = 1.6  # width over height of the whole picture
_MIN_TILE, _MAX_TILE = 96, 256  # pixels; a caption needs room
_MAX_NPY_HEADER = 1024
_GAP, _LINE, _MARGIN, _FONT_SIZE = 6, 15, 16, 14


@dataclass(frozen=True)
class PreviewSample:
    """One sample: its label, what to call it, and the posterior's mean (C, H, W) float32."""

    label: int
    caption: str
    latent: torch.Tensor


def choose_samples(
    manifest: DatasetManifest, seed: int = 0, without: Collection[str] = ()
) -> list[PreviewSample]:
    """Choose a few samples of each class where there are few, or as many classes as fit.

    Args:
        manifest: of a data set with its shards.
        seed: another one chooses others.
        without: names of shards not to read.

    Returns:
        at most MAX_PICTURES, by label; fewer if classes are rarer than can be searched for.
    """
    num_classes = max(1, manifest.num_classes)
    per_class = MAX_PICTURES if num_classes == 1 else MAX_PER_CLASS
    per_class = max(1, min(per_class, MAX_PICTURES // num_classes))
    ends = np.cumsum([shard.num_samples for shard in manifest.shards])
    number = manifest.num_samples
    rng = np.random.default_rng(seed)
    if number <= _MAX_LOOKED_AT:
        ids = rng.permutation(number)
    else:
        ids = np.unique(rng.integers(0, number, _MAX_LOOKED_AT))
        rng.shuffle(ids)
    taken: Counter[int] = Counter()
    chosen = []
    for sample_id in ids.tolist():
        place = int(np.searchsorted(ends, sample_id, side="right"))
        shard = manifest.shards[place]
        if shard.name in without:
            continue
        row = sample_id - int(ends[place]) + shard.num_samples
        sample = _read(manifest, place, row)
        if taken[sample.label] < per_class:
            taken[sample.label] += 1
            chosen.append(sample)
        if len(chosen) == min(MAX_PICTURES, per_class * num_classes):
            break
    return sorted(chosen, key=lambda sample: sample.label)


def write_preview(
    path: Path,
    manifest: DatasetManifest,
    *,
    vae: str | None = None,
    device: torch.device | str = "cpu",
    without: Collection[str] = (),
) -> int:
    """Decode some samples and write them as one PNG.

    Args:
        path: of the picture.
        manifest: of a data set with its shards.
        vae: where the data set's VAE is; None = where dataset.json says. Its checksum must agree.
        device: that decodes.
        without: names of shards not to read.

    Returns:
        the number of pictures.
    """
    samples = choose_samples(manifest, without=without)
    if not samples:
        raise ConfigError(
            f"--preview {path}: no shard can be read, so there is nothing to show; repair the data "
            "set first."
        )
    reference = manifest.vae
    autoencoder = load_vae(
        vae or reference.id, device=device, expected_sha256=reference.sha256 or None
    )
    latents = torch.stack([sample.latent for sample in samples])  # (N, C, H, W)
    scaled = frozen_latents(latents, *autoencoder.scale_and_shift("cpu"))
    pixels = decode_pixels(autoencoder, scaled.to(device))
    title = (
        f"{manifest.folder.resolve().name}: {len(samples)} of "
        f"{count_of(manifest.num_samples, 'sample')}, "
        f"{count_of(manifest.num_classes or 'no', 'class')}, "
        f"{pixels.shape[2]}x{pixels.shape[1]} pixels, "
        f"decoded by {reference.id}"
    )
    picture = draw_grid(pixels, [sample.caption for sample in samples], title)
    with told_as(f"--preview {path}: cannot be written", "name another file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda file: picture.save(file, "png"))
    return len(samples)


def draw_grid(pixels: np.ndarray, captions: list[str], title: str) -> Image.Image:
    """Lay pictures out in rows; a caption stands once under neighbours that share it.

    Args:
        pixels: uint8 (N, height, width, 3).
        captions: (N,), equal ones next to each other.
        title: one line above.
    """
    tile = min(_MAX_TILE, max(_MIN_TILE, pixels.shape[2]))
    group = max(Counter(captions).values())
    columns = max(1, round(math.sqrt(len(pixels) * _ASPECT)))
    if group < len(pixels):  # whole classes in a row
        columns = max(1, round(columns / group)) * group
    rows, step = math.ceil(len(pixels) / columns), tile + _GAP
    font, small = ImageFont.load_default(_FONT_SIZE), ImageFont.load_default(_FONT_SIZE - 2)
    num_lines = 2 if any(small.getlength(caption) > tile for caption in captions) else 1
    row_height = tile + (1 + num_lines) * _LINE
    width = 2 * _MARGIN + columns * step - _GAP
    picture = Image.new("RGB", (width, 2 * _MARGIN + _FONT_SIZE + rows * row_height), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((_MARGIN, _MARGIN), _fitting(title, width - 2 * _MARGIN, font), "black", font)
    for row in range(rows):
        places = range(row * columns, min((row + 1) * columns, len(pixels)))
        y = 2 * _MARGIN + _FONT_SIZE + row * row_height
        for column, place in enumerate(places):
            thumbnail = Image.fromarray(pixels[place]).resize(
                (tile, tile), Image.Resampling.BICUBIC
            )
            picture.paste(thumbnail, (_MARGIN + column * step, y))
        for caption, run in itertools.groupby(places, key=captions.__getitem__):
            run_places = list(run)
            first = _MARGIN + (run_places[0] - places[0]) * step
            last = _MARGIN + (run_places[-1] - places[0]) * step + tile
            if len(run_places) > 1:
                draw.line([(first, y + tile + 3), (last - 1, y + tile + 3)], "gray")
            for number, text in enumerate(_wrapped(caption, last - first, small, num_lines)):
                at = ((first + last) // 2, y + tile + 6 + number * _LINE)
                draw.text(at, text, "black", small, anchor="ma")
    return picture


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont, num_lines: int) -> list[str]:
    """Break a text between words into at most so many lines; cut what is too wide."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and len(lines) < num_lines and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return [_fitting(line, width, font) for line in lines]


def _fitting(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """Cut a text so that it is no wider than this."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def _read(manifest: DatasetManifest, place: int, row: int) -> PreviewSample:
    shard = manifest.shards[place]
    path = manifest.folder / shard.name
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if shard.stride:
                label, key, values = _read_strided(descriptor, manifest, row)
            else:
                index = np.load(manifest.folder / index_name(shard.name), allow_pickle=False)
                offset, _, label = index[row].tolist()
                dtype = np.dtype(manifest.latent.dtype)
                num_bytes = _MAX_NPY_HEADER + math.prod(manifest.latent.shape) * dtype.itemsize
                file = io.BytesIO(os.pread(descriptor, num_bytes, offset))
                values, key = np.load(file, allow_pickle=False), str(row)
                if list(values.shape) != manifest.latent.shape:
                    raise DamagedRecordError(f"holds an array {list(values.shape)}")
        finally:
            os.close(descriptor)
    except OSError as err:
        raise ConfigError(
            f"{err.filename or path}: cannot be read ({err.strerror}); run "
            f"python data_tools/verify_shards.py --data {manifest.folder}, it says what to do."
        ) from err
    except (DamagedRecordError, ValueError, IndexError) as err:
        raise ConfigError(
            f"{path}: sample {row}: {err}; run python data_tools/verify_shards.py "
            f"--data {manifest.folder}, it says what to do."
        ) from err
    names = {entry.index: entry.name for entry in manifest.classes}
    latent = torch.from_numpy(values.astype(np.float32))
    if manifest.latent.kind == "moments":
        latent = latent.chunk(2)[0]
    return PreviewSample(label, names.get(label, key), latent)


def _read_strided(
    descriptor: int, manifest: DatasetManifest, row: int
) -> tuple[int, str, np.ndarray]:
    layout = manifest.latent.record_layout
    head = np.empty((1, layout.head_bytes), np.uint8)
    array = np.empty(layout.array_bytes, np.uint8)
    layout.read_rows(descriptor, [row], [False], [memoryview(head[0])], [memoryview(array)])
    (number,) = layout.check(head, np.zeros(1, bool)).tolist()
    key = head[0, :KEY_DIGITS].tobytes().decode()
    return number, key, array.view(np.float16).reshape(layout.shape)
