"""Write the card of a score: a JSON file with all that another person needs to get it again."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_tools.errors import ConfigError
from data_tools.files import MalformedError
from data_tools.shards.manifest import VaeReference
from data_tools.vae.autoencoder import Vae
from training.checkpoints.manifest import MANIFEST_FILE, read_manifest, sha256_of
from training.checkpoints.weight_files import recorded_sha256
from training.config.tree import Config
from training.engine.average_profiles import profiles_of
from training.evaluation.distances import NUM_SUBSETS, SUBSET_SEED, subset_size
from training.evaluation.drawing import LABEL_RULES, SEED_RULE, DrawSettings
from training.evaluation.scores import Reference, kernel_name
from training.run.directory import CARD
from training.run.program import commit, local_changes


def read_card(path: Path) -> dict[str, Any]:
    """Read a card that was written before.

    Raises:
        ConfigError: it is damaged, or a later version wrote it.
    """
    try:
        card = CARD.loads(path.read_bytes(), str(path))
        if isinstance(card, dict):
            return card
        reason = "no dictionary"
    except (ValueError, MalformedError) as err:
        reason = str(err)
    raise ConfigError(
        f"{path}: is no card of a score ({reason}); move it elsewhere, and it is made again."
    )


def weights_sha256(path: Path) -> str:
    """Return the sha256 of a file of weights, from its checkpoint's manifest if there is one."""
    return recorded_sha256(path) or sha256_of(path)


def describe_weights(config: Config, run_dir: Path, path: Path) -> dict[str, Any]:
    """Describe a file of weights: its run, its checkpoint, and the average that it holds."""
    described: dict[str, Any] = {
        "run": run_dir.resolve().name,
        "file": path.name,
        "sha256": weights_sha256(path),
        "average": None,  # of the raw weights, or unknown
    }
    if (path.parent / MANIFEST_FILE).exists():
        manifest = read_manifest(path.parent)
        described["checkpoint"] = manifest.tag
        described["step"] = manifest.state.step
        described["samples_seen"] = manifest.state.samples_consumed
        profile = profiles_of(config.optim).get(path.stem)
        described["average"] = None if profile is None else profile.name
    return described


def describe_images(settings: DrawSettings) -> dict[str, Any]:
    """Describe how images were drawn."""
    rules = {"seed_rule": SEED_RULE}
    if settings.labels in LABEL_RULES:
        rules["label_rule"] = LABEL_RULES[settings.labels]
    return asdict(settings) | rules


def describe_vae(vae: Vae, reference: VaeReference) -> dict[str, Any]:
    """Describe the VAE that decoded the images, and tell whether it also encoded the data."""
    return {
        "id": vae.id,
        "sha256": vae.sha256,
        "is_the_encoders": vae.sha256 == reference.sha256,
    }


def describe_reference(reference: Reference, num_images: int) -> dict[str, Any]:
    """Describe the reference, and how `num_images` are compared with it."""
    statistics = "stated in the file" if reference.has_statistics else "of its images"
    described = {
        "reference": {
            "file": reference.path.name,
            "sha256": reference.sha256,
            "statistics": statistics,
            "images_for_precision_and_recall": reference.num_images,  # and for the kernel distance
            "left_out": reference.left_out,
        },
        "features": {"network": reference.network.name, "sha256": reference.network.sha256},
    }
    if kernel_name(reference.network) not in reference.left_out:
        size = subset_size(reference.num_images, num_images)
        subsets = {"number": NUM_SUBSETS, "size": size, "seed": SUBSET_SEED}
        described["kernel_subsets"] = subsets
    return described


def say_left_out(reference: Reference) -> str:
    """Name the scores that a reference cannot give, with reasons; "" if it can give all."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reference.left_out.items():
        by_reason.setdefault(reason, []).append(name)
    listed = [
        f"{' and '.join(filter(None, (', '.join(names[:-1]), names[-1])))} ({reason})"
        for reason, names in by_reason.items()
    ]
    return f"left out: {', '.join(listed)}" if listed else ""


def describe_program(device: torch.device) -> dict[str, Any]:
    """Describe the program, its libraries and its device."""
    is_gpu = device.type == "cuda"
    return {
        "commit": commit(),
        "has_local_changes": bool(local_changes()),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name(device) if is_gpu else "CPU",
    }
