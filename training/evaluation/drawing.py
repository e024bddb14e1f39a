"""Draw a large set of images from a run: on any number of processes, in parts that outlive a kill.

    settings.json   what decides the images; images of other settings are refused
    parts/          one file per batch while images are drawn, whole or not there
    samples.npz     all images: arr_0 uint8 (N, H, W, 3), arr_1 labels; replaces the parts
    png/            one file per image, with --png
    card.json       how the images were drawn; score-REFERENCE-NETWORK.json has their scores, too

Rounding depends on which images share a batch. So batch b always holds the images from
b * batch_size on, whichever process draws it: the bytes are the same after a kill, and on any
number of processes with equally many threads.

N images, C H W latent.
"""

import math
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_tools.errors import ConfigError
from data_tools.files import SINCE, MalformedError, replace_file
from data_tools.formats import Format, NewerFormatError
from data_tools.process.launcher import is_started_again
from models.randomness import Stream, integers, uniform
from training.evaluation.image_npz import LABELS, ImageNpz, write_npz
from training.ranks.agreement import agreed_message, from_main
from training.ranks.process_group import Ranks
from training.sampling.image_files import save_png
from training.sampling.latents import SamplerSettings
from training.sampling.pipeline import DrawingPipeline, draw_batch

SETTINGS_FILE = "settings.json"
SAMPLES_FILE = "samples.npz"
CARD_FILE = "card.json"
PARTS_DIR, PNG_DIR = "parts", "png"
LABEL_RULES = {
    "random": "each class as likely, by (seed, index)",
    "balanced": "index modulo the number of classes",
    "data": "as often as in the data set, by (seed, index)",
}
SEED_RULE = "image i: noise by (seed, i), see models/randomness.py"


@dataclass(frozen=True)
class DrawSettings:
    """Everything that decides the bytes of an image set, apart from the machine's rounding."""

    num_images: int
    seed: int
    labels: str  # of LABEL_RULES, or the numbers of classes; "none" without classes
    sampler: str
    steps: int
    shift: float
    guidance: str  # "none", "classifier-free" or "autoguidance"
    guidance_scale: float
    guidance_channels: int  # 0 = all
    guidance_interval: list[float]  # timesteps; empty = all
    batch_size: int
    image_size: list[int]  # height, width
    weights_sha256: str
    weaker_weights_sha256: str  # "" without autoguidance
    vae_sha256: str
    precision: str = field(default="fp32", metadata={SINCE: 2})  # of the network

    @property
    def num_parts(self) -> int:
        """Batches."""
        return math.ceil(self.num_images / self.batch_size)

    def indices(self, part: int) -> range:
        """Return which images a part holds."""
        start = part * self.batch_size
        return range(start, min(start + self.batch_size, self.num_images))


DRAW = Format(newest=2, kind=DrawSettings)


def labels_of(settings: DrawSettings, indices: Tensor, class_counts: list[int]) -> Tensor:
    """Return the class (N,) int64 of images `indices` (N,) int64."""
    if settings.labels == "none":
        return torch.zeros_like(indices)
    if settings.labels == "balanced":
        return indices % len(class_counts)
    if settings.labels == "random":
        return integers(settings.seed, Stream.SAMPLE_LABEL, indices, len(class_counts))
    ends = torch.tensor(class_counts, dtype=torch.float64, device=indices.device).cumsum(0)
    drawn = uniform(settings.seed, Stream.SAMPLE_LABEL, indices, 1)[:, 0].double()
    return torch.searchsorted(ends, drawn * ends[-1], right=True)


def check_folder(folder: Path, settings: DrawSettings, *, is_forced: bool) -> None:
    """Refuse a folder that holds other files than those of an image set with these settings."""
    path = folder / SETTINGS_FILE
    try:
        names = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
        text = path.read_text(encoding="utf-8") if path.exists() else None
    except OSError as err:
        raise ConfigError(f"--output {folder}: {err.strerror}; choose another.") from err
    # A kill may leave the temporary file of the settings, which are written first of all.
    if all(name.startswith(f"{SETTINGS_FILE}.") for name in names):
        return
    if text is None:
        raise ConfigError(
            f"--output {folder}: holds files but no {SETTINGS_FILE}, so they are not this "
            "program's; choose another."
        )
    if is_forced:
        return
    try:
        found = asdict(DRAW.loads(text, str(path)))
    except (ValueError, MalformedError) as err:
        raise ConfigError(
            f"--output {folder}: its {SETTINGS_FILE} is damaged ({err}); choose another, or draw "
            "the images again with --force."
        ) from err
    changed = [
        f"{name} {found.get(name)} (now {value})"
        for name, value in asdict(settings).items()
        if found.get(name) != value
    ]
    if changed:
        raise ConfigError(
            f"--output {folder}: holds images drawn otherwise, {', '.join(changed)}; choose "
            "another, or draw them again with --force."
        )


def prepare_folder(folder: Path, settings: DrawSettings, *, is_forced: bool) -> None:
    """Remove what --force replaces, then write the settings. Only rank 0 calls this.

    Slurm starts a job again with its --force. Images with the same settings are kept then, because
    this very job may have drawn them.
    """
    with disk_errors(folder):
        if is_forced and folder.exists() and not (is_started_again() and holds(folder, settings)):
            for name in (PARTS_DIR, PNG_DIR):
                shutil.rmtree(folder / name, ignore_errors=True)
            for path in (folder / SAMPLES_FILE, folder / CARD_FILE, *folder.glob("score-*.json")):
                path.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        DRAW.write(folder / SETTINGS_FILE, settings)
        (folder / PARTS_DIR).mkdir(exist_ok=True)


def holds(folder: Path, settings: DrawSettings) -> bool:
    """Tell whether a folder was begun with these very settings."""
    try:
        return DRAW.loads((folder / SETTINGS_FILE).read_bytes(), str(folder)) == settings
    except (FileNotFoundError, ValueError, MalformedError, NewerFormatError):
        return False


@contextmanager
def disk_errors(folder: Path, what_stays: str = ", finished parts stay") -> Iterator[None]:
    """Report a full or read-only disk in one sentence, which ends with what is not lost."""
    try:
        yield
    except OSError as err:
        raise ConfigError(
            f"--output {folder}: cannot write {err.filename or 'a file'} ({err.strerror}); free "
            f"some space or choose another and run the same command again{what_stays}."
        ) from err


def draw(
    pipeline: DrawingPipeline,
    settings: DrawSettings,
    sampler: SamplerSettings,
    class_counts: list[int],
    folder: Path,
    ranks: Ranks,
    on_images: Callable[[int], None] = lambda _: None,
) -> None:
    """Draw the missing parts, shared among the ranks. All ranks must call this.

    Args:
        pipeline: that draws.
        settings: of the images.
        sampler: the same, as the sampler takes it.
        class_counts: of the data set, by class; empty without classes.
        folder: prepared by rank 0.
        ranks: this process's place.
        on_images: called with the number of images of each part of this rank.
    """
    missing = as_rank_0_says(_missing_parts(folder, settings) if ranks.is_main else [], ranks)
    with failing_together(ranks):
        for part in missing[ranks.rank :: ranks.world_size]:
            indices = settings.indices(part)
            numbers = torch.tensor(indices, device=pipeline.device)
            labels = labels_of(settings, numbers, class_counts)
            pixels = draw_batch(pipeline, sampler, numbers, labels)
            with disk_errors(folder):
                _write_part(folder / PARTS_DIR, part, pixels)
            on_images(len(indices))


def as_rank_0_says(value: Any, ranks: Ranks) -> Any:
    """Return rank 0's value on all ranks; all must call this.

    For what only one rank may look up on the disk: a network disk may show others an older state.
    """
    return from_main(value) if ranks.world_size > 1 else value


@contextmanager
def failing_together(ranks: Ranks) -> Iterator[None]:
    """Raise the first ConfigError of any rank on all of them; all must enter and leave this."""
    error = None
    try:
        yield
    except ConfigError as err:
        error = err
    message = None if error is None else str(error)
    if ranks.world_size > 1:
        message = agreed_message(error)
    if message is not None:
        raise ConfigError(message)


def _missing_parts(folder: Path, settings: DrawSettings) -> list[int]:
    if (folder / SAMPLES_FILE).exists():
        return []
    there = {path.name for path in (folder / PARTS_DIR).iterdir()}
    return [part for part in range(settings.num_parts) if _part_name(part) not in there]


def _part_name(part: int) -> str:
    return f"{part:06d}.npy"


def _write_part(folder: Path, part: int, pixels: np.ndarray) -> None:
    path = folder / _part_name(part)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    replace_file(path, lambda file: np.save(file, pixels), temporary)


def merge_parts(folder: Path, settings: DrawSettings, class_counts: list[int]) -> ImageNpz:
    """Write samples.npz from the parts, then remove them. Only rank 0 calls this."""
    path, parts = folder / SAMPLES_FILE, folder / PARTS_DIR
    shape = (settings.num_images, *settings.image_size, 3)
    if not path.exists():
        labels = labels_of(settings, torch.arange(settings.num_images), class_counts)
        with disk_errors(folder):
            write_npz(path, _read_parts(parts, settings), shape, {LABELS: labels.numpy()})
    shutil.rmtree(parts, ignore_errors=True)
    return ImageNpz(path, "--output")


def _read_parts(folder: Path, settings: DrawSettings) -> Iterator[np.ndarray]:
    for part in range(settings.num_parts):
        path = folder / _part_name(part)
        wanted = (len(settings.indices(part)), *settings.image_size, 3)
        try:
            pixels = np.load(path)
        except ValueError as err:
            raise ConfigError(
                f"{path} is damaged ({err}); move it elsewhere, it is drawn again."
            ) from err
        if pixels.shape != wanted:
            raise ConfigError(
                f"{path} is damaged: its shape is {pixels.shape}, not {wanted}; move it elsewhere, "
                "it is drawn again."
            )
        yield pixels


def write_pngs(samples: ImageNpz, folder: Path) -> None:
    """Write the images that are not there yet as FOLDER/png/000000.png. Only rank 0 calls this."""
    for i, picture in enumerate(chain.from_iterable(samples.batches(64))):
        path = folder / PNG_DIR / f"{i:06d}.png"
        if not path.exists():
            with disk_errors(folder):
                save_png(path, picture)
