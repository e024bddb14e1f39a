"""Score a set of images against a reference: FID and its relatives, by ADM's protocol.

The reference is an npz file. ADM's files hold statistics of a whole set (mu, sigma, mu_s, sigma_s)
and some images (arr_0) for KID, precision and recall. Images alone will do. So will mu and sigma
alone, as pytorch-fid writes them; they give the FID and nothing else.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_tools.errors import ConfigError, count_of
from training.checkpoints.manifest import sha256_of
from training.evaluation.distances import (
    MIN_KERNEL_FEATURES,
    NEIGHBOURS,
    Gaussian,
    GaussianFit,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_and_recall,
    subset_size,
)
from training.evaluation.image_npz import ImageNpz
from training.evaluation.networks import BATCH_SIZE, POOL, SPATIAL, FeatureNetwork, InceptionNetwork

# Names of the mean and the covariance of a layer, as in ADM's files. Statistics of other networks
# have other names, so that no tool takes them for Inception's.
INCEPTION_ARRAYS = {POOL: ("mu", "sigma"), SPATIAL: ("mu_s", "sigma_s")}
OTHER_ARRAYS = {POOL: ("features_mu", "features_sigma")}
NETWORK_SHA256 = "features_sha256"  # of the network that made the latter
DIGITS = 12  # of that, which end these names in a file for several networks
STD = "_std"  # ends the name of a score's spread


@dataclass
class FeatureStatistics:
    """What a network makes of a set of images."""

    gaussians: dict[str, Gaussian]  # by layer; empty if there were fewer than two images
    pool: Tensor  # (N, D) float32 on the CPU


def arrays_of(network: FeatureNetwork, is_one_of_many: bool) -> dict[str, tuple[str, str]]:
    """Name the arrays of a network's statistics in an npz file, by layer.

    Args:
        network: that made them.
        is_one_of_many: the file holds statistics of several networks.
    """
    if isinstance(network, InceptionNetwork):
        return INCEPTION_ARRAYS
    if not is_one_of_many:
        return OTHER_ARRAYS
    end = network.sha256[:DIGITS]
    return {layer: tuple(f"{n}_{end}" for n in names) for layer, names in OTHER_ARRAYS.items()}


def feature_statistics(
    network: FeatureNetwork,
    batches: Iterable[np.ndarray],
    keeps: Callable[[int], bool] = lambda _: True,
    on_batch: Callable[[int], None] = lambda _: None,
) -> FeatureStatistics:
    """Run the network over images.

    Args:
        network: that turns images into features.
        batches: uint8 (n, H, W, 3).
        keeps: whether the features of the n-th image are wanted themselves.
        on_batch: called with the number of images of each batch.
    """
    fits = {layer: GaussianFit() for layer in network.widths}
    pool, seen = [torch.zeros(0, network.widths[POOL])], 0
    for batch in batches:
        features = network.features(torch.from_numpy(batch.copy()))
        for layer, fit in fits.items():
            fit.add(features[layer])
        kept = [i for i in range(len(batch)) if keeps(seen + i)]
        pool.append(features[POOL][kept].cpu())
        seen += len(batch)
        on_batch(len(batch))
    gaussians = {layer: fit.gaussian() for layer, fit in fits.items() if seen > 1}
    return FeatureStatistics(gaussians, torch.cat(pool))


class Reference:
    """The reference of a score, checked before images are drawn.

    Attributes:
        sha256: of the file.
        stated: the layers whose statistics the file holds. Those of other layers are computed of
            its images, if there are enough.
        num_images: in the file.
    """

    def __init__(self, path: Path, network: FeatureNetwork, image_size: tuple[int, int]) -> None:
        """Look at the file.

        Args:
            path: --reference.
            network: that will turn images into features.
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
        own = arrays_of(network, is_one_of_many=True)
        has_own = any(name in self._file.names for names in own.values() for name in names)
        self._arrays = own if has_own else arrays_of(network, is_one_of_many=False)
        self.stated = self._stated_layers()
        if not (self.has_statistics or self._has_enough_images):
            raise ConfigError(f"{self._flag}: {self._lack()}.")
        self.sha256 = sha256_of(path)

    @property
    def has_statistics(self) -> bool:
        """Tell whether the file states what the FID compares; else it is computed of images."""
        return POOL in self.stated

    @property
    def layers(self) -> list[str]:
        """The layers whose distribution can be compared."""
        return [x for x in self.network.widths if x in self.stated or self._has_enough_images]

    @property
    def left_out(self) -> dict[str, str]:
        """Say why by the name of each score that this reference cannot give."""
        lacks = {}
        if SPATIAL in self.network.widths and SPATIAL not in self.layers:
            lacks["sfid"] = "no mu_s and sigma_s in the reference"
        held = count_of(self.num_images, "image") if self.num_images else "no images (arr_0)"
        if self.num_images < MIN_KERNEL_FEATURES:
            lacks[kernel_name(self.network)] = f"{held} in the reference"
        if self.num_images <= NEIGHBOURS:
            lacks |= dict.fromkeys(("precision", "recall"), f"{held} in the reference")
        return lacks

    @property
    def _has_enough_images(self) -> bool:
        return self.num_images >= self.network.min_images

    def _lack(self) -> str:
        """Say what the file lacks, and what it has instead."""
        mean, covariance = self._arrays[POOL]
        others = OTHER_ARRAYS if self._arrays is INCEPTION_ARRAYS else INCEPTION_ARRAYS
        found = [name for pair in others.values() for name in pair if name in self._file.names]
        instead = f"; its {' and '.join(found)} are of another network" if found else ""
        return (
            f"holds no {mean} and {covariance}, the statistics of {self.network.name}, and "
            f"{self.num_images:,} images, fewer than the {self.network.min_images:,} that a "
            f"covariance takes{instead}; make one with training/reference_statistics.py"
        )

    def _stated_layers(self) -> set[str]:
        """Tell which layers' statistics there are; refuse those of another network."""
        layers = {
            layer: names for layer, names in self._arrays.items() if set(names) <= self._file.names
        }
        is_other = layers and self._arrays is OTHER_ARRAYS
        if is_other and NETWORK_SHA256 in self._file.names:
            made_by = str(self._file.array(NETWORK_SHA256))
            if made_by != self.network.sha256:
                raise ConfigError(
                    f"{self._flag}: its statistics are of the network with sha256 {made_by[:12]}, "
                    f"--features has {self.network.sha256[:12]}; give the same network."
                )
        for layer, names in layers.items():
            width, arrays = self.network.widths[layer], [self._file.array(n) for n in names]
            shapes = tuple(array.shape for array in arrays)
            if shapes != ((width,), (width, width)):
                raise ConfigError(
                    f"{self._flag}: its {' and '.join(names)} have shapes {shapes[0]} and "
                    f"{shapes[1]}, features of {self.network.name} {width} numbers; give a file "
                    "that the same network made."
                )
            if not all(array.dtype.kind in "fiu" and np.isfinite(array).all() for array in arrays):
                raise ConfigError(
                    f"{self._flag}: its {' and '.join(names)} are no finite numbers; give another "
                    "file."
                )
        return set(layers)

    @cached_property
    def statistics(self) -> FeatureStatistics:
        """The statistics by layer, and the features (M, D) of the images; M may be 0."""
        statistics = FeatureStatistics({}, torch.zeros(0, 0))
        if self.num_images:
            statistics = feature_statistics(self.network, self._file.batches(BATCH_SIZE))
        stated = {
            layer: Gaussian(*(self._doubles(name) for name in self._arrays[layer]))
            for layer in self.stated
        }
        return FeatureStatistics(statistics.gaussians | stated, statistics.pool)

    def _doubles(self, name: str) -> Tensor:
        return torch.from_numpy(self._file.array(name).astype(np.float64))


def kernel_name(network: FeatureNetwork) -> str:
    """Name the kernel distance: KID with Inception's features only."""
    return "kid" if isinstance(network, InceptionNetwork) else "kernel_distance"


def said(metrics: dict[str, float]) -> str:
    """Return scores for a line of text, a spread behind its mean."""
    parts = []
    for name, value in metrics.items():
        if name.removesuffix(STD) in metrics and name.endswith(STD):
            continue
        spread = metrics.get(f"{name}{STD}")
        parts.append(f"{name} " + (f"{value:.4f}" if spread is None else _spread(value, spread)))
    return ", ".join(parts)


def _spread(value: float, std: float) -> str:
    return f"{value:.6f} +- {std:.6f}"  # a KID of a good model is a thousandth


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
    """Score images against a reference. Only with Inception's features is a score called FID.

    Returns:
        "fid", "sfid" and "inception_score", or "frechet_distance"; "kid", or "kernel_distance",
        and the same with "_std"; "precision" and "recall". Those in `reference.left_out` are not
        there.
    """
    network = reference.network
    statistics = feature_statistics(network, samples.batches(BATCH_SIZE), on_batch=on_batch)
    pool = reference.statistics.pool
    distances = {
        layer: frechet_distance(statistics.gaussians[layer], reference.statistics.gaussians[layer])
        for layer in reference.layers
    }
    if isinstance(network, InceptionNetwork):
        found = {"fid": distances[POOL]}
        if SPATIAL in distances:
            found["sfid"] = distances[SPATIAL]
        found["inception_score"] = inception_score(network.logits(statistics.pool))
    else:
        found = {"frechet_distance": distances[POOL]}
    sets = pool.to(network.device), statistics.pool.to(network.device)
    if min(map(len, sets)) >= MIN_KERNEL_FEATURES:
        name, kernel = kernel_name(network), kernel_distance(*sets, subset_size(*map(len, sets)))
        found |= {name: kernel.mean, f"{name}{STD}": kernel.std}
    if len(pool) > NEIGHBOURS:
        found |= precision_and_recall(*sets)._asdict()
    return found
