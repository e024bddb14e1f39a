"""Draw a picture of a data set: some samples, decoded, with the names of their classes.

C latent channels, H W latent size.
"""

import math
import warnings
from collections import Counter
from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from data_tools.errors import ConfigError, count_of, os_errors_as
from data_tools.files import replace_file
from data_tools.shards.manifest import DatasetManifest
from data_tools.storage.locations import Location
from data_tools.stream.plan import BLOCK
from data_tools.stream.reader import SampleReader
from data_tools.stream.training_data import DataPart, TrainingData
from data_tools.vae.autoencoder import decode_pixels, load_vae, resolve_device
from models.latents import frozen_latents, scale_and_shift

MAX_PICTURES = 60  # ten by six
MAX_PER_CLASS = 8
_MAX_LOOKED_AT = 8192  # samples whose label is read in search of every class
_ASPECT = 1.6  # width over height of the whole picture
_MIN_TILE, _MAX_TILE = 96, 256  # pixels; a caption needs room
_GAP, _LINE, _TITLE = 6, 20, 40  # between pictures; of a caption's line; above all
_LETTER = 6  # width of a letter
_DPI = 100


@dataclass(frozen=True)
class PreviewSample:
    """One sample: its label, what to call it, and the posterior's mean (C, H, W) float32."""

    label: int
    caption: str
    latent: torch.Tensor


def choose_samples(manifest: DatasetManifest, without: Collection[str] = ()) -> list[PreviewSample]:
    """Choose a few samples of each class where there are few, or as many classes as fit.

    Args:
        without: names of shards not to read.

    Returns:
        at most MAX_PICTURES, by label; fewer if classes are rarer than can be searched for.
    """
    num_classes = max(1, manifest.num_classes)
    per_class = MAX_PICTURES if num_classes == 1 else MAX_PER_CLASS
    per_class = max(1, min(per_class, MAX_PICTURES // num_classes))
    most, number = min(MAX_PICTURES, per_class * num_classes), manifest.num_samples
    rng = np.random.default_rng(0)
    if number <= _MAX_LOOKED_AT:
        ids = rng.permutation(number)
    else:
        ids = np.unique(rng.integers(0, number, _MAX_LOOKED_AT))
        rng.shuffle(ids)
    is_read = [shard.name not in without for shard in manifest.shards]
    ids = ids[np.repeat(is_read, [shard.num_samples for shard in manifest.shards])[ids]]
    location = Location(str(manifest.folder), manifest.folder)
    part = DataPart(manifest, location, location, np.arange(num_classes))
    data = TrainingData(manifest, (part,), part_counts=(1,), weights=(BLOCK,))
    names = {entry.index: entry.name for entry in manifest.classes}
    taken: Counter[int] = Counter()
    chosen: list[PreviewSample] = []
    with closing(SampleReader(data, data.stores("size", None))) as reader:
        while len(chosen) < most and len(ids):
            asked, ids = ids[:MAX_PICTURES], ids[MAX_PICTURES:]
            dtype = getattr(torch, manifest.latent.dtype)
            arrays = torch.empty((len(asked), *manifest.latent.shape), dtype=dtype)
            labels = reader.read(asked, np.zeros(len(asked), bool), arrays)
            for label, sample_id, array in zip(labels.tolist(), asked, arrays.float(), strict=True):
                if taken[label] < per_class and len(chosen) < most:
                    taken[label] += 1
                    mean = array if manifest.is_frozen else array.chunk(2)[0]
                    chosen.append(PreviewSample(label, names.get(label, str(sample_id)), mean))
    return sorted(chosen, key=lambda sample: sample.label)


def write_preview(
    path: Path,
    manifest: DatasetManifest,
    *,
    vae: str | None = None,
    device: str | None = None,
    without: Collection[str] = (),
) -> int:
    """Decode some samples and write them as one PNG.

    Args:
        vae: where the data set's VAE is; None = where dataset.json says. Its checksum must agree.
        without: names of shards not to read.

    Returns:
        the number of pictures.
    """
    where, reference = resolve_device(device), manifest.vae
    samples = choose_samples(manifest, without=without)
    if not samples:
        raise ConfigError(
            f"--preview {path}: no shard can be read, so there is nothing to show; repair the data "
            "set first."
        )
    wanted = reference.sha256 or None
    autoencoder = load_vae(vae or reference.id, device=where, expected_sha256=wanted)
    latents = torch.stack([sample.latent for sample in samples])  # (N, C, H, W)
    scaled = frozen_latents(latents, *scale_and_shift(*autoencoder.normalisation, "cpu"))
    pixels = decode_pixels(autoencoder, scaled.to(where))
    title = (
        f"{manifest.folder.resolve().name}: {len(samples)} of "
        f"{count_of(manifest.num_samples, 'sample')}, "
        f"{count_of(manifest.num_classes or 'no', 'class')}, "
        f"{pixels.shape[2]}x{pixels.shape[1]} pixels, decoded by {reference.id}"
    )
    picture = draw_grid(pixels, [sample.caption for sample in samples], title)
    with os_errors_as(f"--preview {path}: cannot be written", "name another file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # drawn as boxes
        replace_file(path, lambda file: picture.savefig(file, format="png"))
    return len(samples)


def draw_grid(pixels: np.ndarray, captions: list[str], title: str) -> Figure:
    """Lay pictures out in rows; a caption stands once above neighbours that share it.

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
    rows = math.ceil(len(pixels) / columns)
    width, height = columns * (tile + _GAP) + _GAP, rows * (tile + _LINE) + _TITLE
    figure = Figure((width / _DPI, height / _DPI), dpi=_DPI)
    text = {"fontsize": "x-small", "parse_math": False}  # a $ in a name is a $
    figure.text(_GAP / width, 1 - _GAP / height, title, va="top", **text)
    for place, picture in enumerate(pixels):
        row, column = divmod(place, columns)
        left, bottom = _GAP + column * (tile + _GAP), height - _TITLE - (row + 1) * (tile + _LINE)
        axes = figure.add_axes((left / width, bottom / height, tile / width, tile / height))
        axes.imshow(picture, interpolation="antialiased")
        axes.set_axis_off()
        if column == 0 or captions[place] != captions[place - 1]:
            same = captions[place : (row + 1) * columns].count(captions[place])
            room = same * tile // _LETTER
            caption = captions[place]
            caption = caption if len(caption) <= room else caption[: room - 3] + "..."
            axes.set_title(caption, loc="left", pad=3, **text)
    return figure
