"""Make the same latents in every format on which data.py compares readers."""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from data_tools.files import replace_file
from data_tools.shards.manifest import (
    DATASET,
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
from data_tools.shards.records import RecordLayout, Sample, sample_key

SHAPE = (8, 32, 32)  # moments of an image of 256 pixels
NUM_CLASSES = 1000
SHARD_SIZE = 2048


def latents_of(shard: int) -> np.ndarray:
    """Make a shard's moments, float16 (SHARD_SIZE, 8, 32, 32)."""
    generator = np.random.default_rng(shard)
    return generator.standard_normal((SHARD_SIZE, *SHAPE), np.float32).astype(np.float16)


def labels_of(shard: int) -> list[int]:
    """Make a shard's labels."""
    return [(shard * SHARD_SIZE + i) % NUM_CLASSES for i in range(SHARD_SIZE)]


def make_shard(folder: Path, index: int) -> Shard:
    """Write one of our shards."""
    folder.mkdir(parents=True, exist_ok=True)
    layout, latents, labels = RecordLayout(SHAPE, False), latents_of(index), labels_of(index)
    first = index * SHARD_SIZE
    path = folder / f"{index:05d}.tar"
    samples = (Sample(first + i, labels[i], latents[i], None) for i in range(SHARD_SIZE))
    replace_file(path, lambda file: layout.write(file, samples))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Shard(
        name=path.name,
        num_samples=SHARD_SIZE,
        bytes=path.stat().st_size,
        sha256=digest,
        stride=layout.stride,
        index_sha256="",
        first_key=sample_key(first),
        skipped=[],
    )


def describe(folder: Path, shards: list[Shard]) -> None:
    """Write dataset.json."""
    count = sum(shard.num_samples for shard in shards)
    channels = SHAPE[0] // 2
    manifest = Manifest(
        num_samples=count,
        shards=shards,
        latent=LatentFormat(
            "moments", list(SHAPE), "float16", "mean | log-variance", False, "fp32"
        ),
        members=Members("moments.npy", "", "cls"),
        vae=VaeReference("none", "0" * 64, 1.0, 0.0),
        statistics=ChannelStatistics([0.0] * channels, [1.0] * channels),
        image=ImageFormat(256, "none"),
        source=SourceList(count, 0, "0" * 64),
        order_seed=0,
        classes=[ClassEntry(i, str(i), str(i), 0) for i in range(NUM_CLASSES)],
        versions={},
    )
    DATASET.write(folder / MANIFEST_NAME, manifest)


def make_large(folder: Path, shard: Path, entry: Shard, num_shards: int) -> None:
    """Make a data set of many shards that are all one file under many names."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for i in range(num_shards):
        name = f"{i:05d}.tar"
        if not (folder / name).exists():
            os.link(shard, folder / name)
        entries.append(Shard(name, *list(vars(entry).values())[1:]))
    describe(folder, entries)


def make_npy(folder: Path, num_shards: int) -> None:
    """Write one .npy file per image, a folder per shard and a file of labels, as fast-DiT does."""
    for shard in range(num_shards):
        own = folder / f"{shard:05d}"
        own.mkdir(parents=True, exist_ok=True)
        for i, latent in enumerate(latents_of(shard)):
            np.save(own / f"{i}.npy", latent)
        np.save(own / "labels.npy", np.array(labels_of(shard)))


def make_safetensors(folder: Path, num_shards: int) -> None:
    """Write one .safetensors file per shard, as LightningDiT does."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(num_shards):
        tensors = {
            "latents": torch.from_numpy(latents_of(shard)),
            "labels": torch.tensor(labels_of(shard)),
        }
        save_file(tensors, folder / f"{shard:05d}.safetensors")
