"""What a set of images scores against a reference: FID and its relatives, by ADM's protocol.

The reference is an npz file as ADM publishes them: statistics of the whole set (mu, sigma, mu_s,
sigma_s) beside some images (arr_0) for precision and recall; or images alone.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_tools.errors import ConfigError
from training.checkpoint_manifest import sha256_of
from training.evaluation.frechet import Gaussian, GaussianFit, frechet_distance
from training.evaluation.image_npz import ImageNpz
from training.evaluation.inception_score import inception_score
from training.evaluation.manifold import NEIGHBOURS, precision_and_recall
from training.evaluation.networks import (
    BATCH_SIZE,
    POOL,
    SPATIAL,
    FeatureNetwork,
    InceptionNetwork,
)

# Arrays of mean and covariance by layer, in ADM's files. Of other networks they have other names,
# so that no tool takes them for Inception's.
INCEPTION_ARRAYS = {POOL: ("mu", "sigma"), SPATIAL: ("mu_s", "sigma_s")}
OTHER_ARRAYS = {POOL: ("features_mu", "features_sigma")}
NETWORK_SHA256 = "features_sha256"  # of the network that made the latter


@dataclass
class Looked:
    """What a network saw in a set of images."""

    gaussians: dict[str, Gaussian]  # by layer; empty if there were fewer than two images
    pool: Tensor  # (N, D) float32 on the CPU


def arrays_of(network: FeatureNetwork) -> dict[str, tuple[str, str]]:
    """Name the arrays of a network's statistics in an npz file, by layer."""
    return INCEPTION_ARRAYS if isinstance(network, InceptionNetwork) else OTHER_ARRAYS


def look_at(
    network: FeatureNetwork,
    batches: Iterable[np.ndarray],
    keeps: Callable[[int], bool] = lambda _: True,
    on_batch: Callable[[int], None] = lambda _: None,
) -> Looked:
    """Run the network over images.

    Args:
        network: that looks.
        batches: uint8 (n, H, W, 3).
        keeps: whether the features of the n-th image are wanted themselves.
        on_batch: called with the number of images of each batch.
    """
    fits = {layer: GaussianFit() for layer in network.widths}
    pool, seen = [torch.zeros(0, network.widths[POOL])], 0
    for batch in batches:
        features = network.look(torch.from_numpy(batch.copy()))
        for layer, fit in fits.items():
            fit.add(features[layer])
        kept = [i for i in range(len(batch)) if keeps(seen + i)]
        pool.append(features[POOL][kept].cpu())
        seen += len(batch)
        on_batch(len(batch))
    gaussians = {layer: fit.gaussian() for layer, fit in fits.items() if seen > 1}
    return Looked(gaussians, torch.cat(pool))


class Reference:
    """The reference of a score, checked before images are drawn.

    Attributes:
        sha256: of the file.
        has_statistics: the file states those of this network; else they are its images'.
        num_images: beside them.
    """

    def __init__(self, path: Path, network: FeatureNetwork, image_size: tuple[int, int]) -> None:
        """Look at the file.

        Args:
            path: --reference.
            network: that images will be looked at by.
            image_size: (H, W) of the images that are scored.
        """
        self.path, self.network, self._flag = path, network, f"--reference {path}"
        self._file = ImageNpz(path, "--reference")
        self.num_images = self._file.num_images
        found = self._file.image_size
        if found not in (None, image_size):
            raise ConfigError(
                f"{self._flag}: holds images of {found[0]}x{found[1]} and the samples are "
                f"{image_size[0]}x{image_size[1]}; give a reference of that size."
            )
        self.has_statistics = self._check_statistics()
        if not self.has_statistics and self.num_images < network.min_images:
            raise ConfigError(
                f"{self._flag}: holds no statistics of this network and {self.num_images:,} "
                f"images, fewer than the {network.min_images:,} that a covariance takes; give one "
                "of training/reference_statistics.py."
            )
        self.sha256 = sha256_of(path)

    def _check_statistics(self) -> bool:
        """Tell whether there are statistics; refuse those of another network."""
        names = arrays_of(self.network)
        wanted = {name for pair in names.values() for name in pair}
        if not wanted <= self._file.names:
            return False
        if NETWORK_SHA256 in self._file.names and names is OTHER_ARRAYS:
            made_by = str(self._file.array(NETWORK_SHA256))
            if made_by != self.network.sha256:
                raise ConfigError(
                    f"{self._flag}: its statistics are of the network with sha256 {made_by[:12]}, "
                    f"--features has {self.network.sha256[:12]}; give the same network."
                )
        for layer, (mean, covariance) in names.items():
            width = self.network.widths[layer]
            shapes = self._file.array(mean).shape, self._file.array(covariance).shape
            if shapes != ((width,), (width, width)):
                raise ConfigError(
                    f"{self._flag}: its {mean} and {covariance} have shapes {shapes[0]} and "
                    f"{shapes[1]}, features of this network {width} numbers; give another file."
                )
        return True

    @cached_property
    def looked(self) -> Looked:
        """The statistics by layer, and the features (M, D) of the images; M may be 0."""
        looked = None
        if self.num_images:
            looked = look_at(self.network, self._file.batches(BATCH_SIZE))
        if not self.has_statistics:
            return looked
        gaussians = {
            layer: Gaussian(*(self._doubles(name) for name in names))
            for layer, names in arrays_of(self.network).items()
        }
        return Looked(gaussians, torch.zeros(0, 0) if looked is None else looked.pool)

    def _doubles(self, name: str) -> Tensor:
        return torch.from_numpy(self._file.array(name).astype(np.float64))


def check_count(count: int, network: FeatureNetwork, what: str) -> None:
    """Refuse fewer images than the statistics take; `what` names them in the message."""
    if count < network.min_images:
        raise ConfigError(
            f"{what} {count}: too few, the covariance of {network.min_images - 1:,} features of "
            f"{network.name} takes at least {network.min_images:,} images (published numbers are "
            "of 50,000); use more."
        )


def score(
    samples: ImageNpz,
    reference: Reference,
    on_batch: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Score images against a reference; by another network than Inception nothing is called FID.

    Returns:
        "fid", "sfid" and "inception_score", or "frechet_distance"; "precision" and "recall" where
        the reference has more than three images.
    """
    network = reference.network
    looked = look_at(network, samples.batches(BATCH_SIZE), on_batch=on_batch)
    pool = reference.looked.pool
    distances = {
        layer: frechet_distance(looked.gaussians[layer], reference.looked.gaussians[layer])
        for layer in network.widths
    }
    if isinstance(network, InceptionNetwork):
        found = {
            "fid": distances[POOL],
            "sfid": distances[SPATIAL],
            "inception_score": inception_score(network.logits(looked.pool)),
        }
    else:
        found = {"frechet_distance": distances[POOL]}
    if len(pool) > NEIGHBOURS:
        shares = precision_and_recall(pool.to(network.device), looked.pool.to(network.device))
        found |= {"precision": shares.precision, "recall": shares.recall}
    return found
