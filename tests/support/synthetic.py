"""Small data sets whose content tells which sample was read, without any VAE."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_tools.files import replace_file
from data_tools.shards.manifest import (
    DATASET,
    MANIFEST_NAME,
    ChannelStatistics,
    ClassEntry,
    DatasetManifest,
    ImageFormat,
    LatentFormat,
    Manifest,
    Members,
    Shard,
    SourceList,
    VaeReference,
)
from data_tools.shards.records import RecordLayout, Sample, sample_key
from data_tools.stream.training_data import TrainingData, open_data

SHAPE = (8, 4, 4)
NUM_CLASSES = 3


def moments_of(sample_id: int, is_flip: bool = False) -> np.ndarray:
    """Every value is the id; of the mirrored image, minus the id plus one (fp16 is exact)."""
    assert sample_id < 2000
    return np.full(SHAPE, -(sample_id + 1) if is_flip else sample_id, np.float16)


def random_moments(shape: tuple[int, int, int]) -> Callable[..., np.ndarray]:
    """Make moments (2C, H, W) that a model can be trained on: of unit size, almost no noise."""

    def moments(sample_id: int, is_flip: bool = False) -> np.ndarray:
        values = np.random.default_rng([sample_id, is_flip]).standard_normal(shape)
        values[shape[0] // 2 :] = -8.0  # log-variances
        return values.astype(np.float16)

    return moments


def make_dataset(
    folder: Path,
    shard_sizes: list[int],
    has_flip: bool = True,
    num_classes: int = NUM_CLASSES,
    shape: tuple[int, int, int] = SHAPE,
    moments: Callable[..., np.ndarray] = moments_of,
) -> DatasetManifest:
    """Write shards and dataset.json; the label of sample i is i % num_classes."""
    folder.mkdir(parents=True, exist_ok=True)
    layout = RecordLayout(shape, has_flip)
    shards, first = [], 0
    for index, size in enumerate(shard_sizes):
        samples = [
            Sample(i, i % max(1, num_classes), moments(i), moments(i, True) if has_flip else None)
            for i in range(first, first + size)
        ]
        path = folder / f"{index:05d}.tar"
        replace_file(path, lambda file, samples=samples: layout.write(file, samples))
        data, first_key = path.read_bytes(), sample_key(first) if size else ""
        digest = hashlib.sha256(data).hexdigest()
        shards.append(Shard(path.name, size, len(data), digest, layout.stride, "", first_key, []))
        first += size
    manifest = Manifest(
        num_samples=first,
        shards=shards,
        latent=LatentFormat(
            "moments", list(shape), "float16", "mean | log-variance", has_flip, "fp32"
        ),
        members=Members("moments.npy", "flip.npy" if has_flip else "", "cls"),
        vae=VaeReference("data_tools/demo_vae", "0" * 64, 0.5, 0.0),
        statistics=ChannelStatistics([0.0] * (shape[0] // 2), [1.0] * (shape[0] // 2)),
        image=ImageFormat(16, "adm-center"),
        source=SourceList(first, 0, "0" * 64),
        order_seed=0,
        classes=[
            ClassEntry(i, f"class_{i}", f"class {i}", len(range(i, first, num_classes)))
            for i in range(num_classes)
        ],
        versions={},
    )
    DATASET.write(folder / MANIFEST_NAME, manifest)
    return DatasetManifest.load(folder)


def seal(folder: Path) -> None:
    """Make dataset.json agree with shards that were changed on purpose."""
    manifest = DatasetManifest.load(folder, check_shards=False).described()
    shards = []
    for shard in manifest.shards:
        data = (folder / shard.name).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        shards.append(replace(shard, bytes=len(data), sha256=digest))
    DATASET.write(folder / MANIFEST_NAME, replace(manifest, shards=shards))


def data_of(manifest: DatasetManifest) -> TrainingData:
    """What training reads of a folder's data set."""
    return open_data(str(manifest.folder))
