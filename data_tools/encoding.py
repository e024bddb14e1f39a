"""Encoding image files into shards of raw latents: settings, one shard, the finished data set.

The shard is the unit of work. Which images form a shard, and which of them form a batch, follows
from the settings alone; so an interrupted run that is repeated, or several processes that share
the shards, end with the same bytes as one run (on equal machines with equal numbers of threads:
these decide the order in which floating-point sums are taken).

N batch, C latent channels, H W latent size.
"""

import hashlib
import importlib.metadata
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import torch

from data_tools.errors import ConfigError
from data_tools.files import MalformedError, from_json, replace_file, write_json
from data_tools.images import BadImageError, ImageFolder, load_pixels
from data_tools.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    ChannelStatistics,
    ClassEntry,
    ImageFormat,
    LatentFormat,
    Manifest,
    Members,
    Shard,
    SourceList,
    VaeReference,
)
from data_tools.order import permutation
from data_tools.records import RecordLayout, Sample, sample_key
from data_tools.vae import Vae, encode_moments
from models.latents import LOG_VARIANCE_MAX, LOG_VARIANCE_MIN

SETTINGS_NAME = "encoding.json"
CROP = "adm-center"
_SPLIT = 3  # key of the permutation that deals images to shards


@dataclass(frozen=True)
class EncodingSettings:
    """Everything that decides the bytes of the shards; kept in the output as encoding.json."""

    format_version: int
    vae: VaeReference
    latent: LatentFormat
    image: ImageFormat
    source: str  # sha256 of the list of images
    num_files: int
    seed: int
    shard_size: int
    batch_size: int

    @property
    def num_shards(self) -> int:
        """How many shards the images fill."""
        return math.ceil(self.num_files / self.shard_size)

    @property
    def layout(self) -> RecordLayout:
        """The bytes of a sample."""
        channels, height, width = self.latent.shape
        return RecordLayout((channels, height, width), self.latent.flip)


@dataclass
class ShardTotals:
    """Sums over a shard's samples from which the data set's statistics follow."""

    class_counts: dict[str, int] = field(default_factory=dict)  # label in digits: samples
    channel_sum: list[float] = field(default_factory=list)  # of posterior means, per channel
    channel_square_sum: list[float] = field(default_factory=list)  # of mean^2 + variance


@dataclass(frozen=True)
class Sidecar:
    """The file 00012.json beside 00012.tar; its presence means that the shard is complete."""

    shard: Shard
    totals: ShardTotals


def make_settings(
    images: ImageFolder,
    vae: Vae,
    *,
    size: int,
    flip: bool,
    seed: int,
    shard_size: int,
    batch_size: int,
) -> EncodingSettings:
    """Collect the settings of a run."""
    side = size // vae.downsample
    digest = hashlib.sha256()
    for path, label in zip(images.paths, images.labels, strict=True):
        digest.update(f"{path}\t{label}\n".encode())
    return EncodingSettings(
        format_version=FORMAT_VERSION,
        vae=VaeReference(vae.source_id, vae.sha256, vae.scaling_factor, vae.shift_factor),
        latent=LatentFormat(
            kind="moments",
            shape=[2 * vae.latent_channels, side, side],
            dtype="float16",
            layout="mean | log-variance on axis 0, unscaled",
            flip=flip,
            precision="fp32",
        ),
        image=ImageFormat(size=size, crop=CROP),
        source=digest.hexdigest(),
        num_files=len(images.paths),
        seed=seed,
        shard_size=shard_size,
        batch_size=batch_size,
    )


class ShardEncoder:
    """Encodes the shards of one data set into a folder."""

    def __init__(
        self,
        images: ImageFolder,
        vae: Vae,
        settings: EncodingSettings,
        output: Path,
        *,
        is_strict: bool,
        num_threads: int,
    ) -> None:
        """Prepare.

        Args:
            images: all images of the data set.
            vae: encodes them, on its device.
            settings: of this run and of the shards already in `output`.
            output: an existing folder.
            is_strict: stop at the first image that cannot be decoded, instead of skipping it.
            num_threads: threads that read and decode images.
        """
        self.images, self.vae, self.settings, self.output = images, vae, settings, output
        self.is_strict, self.num_threads = is_strict, num_threads
        self.order = permutation(len(images.paths), settings.seed, _SPLIT)

    def shard_files(self, index: int) -> np.ndarray:
        """Return the places in `images` of the files that belong to a shard."""
        size = self.settings.shard_size
        return self.order[index * size : (index + 1) * size]

    def finished(self, index: int) -> Sidecar | None:
        """Return the sidecar of a shard that is complete in the output folder."""
        tar = self.output / shard_name(index)
        try:
            content = json.loads(tar.with_suffix(".json").read_bytes())
            sidecar: Sidecar = from_json(Sidecar, content)
            is_complete = tar.stat().st_size == sidecar.shard.bytes
        except (FileNotFoundError, ValueError, MalformedError):
            return None
        return sidecar if is_complete else None

    def encode(self, index: int, on_images: Callable[[int], object]) -> Sidecar:
        """Write a shard and its sidecar, each whole or not at all.

        Args:
            index: of the shard.
            on_images: called with the number of image files just finished.
        """
        tar = self.output / shard_name(index)
        skipped: list[str] = []
        totals = ShardTotals()
        keys: list[str] = []
        digest = hashlib.sha256()

        def counted() -> Iterator[Sample]:
            for sample in self._samples(index, skipped, on_images):
                keys.append(sample_key(sample.key))
                _add(totals, sample)
                yield sample

        layout = self.settings.layout
        replace_file(tar, lambda file: layout.write(_Hashing(file, digest), counted()))
        shard = Shard(
            name=tar.name,
            num_samples=len(keys),
            bytes=tar.stat().st_size,
            sha256=digest.hexdigest(),
            stride=layout.stride,
            index_sha256="",
            first_key=keys[0] if keys else "",
            skipped=sorted(skipped),
        )
        sidecar = Sidecar(shard, totals)
        write_json(tar.with_suffix(".json"), sidecar)
        return sidecar

    def _samples(
        self, index: int, skipped: list[str], on_images: Callable[[int], object]
    ) -> Iterator[Sample]:
        files, size = self.shard_files(index), self.settings.batch_size
        batches = [files[start : start + size] for start in range(0, len(files), size)]
        with ThreadPoolExecutor(self.num_threads, thread_name_prefix="image") as pool:
            pending = self._submit(pool, batches[0])
            for number, batch in enumerate(batches):
                current = pending
                if number + 1 < len(batches):  # read the next batch while this one is encoded
                    pending = self._submit(pool, batches[number + 1])
                yield from self._encode_batch(batch, current, skipped)
                on_images(len(batch))

    def _submit(self, pool: ThreadPoolExecutor, batch: np.ndarray) -> list[Future]:
        paths = [self.images.root / self.images.paths[place] for place in batch]
        return [pool.submit(load_pixels, path, self.settings.image.size) for path in paths]

    def _encode_batch(
        self, batch: np.ndarray, pixels: list[Future], skipped: list[str]
    ) -> Iterator[Sample]:
        places, good = [], []
        for place, future in zip(batch, pixels, strict=True):
            try:
                good.append(future.result())
                places.append(int(place))
            except BadImageError as err:
                if self.is_strict:
                    raise ConfigError(
                        f"--strict: {err}; repair or remove the file, or leave --strict out."
                    ) from err
                skipped.append(self.images.paths[place])
            except OSError as err:
                raise ConfigError(
                    f"--input {err.filename or self.images.root}: cannot be read "
                    f"({err.strerror}); make it readable and run the same command again."
                ) from err
        if not good:
            return
        stacked = np.stack(good)  # (N, size, size, 3)
        moments = self._moments(stacked)
        flips = self._moments(stacked[:, :, ::-1]) if self.settings.latent.flip else None
        for row, place in enumerate(places):
            flip = None if flips is None else flips[row]
            yield Sample(place, self.images.labels[place], moments[row], flip)

    def _moments(self, pixels: np.ndarray) -> np.ndarray:
        moments = encode_moments(self.vae, pixels)
        if not torch.isfinite(moments).all():
            raise ConfigError(
                f"--vae {self.vae.source_id}: its moments do not fit into float16; use another VAE."
            )
        return moments.cpu().numpy()

    def write_manifest(self, sidecars: list[Sidecar]) -> Manifest:
        """Write dataset.json from the sidecars of all shards, in order."""
        settings = self.settings
        counts: Counter[int] = Counter()
        for sidecar in sidecars:
            counts.update({int(name): n for name, n in sidecar.totals.class_counts.items()})
        shards = [sidecar.shard for sidecar in sidecars]
        num_samples = sum(shard.num_samples for shard in shards)
        num_skipped = sum(len(shard.skipped) for shard in shards)
        if not num_samples:
            raise ConfigError(
                f"--input {self.images.root}: none of its {num_skipped} files could be decoded; "
                "give images."
            )
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            num_samples=num_samples,
            shards=shards,
            latent=settings.latent,
            members=Members("moments.npy", "flip.npy" if settings.latent.flip else "", "cls"),
            vae=settings.vae,
            statistics=_statistics(sidecars, num_samples, settings.latent.shape),
            image=settings.image,
            source=SourceList(settings.num_files, num_skipped, settings.source),
            order_seed=settings.seed,
            classes=[
                ClassEntry(
                    entry.index, entry.name, entry.name.replace("_", " "), counts[entry.index]
                )
                for entry in self.images.classes
            ],
            versions={
                name: importlib.metadata.version(name)
                for name in ("torch", "diffusers", "numpy", "pillow", "webdataset")
            },
        )
        write_json(self.output / MANIFEST_NAME, manifest)
        return manifest


def shard_name(index: int) -> str:
    """Name a shard's tar file."""
    return f"{index:05d}.tar"


class _Hashing:
    """A file for writing that hashes what passes."""

    def __init__(self, file: IO[bytes], digest: "hashlib._Hash") -> None:
        self.file, self.digest = file, digest

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)


def _add(totals: ShardTotals, sample: Sample) -> None:
    label = str(sample.label)
    totals.class_counts[label] = totals.class_counts.get(label, 0) + 1
    mean, log_variance = np.split(sample.moments.astype(np.float64), 2)  # (C, H, W) each
    variance = np.exp(log_variance.clip(LOG_VARIANCE_MIN, LOG_VARIANCE_MAX))
    sums = mean.sum(axis=(1, 2)), (mean**2 + variance).sum(axis=(1, 2))
    if not totals.channel_sum:
        totals.channel_sum = totals.channel_square_sum = [0.0] * len(mean)
    totals.channel_sum = (np.array(totals.channel_sum) + sums[0]).tolist()
    totals.channel_square_sum = (np.array(totals.channel_square_sum) + sums[1]).tolist()


def _statistics(sidecars: list[Sidecar], num_samples: int, shape: list[int]) -> ChannelStatistics:
    """Mean and standard deviation of posterior draws over all samples and positions."""
    filled = [sidecar.totals for sidecar in sidecars if sidecar.totals.channel_sum]
    count = num_samples * shape[1] * shape[2]
    mean = np.sum([totals.channel_sum for totals in filled], axis=0) / count
    square = np.sum([totals.channel_square_sum for totals in filled], axis=0) / count
    std = np.sqrt(np.maximum(square - mean**2, 0.0))
    return ChannelStatistics(mean.round(6).tolist(), std.round(6).tolist())
