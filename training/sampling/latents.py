"""Images from a model: the numbers an image depends on, guidance, grids.

Image i of a seed depends on (seed, i), its class and the sampler's settings, never on the batch it
was drawn in or on the rank that drew it.

N images, C H W latent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from models.diffusion import Diffusion
from models.guidance import Guidance, ModelFn, autoguided, classifier_free
from models.randomness import Stream, normal
from models.sampler import sample

GRID_MARGIN = 2
LABEL_HEIGHT = 14


@dataclass(frozen=True)
class SamplerSettings:
    """How images are drawn."""

    method: str  # see models.sampler.methods_for
    num_steps: int
    seed: int
    guidance: Guidance = field(default_factory=Guidance)
    shift: float = 1.0  # of the visited times towards noise, for flow


def can_guide_without_classifier(num_classes: int, class_dropout_prob: float) -> bool:
    """Tell whether training has seen both: labels, and the null class that means "no label"."""
    return num_classes > 0 and 0 < class_dropout_prob < 1


def sample_latents(
    model: nn.Module,
    diffusion: Diffusion,
    settings: SamplerSettings,
    *,
    indices: Tensor,
    labels: Tensor,
    latent_shape: tuple[int, int, int],
    null_class: int,
    weak_model: nn.Module | None = None,
    group_size: int = 1,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Draw final latents for images `indices` (N,) int64 with classes `labels` (N,) int64.

    Guidance is classifier-free, or autoguidance if there is a weak model. With group_size > 1 the
    model's experts are spread over that many ranks: all of them must call this, each with the same
    number of images.

    Returns:
        (N, C, H, W) float32 on the device of `indices`.
    """
    assert len(indices) == len(labels) > 0, "every image has an index and a class"
    count = latent_shape[0] * latent_shape[1] * latent_shape[2]
    seed, shape = settings.seed, (len(indices), *latent_shape)
    model_fn = _model_fn(model, group_size)
    if weak_model is None:
        denoise = classifier_free(model_fn, labels, null_class, settings.guidance)
    else:
        denoise = autoguided(model_fn, _model_fn(weak_model), labels, settings.guidance)

    def step_noise(step: int) -> Tensor:
        # One stream position per image and step.
        positions = indices * diffusion.num_timesteps + step
        return normal(seed, Stream.SAMPLE_STEP, positions, count).view(shape)

    start = normal(seed, Stream.SAMPLE_START, indices, count).view(shape)
    with torch.no_grad():
        return sample(
            denoise,
            start,
            diffusion=diffusion,
            method=settings.method,
            num_steps=settings.num_steps,
            shift=settings.shift,
            step_noise=step_noise,
            on_step=on_step,
        )


def _model_fn(model: nn.Module, group_size: int = 1) -> ModelFn:
    """Wrap a network; t (1,) is the one timestep of all images."""

    def call(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if group_size == 1:
            return model(x_t, t, y).prediction.float()
        t = t.expand(len(x_t))
        return model(x_t, t, y, t.repeat(group_size)).prediction.float()

    return call


def image_grid(
    pixels: np.ndarray, *, columns: int, row_labels: Sequence[str] | None = None
) -> np.ndarray:
    """Lay images out row by row, each row under its label.

    Args:
        pixels: (N, H, W, 3) uint8.
        columns: images per row; the last row may be short.
        row_labels: one text per row, or None for no labels.

    Returns:
        (height, width, 3) uint8.
    """
    N, H, W, _ = pixels.shape
    rows = -(-N // columns)
    label_height = LABEL_HEIGHT if row_labels is not None else 0
    row_height = label_height + H + GRID_MARGIN
    size = (columns * (W + GRID_MARGIN) + GRID_MARGIN, rows * row_height + GRID_MARGIN)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=11)
    for row in range(rows):
        top = row * row_height + GRID_MARGIN
        if row_labels is not None:
            draw.text((GRID_MARGIN + 1, top), row_labels[row], fill="black", font=font)
        for column, picture in enumerate(pixels[row * columns : (row + 1) * columns]):
            left = column * (W + GRID_MARGIN) + GRID_MARGIN
            canvas.paste(Image.fromarray(picture), (left, top + label_height))
    return np.asarray(canvas)
