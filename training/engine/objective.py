"""Compute the loss terms of one micro-step from stored latents.

Everything random about a sample (posterior noise, timestep, noise, label drop) is a function of
(seed, stream position), so a batch is the same whatever the number of ranks, and every rank knows
the timesteps of its whole expert-parallel group without communication.

N samples of a micro-batch, C H W latent, S diffusion timesteps, R ranks of an expert group.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_tools.stream.loader import Batch
from models.dealing import deal, served_at_home
from models.diffusion import Diffusion, LossTerms
from models.latents import final_latents, frozen_latents
from models.loss_weights import loss_weight_table, uncertainty_weighted
from models.prior import diffusion_prior, prior_loss
from models.randomness import Stream, normal, uniform
from models.switch_dit import MODEL_SIZES, SwitchDiTOutput
from models.timestep_sampling import TimestepSampling
from models.unit_matching import match_units
from training.config.tree import Config
from training.engine.gate_stream import GateStream


class SampleLosses(NamedTuple):
    """Unweighted losses of every sample of a micro-batch, (N,) fp32, detached."""

    mse: Tensor
    vlb: Tensor


class MicroBatch(NamedTuple):
    """The tensors of one forward and its loss, on the training device."""

    x_start: Tensor  # (N, C, H, W) fp32 final latents
    noise: Tensor  # (N, C, H, W) fp32
    x_t: Tensor  # (N, C, H, W) fp32
    t: Tensor  # (N,) int64
    y: Tensor  # (N,) int64, dropped labels are the null class
    group_t: Tensor | None  # (R * N,) int64, None without expert parallelism


def build_diffusion(config: Config) -> Diffusion:
    """Build the process that a run trains and samples with."""
    diffusion = config.diffusion
    return Diffusion(
        diffusion.noise_schedule,
        diffusion.num_timesteps,
        objective=diffusion.objective,
        learned_variance=diffusion.learned_variance,
    )


def build_timestep_sampling(config: Config) -> TimestepSampling:
    """Build the density that a run draws its timesteps from."""
    diffusion = config.diffusion
    return TimestepSampling(
        num_timesteps=diffusion.num_timesteps,
        density=diffusion.timestep_sampling,
        is_stratified=diffusion.timestep_stratified,
        global_batch_size=config.optim.global_batch_size,
        mean=diffusion.timestep_mean,
        std=diffusion.timestep_std,
        mode_scale=diffusion.mode_scale,
        shift=diffusion.timestep_shift,
    )


@dataclass
class Objective:
    """The training objective of one run: diffusion loss plus the prior loss on the gates.

    Args:
        config: the run's configuration.
        rank: of this process among all ranks.
        scaling_factor: of the VAE that made the data, see models/latents.py.
        shift_factor: of the VAE that made the data.
        device: where batches go.
        world_size: number of ranks.
        is_frozen: the data are draws of the posterior instead of its moments.
    """

    config: Config
    rank: int
    scaling_factor: float | Tensor
    shift_factor: float | Tensor
    device: torch.device
    world_size: int = 1
    is_frozen: bool = False

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size, f"no rank {self.rank} of {self.world_size}"
        diffusion, model = self.config.diffusion, self.config.model
        self.diffusion = build_diffusion(self.config).to(self.device)
        self.timesteps = build_timestep_sampling(self.config)
        self._learns_weights = diffusion.loss_weight == "uncertainty"
        self.gate_stream = GateStream(self.device)
        self._loss_weight = loss_weight_table(
            "constant" if self._learns_weights else diffusion.loss_weight,
            self.diffusion,
            min_snr_gamma=diffusion.min_snr_gamma,
            p2_gamma=diffusion.p2_gamma,
        ).float()
        self.prior = None  # only gates have one; without its loss there is nothing to match for
        if model.routing == "switch" and diffusion.prior_loss_weight > 0:
            self.prior = diffusion_prior(
                diffusion.num_timesteps,
                MODEL_SIZES[model.size].depth,
                model.num_experts,
                model.top_k,
                alpha=diffusion.prior_alpha,
            ).to(self.device)
        self._assignment: tuple[int, Tensor] | None = None  # with the step it is of
        self._deals = (
            diffusion.timestep_dealing == "affine" and self.config.run.expert_parallel_size > 1
        )
        self._slots = torch.arange(model.num_experts).repeat(MODEL_SIZES[model.size].depth, 1)
        self._at_home: Tensor | None = None  # (S, R) on the host, by which timesteps are dealt

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the step: plain values, equal on all ranks.

        Between two matchings, the last one cannot be computed again from the present gates; nor
        can the table by which the next timesteps are dealt.
        """
        state: dict[str, Any] = {}
        if self._assignment is not None and self.config.diffusion.prior_matching_every > 1:
            step, units = self._assignment
            state |= {"matched_step": step, "matched_units": units.tolist()}
        if self._at_home is not None:
            state["served_at_home"] = self._at_home.tolist()
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned; without it the next step matches anew."""
        self._assignment = None
        if self.prior is not None and "matched_units" in state:
            units = torch.tensor(state["matched_units"], device=self.device)
            self._assignment = (state["matched_step"], units)
        self._at_home = None
        if self._deals and "served_at_home" in state:
            self._at_home = torch.tensor(state["served_at_home"])

    def use_slots(self, slot_of_expert: Tensor) -> None:
        """Remember where experts sit, (L, E) on the host, and forget how timesteps were dealt.

        Until gates are matched again, every rank keeps the timesteps that it draws.
        """
        self._slots, self._at_home = slot_of_expert, None

    def micro_batch(self, batch: Batch) -> MicroBatch:
        """Draw everything random about a batch of stored latents from its stream positions."""
        seed = self.config.run.seed_of("noise")
        positions = batch.positions.to(self.device, non_blocking=True)
        raw = batch.raw_latents.to(self.device, non_blocking=True)
        y = batch.labels.to(self.device, non_blocking=True)

        N, C = raw.shape[0], raw.shape[1] if self.is_frozen else raw.shape[1] // 2
        shape = (N, C, *raw.shape[2:])
        count = shape[1] * shape[2] * shape[3]
        if self.is_frozen:
            x_start = frozen_latents(raw, self.scaling_factor, self.shift_factor)
        else:
            posterior_noise = normal(seed, Stream.POSTERIOR, positions, count).view(shape)
            x_start = final_latents(raw, posterior_noise, self.scaling_factor, self.shift_factor)
        noise = normal(seed, Stream.NOISE, positions, count).view(shape)
        t, group_t = self._timesteps(batch.positions if self._deals else positions)
        dropped = uniform(seed, Stream.LABEL_DROP, positions, 1)[:, 0]
        null_class = self.config.model.num_classes
        if null_class == 0:  # unconditional, whatever classes the data has
            y = torch.zeros_like(y)
        y = y.masked_fill(dropped < self.config.data.class_dropout_prob, null_class)
        return MicroBatch(x_start, noise, self.diffusion.q_sample(x_start, t, noise), t, y, group_t)

    def _timesteps(self, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Draw this rank's timesteps, and its group's, from positions on the device.

        Those that will be dealt are drawn on the host, where positions come from, so that nothing
        waits for the device.
        """
        seed, group_size = self.config.run.seed_of("noise"), self.config.run.expert_parallel_size
        if group_size == 1:
            return self.timesteps.draw(seed, positions), None
        # Each rank of the group is at the same place of its own slice of the global batch.
        N, slice_size = len(positions), self.config.optim.global_batch_size // self.world_size
        place = self.rank % group_size
        steps = torch.arange(-place, group_size - place, device=positions.device) * slice_size
        group_t = self.timesteps.draw(seed, (steps[:, None] + positions).flatten())
        mine = place * N
        if self._at_home is not None:
            group_t = torch.from_numpy(deal(group_t.numpy(), self._at_home.numpy()))
        group_t = group_t.to(self.device, non_blocking=True)
        return group_t[mine : mine + N], group_t

    def loss(
        self, output: SwitchDiTOutput, micro_batch: MicroBatch, step: int
    ) -> tuple[LossTerms, SampleLosses]:
        """Compare a forward's output with its batch.

        Args:
            output: of the model on `micro_batch`.
            micro_batch: what was put in.
            step: the optimizer step; the gates are matched to the prior in the first micro-step of
                every step that `prior_matching_every` divides.

        Returns:
            The loss terms (fp32 scalars, attached to the graph) and those of each sample. Both mse
            and vlb are without the loss weight, so that runs with different weights can be
            compared; the total is what is trained.
        """
        t = micro_batch.t
        mse, vlb = self.diffusion.loss_terms(
            output.prediction, micro_batch.x_start, micro_batch.x_t, t, micro_batch.noise
        )
        if self._learns_weights:
            weighted = uncertainty_weighted(mse + vlb, output.loss_log_variance[t])
        else:
            weighted = self._loss_weight[t] * mse + vlb
        prior = self._prior_loss(output.gate_table, t, step)
        total = weighted.mean() + self.config.diffusion.prior_loss_weight * prior
        terms = LossTerms(total, mse.mean(), vlb.mean(), prior)
        return terms, SampleLosses(mse.detach(), vlb.detach())

    def _prior_loss(self, gate_table: Tensor | None, t: Tensor, step: int) -> Tensor:
        if self.prior is None:
            return torch.zeros((), device=self.device)
        assignment = self._matched_units(gate_table.detach(), step)
        return prior_loss(gate_table, self.prior, t, assignment)

    def _matched_units(self, gate_table: Tensor, step: int) -> Tensor:
        # The gates change once per optimizer step, not per micro-step. Seeding the tie-breaks by
        # the step makes all ranks, and a resumed run, choose the same assignment. Matching waits
        # for the gates; the steps in between wait for nothing.
        due = step - step % self.config.diffusion.prior_matching_every
        if self._assignment is None or self._assignment[0] != due:
            seed = self.config.run.seed_of("noise") * 1_000_003 + due
            top_k, group_size = self.config.model.top_k, self.config.run.expert_parallel_size
            with self.gate_stream.beside_the_blocks():
                units = match_units(gate_table, top_k, self.prior, seed=seed)
                if self._deals:
                    # By older gates than those that will route it, a timestep is dealt less well,
                    # not wrongly; at this moment the gates have been waited for anyway.
                    slots = self._slots.to(self.device)
                    self._at_home = served_at_home(gate_table, top_k, slots, group_size).cpu()
            self._assignment = (due, self.gate_stream.keep(units))
        return self._assignment[1]
