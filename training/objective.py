"""What one micro-step computes: from stored latents to the loss terms.

Everything random about a sample (posterior noise, timestep, noise, label drop) is a function of
(seed, stream position), so a batch is the same whatever the number of ranks, and every rank knows
the timesteps of its whole expert-parallel group without communication.

N samples of a micro-batch, C H W latent, S diffusion timesteps, R ranks of an expert group.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from data_tools.loader import Batch
from models.diffusion import Diffusion, LossTerms
from models.latents import final_latents
from models.prior import diffusion_prior, match_units, prior_loss
from models.randomness import Stream, integers, normal, uniform
from models.switch_dit import MODEL_SIZES, SwitchDiTOutput
from training.config import Config


class MicroBatch(NamedTuple):
    """The tensors of one forward and its loss, on the training device."""

    x_start: Tensor  # (N, C, H, W) fp32 final latents
    noise: Tensor  # (N, C, H, W) fp32
    x_t: Tensor  # (N, C, H, W) fp32
    t: Tensor  # (N,) int64
    y: Tensor  # (N,) int64, dropped labels are the null class
    group_t: Tensor | None  # (R * N,) int64, None without expert parallelism


@dataclass
class Objective:
    """The training objective of one run: diffusion loss plus the prior loss on the gates.

    Args:
        config: the run's configuration.
        rank: of this process among all ranks.
        scaling_factor: of the VAE that made the data.
        shift_factor: of the VAE that made the data.
        device: where batches go.
    """

    config: Config
    rank: int
    scaling_factor: float
    shift_factor: float
    device: torch.device

    def __post_init__(self) -> None:
        diffusion, model = self.config.diffusion, self.config.model
        self.diffusion = Diffusion(diffusion.noise_schedule, diffusion.num_timesteps)
        self.diffusion.to(self.device)
        self.prior = diffusion_prior(
            diffusion.num_timesteps,
            MODEL_SIZES[model.size].depth,
            model.num_experts,
            model.top_k,
            alpha=diffusion.prior_alpha,
        ).to(self.device)
        self._assignment: tuple[int, Tensor] | None = None

    def micro_batch(self, batch: Batch) -> MicroBatch:
        """Draw everything random about a batch of stored latents from its stream positions."""
        seed = self.config.run.seed
        positions = batch.positions.to(self.device, non_blocking=True)
        raw = batch.raw_latents.to(self.device, non_blocking=True)
        y = batch.labels.to(self.device, non_blocking=True)

        N, C = raw.shape[0], raw.shape[1] // 2
        shape = (N, C, *raw.shape[2:])
        count = shape[1] * shape[2] * shape[3]
        posterior_noise = normal(seed, Stream.POSTERIOR, positions, count).view(shape)
        x_start = final_latents(raw, posterior_noise, self.scaling_factor, self.shift_factor)
        noise = normal(seed, Stream.NOISE, positions, count).view(shape)
        t, group_t = self._timesteps(positions)
        dropped = uniform(seed, Stream.LABEL_DROP, positions, 1)[:, 0]
        null_class = self.config.model.num_classes
        if null_class == 0:  # unconditional, whatever classes the data has
            y = torch.zeros_like(y)
        y = torch.where(dropped < self.config.data.class_dropout_prob, null_class, y)
        return MicroBatch(x_start, noise, self.diffusion.q_sample(x_start, t, noise), t, y, group_t)

    def _timesteps(self, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        seed, num_timesteps = self.config.run.seed, self.config.diffusion.num_timesteps
        group_size = self.config.run.expert_parallel_size
        if group_size == 1:
            return integers(seed, Stream.TIMESTEP, positions, num_timesteps), None
        # Ranks of a group are consecutive and so are their slices of the stream.
        N = len(positions)
        mine = (self.rank % group_size) * N
        span = torch.arange(group_size * N, device=self.device)
        group_positions = positions[0] - mine + span
        group_t = integers(seed, Stream.TIMESTEP, group_positions, num_timesteps)
        return group_t[mine : mine + N], group_t

    def loss(
        self, output: SwitchDiTOutput, micro_batch: MicroBatch, step: int
    ) -> tuple[LossTerms, Tensor]:
        """Compare a forward's output with its batch.

        Args:
            output: of the model on `micro_batch`.
            micro_batch: what was put in.
            step: the optimizer step; the gates are matched to the prior once per step.

        Returns:
            The loss terms (fp32 scalars, attached to the graph) and the detached mse of each
            sample, (N,).
        """
        mse, vlb = self.diffusion.loss_terms(
            output.prediction.float(),
            micro_batch.x_start,
            micro_batch.x_t,
            micro_batch.t,
            micro_batch.noise,
        )
        assignment = self._matched_units(output.gate_table.detach(), step)
        prior = prior_loss(output.gate_table, self.prior, micro_batch.t, assignment)
        weight = self.config.diffusion.prior_loss_weight
        total = mse.mean() + vlb.mean() + weight * prior
        return LossTerms(total, mse.mean(), vlb.mean(), prior), mse.detach()

    def _matched_units(self, gate_table: Tensor, step: int) -> Tensor:
        # The gates change once per optimizer step, not per micro-step. Seeding the tie-breaks by
        # the step makes all ranks, and a resumed run, choose the same assignment.
        if self._assignment is None or self._assignment[0] != step:
            seed = self.config.run.seed * 1_000_003 + step
            units = match_units(gate_table, self.config.model.top_k, self.prior, seed=seed)
            self._assignment = (step, units.to(self.device))
        return self._assignment[1]
