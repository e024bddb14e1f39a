"""A run to evaluate, made without training: random weights in a complete checkpoint."""

import dataclasses
import json

import torch

from data_tools.shards.manifest import MANIFEST_NAME, DatasetManifest
from data_tools.stream.order import ORDER_VERSION
from data_tools.vae.autoencoder import DEMO_VAE, load_vae
from tests.support.configs import small
from tests.support.synthetic import make_dataset, random_moments
from training.checkpoints.manifest import (
    CHECKPOINT_DIR,
    EMA_FILE,
    LATEST_FILE,
    MANIFEST_FILE,
    RAW_FILE,
    CheckpointManifest,
    Layout,
    TrainState,
    record_of,
    tag_of,
)
from training.checkpoints.weight_files import write_weights
from training.engine.build import build_model
from training.run.directory import CONFIG_FILE

STEP = 7
IMAGE_SIZE = 32  # of latents of 8 x 8


def make_data(folder, shard_sizes, first=0):
    """Encoded latents that the demo VAE decodes; `first` makes other ones."""
    moments = random_moments((8, 8, 8))
    make_dataset(
        folder, shard_sizes, shape=(8, 8, 8), moments=lambda i, flip=False: moments(i + first, flip)
    )
    path = folder / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    vae = load_vae(DEMO_VAE)
    manifest["vae"] |= {"sha256": vae.sha256, "scaling_factor": vae.scaling_factor}
    path.write_text(json.dumps(manifest))
    return DatasetManifest.load(folder)


def make_run(run_dir, data_dir, **changes):
    """A run directory with one checkpoint."""
    manifest = make_data(data_dir, [6, 6])
    config = small(
        **{"data": str(data_dir), "latent_size": 8, "num_classes": 3, "run_dir": str(run_dir)}
        | changes
    )
    folder = run_dir / CHECKPOINT_DIR / tag_of(STEP)
    folder.mkdir(parents=True)
    model = build_model(config)
    for i, name in enumerate((EMA_FILE, RAW_FILE)):
        torch.manual_seed(i)
        for parameter in model.parameters():  # zero-initialised outputs would hide everything
            torch.nn.init.normal_(parameter, std=0.1)
        write_weights(folder / name, {n: p.detach() for n, p in model.named_parameters()})
    files = {path.name: record_of(path) for path in folder.iterdir()}
    layout = Layout(1, 1, 2, "fp32")
    checkpoint = CheckpointManifest(
        folder.name, TrainState(STEP, 64 * STEP), layout, manifest.hash, ORDER_VERSION, files
    )
    (folder / MANIFEST_FILE).write_text(json.dumps(dataclasses.asdict(checkpoint)))
    (folder.parent / LATEST_FILE).write_text(folder.name)
    (run_dir / CONFIG_FILE).write_text(config.to_yaml())
    (run_dir / MANIFEST_NAME).write_text((data_dir / MANIFEST_NAME).read_text())
    return config


class Means(torch.nn.Module):
    """Features: mean colours of the four quarters, 12 numbers."""

    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1) / 64.0


class Corners(torch.nn.Module):
    """Other features: the colours of the corner at the top left, 3 numbers."""

    def forward(self, x):
        return x[:, :, 0, 0].float() / 64.0


class Wrong(torch.nn.Module):
    """A network that breaks one of its promises."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        features = torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)
        if self.kind == "rows":
            return features[:1]
        if self.kind == "integers":
            return features.long()
        if self.kind == "infinite":
            return features / 0.0
        assert x.shape[1] == 4
        return features


def save_network(path, network=None):
    torch.jit.script(network or Means()).save(str(path))
    return path
