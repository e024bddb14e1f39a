"""Turn images into features: by the Inception network of FID, or by one that the user gives.

N images, H W size in pixels, D width of features.
"""

import argparse
import urllib.error
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from data_tools.errors import ArgumentParser, ConfigError
from data_tools.user_files.paths import typed_path
from training.checkpoints.manifest import sha256_of
from training.evaluation.inception import POOL_WIDTH, SPATIAL_WIDTH, Inception

INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
# The same file under the names that pytorch-fid and torch-fidelity give it in torch's cache.
INCEPTION_FILES = (
    "pt_inception-2015-12-05-6726825d.pth",
    "weights-inception-2015-12-05-6726825d.pth",
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
BATCH_SIZE = 64
INCEPTION_NAME = "inception-2015-12-05"
POOL, SPATIAL = "pool", "spatial"  # layers


class FeatureNetwork(ABC):
    """Maps images to features.

    Attributes:
        name: for people.
        sha256: of the file of weights.
        widths: D of each layer whose distribution is compared.
        device: where it computes.
    """

    name: str
    sha256: str
    widths: dict[str, int]
    device: torch.device

    @abstractmethod
    def features(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return float32 features (N, D) by layer, of pixels uint8 (N, H, W, 3) on any device."""

    @property
    def min_images(self) -> int:
        """Images that a covariance of full rank takes."""
        return max(self.widths.values()) + 1


def full_precision() -> AbstractContextManager[None]:
    """Make convolutions on a GPU repeatable and exact to fp32.

    By default they round their inputs to TF32, three digits.
    """
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


class InceptionNetwork(FeatureNetwork):
    """The network of FID, sFID and the Inception Score."""

    def __init__(self, model: Inception, sha256: str, device: torch.device) -> None:
        """Take the network; its weights are frozen from here on."""
        self.model = model.to(device).eval().requires_grad_(False)
        self.name, self.sha256, self.device = INCEPTION_NAME, sha256, device
        self.widths = {POOL: POOL_WIDTH, SPATIAL: SPATIAL_WIDTH}

    def features(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return pool_3 (N, 2048) and mixed_6/conv (N, 2023)."""
        with torch.no_grad(), full_precision():
            found = self.model(pixels.to(self.device))
        return {POOL: found.pool, SPATIAL: found.spatial}

    def logits(self, pool: Tensor) -> Tensor:
        """Return (N, 1008) for the Inception Score, on the CPU."""
        with torch.no_grad():
            parts = [self.model.logits(part.to(self.device)).cpu() for part in pool.split(4096)]
        return torch.cat(parts)


class ScriptedNetwork(FeatureNetwork):
    """A TorchScript file of the user's: uint8 (N, 3, H, W), 0 to 255, to features (N, D)."""

    def __init__(self, path: Path, image_size: tuple[int, int], device: torch.device) -> None:
        """Load the file and try it on blank images of `image_size` (H, W)."""
        self._flag = f"--features {path}"
        if not path.is_file():
            raise ConfigError(f"{self._flag}: there is no such file; give a TorchScript file.")
        try:
            self.model = torch.jit.load(path, map_location=device).eval()
        except (RuntimeError, ValueError) as err:
            raise ConfigError(
                f"{self._flag}: is damaged or no TorchScript file; save one with torch.jit.save."
            ) from err
        self.name, self.sha256, self.device = path.name, sha256_of(path), device
        blank = torch.zeros(2, *image_size, 3, dtype=torch.uint8)
        self.widths = {POOL: self.features(blank)[POOL].shape[1]}

    def features(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return what the file computes."""
        try:
            with torch.no_grad(), full_precision():
                features = self.model(pixels.to(self.device).permute(0, 3, 1, 2).contiguous())
        except (RuntimeError, torch.jit.Error) as err:
            reason = str(err).strip().splitlines()[-1].rstrip(".")
            raise ConfigError(
                f"{self._flag}: fails on images {tuple(pixels.shape[1:])} ({reason}); it must take "
                "uint8 (N, 3, H, W)."
            ) from err
        is_right = isinstance(features, Tensor) and features.is_floating_point()
        if not is_right or features.dim() != 2 or len(features) != len(pixels):
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features)
            raise ConfigError(
                f"{self._flag}: gives {found} for {len(pixels)} images; it must return floats "
                "(N, D)."
            )
        if not features.isfinite().all():
            raise ConfigError(
                f"{self._flag}: gives features that are not finite; mend the network."
            )
        return {POOL: features.float()}


def add_network_flags(parser: ArgumentParser) -> None:
    """Add --inception and --features to a command that looks at images."""
    add = parser.add_argument_group("features").add_argument
    add(
        "--inception",
        type=typed_path,
        metavar="FILE",
        help="weights of FID's Inception (default: torch's cache, else they are fetched)",
    )
    add(
        "--features",
        type=typed_path,
        nargs="+",
        metavar="FILE",
        help="any TorchScript networks, uint8 (N, 3, H, W) to (N, D), instead: the Fréchet and the "
        "kernel distance by the features of each, which are no FID and KID",
    )


def load_networks(
    args: argparse.Namespace, image_size: tuple[int, int], device: torch.device
) -> list[FeatureNetwork]:
    """Load the networks that --inception and --features choose, for images of (H, W)."""
    if args.features is None:
        return [load_inception(args.inception, device)]
    if args.inception is not None:
        raise ConfigError("--inception and --features both choose the network; give one of them.")
    found: dict[str, FeatureNetwork] = {}
    for path in args.features:
        network = ScriptedNetwork(path, image_size, device)
        if network.sha256 in found:
            raise ConfigError(
                f"--features {' '.join(map(str, args.features))}: {path} is the same network as "
                "one before it; give each once."
            )
        found[network.sha256] = network
    return list(found.values())


def load_inception(given: Path | None, device: torch.device) -> InceptionNetwork:
    """Load the network of FID with its checksum verified.

    Args:
        given: --inception; None = torch's cache, and then the hub, which fills the cache.
        device: where it goes.
    """
    path = given or _cached_inception()
    if not path.is_file():
        raise ConfigError(
            f"--inception {path}: there is no such file; fetch it from {INCEPTION_URL}."
        )
    digest = sha256_of(path)
    if digest != INCEPTION_SHA256:
        flag = "--inception " if given else ""
        raise ConfigError(
            f"{flag}{path}: has sha256 {digest[:12]}, the Inception weights of FID have "
            f"{INCEPTION_SHA256[:12]}; with others no number is a FID, fetch {INCEPTION_URL}."
        )
    model = Inception()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return InceptionNetwork(model, digest, device)


def _cached_inception() -> Path:
    """Return torch's copy, after fetching it if there is none."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for name in INCEPTION_FILES:
        if (folder / name).is_file():
            return folder / name
    path = folder / INCEPTION_FILES[0]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(INCEPTION_URL, str(path), INCEPTION_SHA256[:8], False)
    except (OSError, urllib.error.URLError, RuntimeError) as err:
        reason = str(err).strip().splitlines()[0].strip("<>").rstrip(".")
        raise ConfigError(
            f"--inception is not given, {folder} has no {INCEPTION_FILES[0]} and it cannot be "
            f"fetched ({reason}); fetch {INCEPTION_URL} elsewhere and give --inception FILE."
        ) from err
    return path
