"""The flags that say which network images are looked at by, and what they are compared with."""

import argparse

import torch

from data_tools.errors import ArgumentParser, ConfigError
from data_tools.user_files.paths import typed_path
from training.evaluation.networks import FeatureNetwork, ScriptedNetwork, load_inception


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
        metavar="FILE",
        help="any TorchScript network, uint8 (N, 3, H, W) to (N, D), instead: the Fréchet distance "
        "by its features, which is no FID",
    )


def load_network(
    args: argparse.Namespace, image_size: tuple[int, int], device: torch.device
) -> FeatureNetwork:
    """Load the network that --inception and --features choose, for images of (H, W)."""
    if args.features is None:
        return load_inception(args.inception, device)
    if args.inception is not None:
        raise ConfigError("--inception and --features both choose the network; give one of them.")
    return ScriptedNetwork(args.features, image_size, device)
