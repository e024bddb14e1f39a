"""Load what a run draws images with, and draw a batch of them.

N images, C H W latent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_tools.errors import ConfigError
from data_tools.vae.autoencoder import Vae, decode_pixels
from models.diffusion import Diffusion
from models.precision import cast_network, products_in
from models.switch_dit import SwitchDiT
from training.checkpoints.weight_files import load_model
from training.config.tree import Config
from training.engine.objective import build_diffusion
from training.sampling.flags import WeakerRun
from training.sampling.latents import SamplerSettings, sample_latents


@dataclass(frozen=True)
class DrawingPipeline:
    """Everything that turns the number of an image into pixels."""

    model: SwitchDiT
    weak_model: SwitchDiT | None
    diffusion: Diffusion
    vae: Vae
    latent_shape: tuple[int, int, int]
    device: torch.device
    precision: str  # of the networks; one of models.precision.PRECISIONS


def load_pipeline(
    config: Config,
    weights: Path,
    weaker_run: WeakerRun | None,
    vae: Vae,
    device: torch.device,
    precision: str,
) -> DrawingPipeline:
    """Load what a run draws images with.

    Args:
        config: of the run.
        weights: its file.
        weaker_run: of autoguidance, if it is wanted.
        vae: that decodes, on the device.
        device: that draws.
        precision: of the networks.
    """

    def load(config: Config, path: Path) -> SwitchDiT:
        return cast_network(load_model(config, path, device), precision)

    return DrawingPipeline(
        model=load(config, weights),
        weak_model=weaker_run and load(weaker_run.config, weaker_run.weights),
        diffusion=build_diffusion(config).to(device),
        vae=vae,
        latent_shape=config.model.latent_shape,
        device=device,
        precision=precision,
    )


def draw_batch(
    pipeline: DrawingPipeline,
    sampler: SamplerSettings,
    indices: Tensor,
    labels: Tensor,
    on_step: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Draw images `indices` (N,) int64 of classes `labels` (N,) int64, as uint8 (N, H, W, 3).

    Raises:
        ConfigError: they are not finite.
    """
    with products_in(pipeline.precision):
        latents = sample_latents(
            pipeline.model,
            pipeline.diffusion,
            sampler,
            indices=indices,
            labels=labels,
            latent_shape=pipeline.latent_shape,
            null_class=pipeline.model.options.num_classes,
            weak_model=pipeline.weak_model,
            on_step=on_step,
        )
    if not latents.isfinite().all():
        raise ConfigError(
            f"--checkpoint: its weights draw images {indices[0]} to {indices[-1]} that are not "
            "finite; choose another checkpoint or more --steps."
        )
    return decode_pixels(pipeline.vae, latents)
