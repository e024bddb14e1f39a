"""Draw a running training's grid of samples, from its averaged weights."""

from dataclasses import dataclass
from pathlib import Path

import torch

from data_tools.vae.autoencoder import Vae, decode_pixels
from models.diffusion import Diffusion
from models.guidance import Guidance
from models.sampler import methods_for
from training.config.tree import Config
from training.engine.interface import Engine
from training.engine.zero_weights import ema_weights
from training.monitoring.event_files import Monitor
from training.ranks.process_group import Ranks
from training.run.directory import SAMPLES_DIR
from training.sampling.image_files import image_grid, save_png
from training.sampling.latents import SamplerSettings, can_guide_without_classifier, sample_latents

SAMPLE_SEED = 0  # the same images are drawn every time, so that progress can be seen


def grid_settings(config: Config) -> SamplerSettings:
    """Say how a run's grids are drawn; without guidance where there is nothing to guide by."""
    run, diffusion = config.run, config.diffusion
    can_guide = can_guide_without_classifier(
        config.model.num_classes, config.data.class_dropout_prob
    )
    scale = run.sample_cfg_scale if can_guide else 1.0
    return SamplerSettings(
        run.sample_method or methods_for(diffusion.objective)[0],
        run.sample_steps,
        SAMPLE_SEED,
        guidance=Guidance(scale),
        shift=diffusion.timestep_shift if diffusion.objective == "flow" else 1.0,
    )


@dataclass(eq=False)
class SampleGrid:
    """Draw `sample_count` images, classes in turn, shared among the ranks.

    Rank 0 decodes them and writes the grid to the run directory and to TensorBoard.
    """

    config: Config
    engine: Engine
    diffusion: Diffusion
    ranks: Ranks
    device: torch.device
    monitor: Monitor
    vae: Vae | None

    def __post_init__(self) -> None:
        if self.vae is not None:
            self.vae.model.to(self.device)

    def draw(self, step: int) -> None:
        """Draw and record the grid of a step. All ranks must call this."""
        run, model = self.config.run, self.config.model
        # Equal numbers on all ranks: an expert-parallel group samples together.
        per_rank = -(-run.sample_count // self.ranks.world_size)
        first = self.ranks.rank * per_rank
        indices = torch.arange(first, first + per_rank, device=self.device)
        labels = indices % model.num_classes if model.num_classes else torch.zeros_like(indices)
        self.engine.eval()
        with ema_weights(self.engine):
            latents = sample_latents(
                self.engine.module,
                self.diffusion,
                grid_settings(self.config),
                indices=indices,
                labels=labels,
                latent_shape=model.latent_shape,
                null_class=model.num_classes,
                group_size=run.expert_parallel_size,
            )
        self.engine.train()
        parts = [torch.empty_like(latents) for _ in range(self.ranks.world_size)]
        torch.distributed.all_gather(parts, latents.contiguous())
        if not self.ranks.is_main:
            return
        pixels = decode_pixels(self.vae, torch.cat(parts)[: run.sample_count])
        columns = min(run.sample_count, model.num_classes or 8)
        picture = image_grid(pixels, columns=columns)
        with self.monitor.surviving_disk_errors():
            save_png(Path(run.run_dir) / SAMPLES_DIR / f"{step:07d}.png", picture)
        self.monitor.image(step, "samples/ema", picture)
