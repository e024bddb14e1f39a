"""Draw final latents from a model: the numbers that an image depends on, and guidance.

Image i of a seed depends on (seed, i), its class and the sampler's settings, never on the batch it
was drawn in or on the rank that drew it.

N images, C H W latent.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.diffusion import Diffusion
from models.guidance import Guidance, ModelFn, autoguided, classifier_free
from models.randomness import Stream, normal
from models.sampler import sample


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
