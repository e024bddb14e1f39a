"""Switch-DiT: a diffusion transformer whose blocks mix experts by noise level (arXiv 2403.09176).

N batch, C H W latents, T tokens, D width, L blocks, E experts, K experts per sample, S diffusion
timesteps, P patch size.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.gate import RoutingPlan
from models.layers import (
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    sincos_positions,
)
from models.loss_weights import UncertaintyWeights
from models.moe import ExpertOptions
from models.routing import ChannelRouter, DenseRouter, ExpertRouter


class ModelSize(NamedTuple):
    """Depth, width and attention heads of a named size."""

    depth: int
    hidden_size: int
    num_heads: int


MODEL_SIZES = {
    "demo": ModelSize(6, 128, 4),  # ours: trains in minutes on two CPU cores
    "S": ModelSize(12, 384, 6),  # S to XL: DiT, Table 1
    "B": ModelSize(12, 768, 12),
    "L": ModelSize(24, 1024, 16),
    "XL": ModelSize(28, 1152, 16),
}

MODEL_NAMES = {"switch": "Switch-DiT", "dtr": "DTR", "dense": "DiT"}  # by routing


class SwitchDiTOutput(NamedTuple):
    """What a forward pass returns, in training and evaluation alike.

    Attributes:
        prediction: (N, 2C, H, W) noise (or what else is predicted) | variance channels, or
            (N, C, H, W) without learned variance, in the model's dtype.
        gate_table: (L, S, E) float32, with gradient; the prior loss needs it. None if there are
            no experts, and if all samples share one timestep.
        plan: the routing that was used; None if there are no experts.
        loss_log_variance: (S,) float32, with gradient: learnt weights of the loss; or None.
    """

    prediction: Tensor
    gate_table: Tensor | None
    plan: RoutingPlan | None
    loss_log_variance: Tensor | None = None


class SwitchDiT(nn.Module):
    """The model: noisy latents, timesteps and labels in, noise and variance out.

    With other routing than by experts it is DTR or plain DiT (routing.py). It draws no random
    numbers: labels are dropped and noise is added outside.
    """

    def __init__(
        self,
        *,
        input_size: tuple[int, int],
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        num_experts: int,
        top_k: int,
        num_timesteps: int = 1000,
        mlp_ratio: float = 4.0,
        expert_parallel_size: int = 1,
        shards_weights: bool = False,
        activation_checkpointing: bool = False,
        learned_variance: bool = True,
        routing: str = "switch",
        expert_kind: str = "affine",
        expert_hidden_ratio: float = 1.0,
        expert_dispatch: str = "auto",
        renormalize_gates: bool = False,
        dtr_alpha: float = 4.0,
        dtr_beta: float = 0.8,
        qk_norm: bool = False,
        has_loss_uncertainty: bool = False,
        compile_blocks: bool = False,
    ) -> None:
        """Build an initialised model, in which every block is the identity.

        Args:
            input_size: H, W of the latents, multiples of patch_size.
            num_classes: 0 for an unconditional model; the label num_classes means "no label".
            num_experts: E of every block; it and the other words about experts and gates matter
                with routing "switch" only.
            expert_parallel_size: ranks over which the experts of each block are shared out.
            shards_weights: ZeRO 3 will shard the weights; shared-out experts are marked for it.
            activation_checkpointing: keep only the input of each block for the backward pass.
            learned_variance: predict variance channels too.
            routing: "switch", "dtr" or "dense".
            expert_kind: "affine" or "mlp".
            expert_hidden_ratio: hidden width of an mlp expert, relative to hidden_size.
            expert_dispatch: of affine experts: "auto", "merged" or "dispatched".
            renormalize_gates: divide the top k gate values by their sum.
            dtr_alpha: exponent of a channel mask's position over timesteps.
            dtr_beta: fraction of channels that a channel mask leaves open.
            qk_norm: normalise queries and keys.
            has_loss_uncertainty: hold learnt weights of the loss per range of timesteps.
            compile_blocks: compile every block when it first runs.
        """
        super().__init__()
        height, width = input_size
        assert height % patch_size == 0 and width % patch_size == 0, "patches must tile the latents"
        assert routing == "switch" or expert_parallel_size == 1, "there are no experts to share out"
        self.input_size, self.patch_size = input_size, patch_size
        self.in_channels, self.num_classes = in_channels, num_classes
        self.out_channels = 2 * in_channels if learned_variance else in_channels
        self.num_timesteps = num_timesteps
        self.activation_checkpointing = activation_checkpointing
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        if routing == "switch":
            experts = ExpertOptions(
                *(num_experts, expert_kind, expert_hidden_ratio, expert_dispatch),
                *(expert_parallel_size, shards_weights),
            )
            # Named after what it holds: the gates of all blocks.
            self.gate = ExpertRouter(
                depth, hidden_size, num_timesteps, top_k, renormalize_gates, experts
            )
        elif routing == "dtr":
            self.gate = ChannelRouter(hidden_size, num_timesteps, dtr_alpha, dtr_beta)
        else:
            self.gate = DenseRouter()
        self.num_experts, self.top_k = self.gate.num_experts, self.gate.top_k
        self.blocks = nn.ModuleList(
            self.gate.make_block(hidden_size, num_heads, mlp_ratio, qk_norm) for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        positions = sincos_positions(height // patch_size, width // patch_size, hidden_size)
        self.register_buffer("pos_embed", positions, persistent=False)
        self.uncertainty = UncertaintyWeights(num_timesteps) if has_loss_uncertainty else None
        if compile_blocks:
            for block in self.blocks:
                block.compile()

    def forward(
        self, x_t: Tensor, t: Tensor, y: Tensor, group_t: Tensor | None = None
    ) -> SwitchDiTOutput:
        """Predict the noise. With expert parallelism, all ranks must call this.

        Args:
            x_t: (N, C, H, W) noisy latents, cast to the dtype of the weights.
            t: (N,) int64 timesteps in [0, S). With (1,) and several samples, all share it, as in
                sampling: their experts are merged once, and only one row of the gate table is
                computed. Not under expert parallelism.
            y: (N,) int64 labels; num_classes where there is none.
            group_t: (R * N,) timesteps of the expert-parallel group's R ranks, in rank order;
                needed when expert_parallel_size > 1.
        """
        x = self.x_embedder(x_t)
        x = x + self.pos_embed.to(x.dtype)
        routes = self.gate.route(self.t_embedder, t, x, self.blocks, group_t)
        c = (routes.t_emb + self.y_embedder(y)).to(x.dtype)
        for block, given in zip(self.blocks, routes.per_block, strict=True):
            x = self._run_block(block, x, c, given)
        return SwitchDiTOutput(
            self._unpatchify(self.final_layer(x, c)),
            routes.gate_table,
            routes.plan,
            None if self.uncertainty is None else self.uncertainty(),
        )

    def _run_block(self, block: nn.Module, x: Tensor, c: Tensor, given: Any) -> Tensor:
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return block(x, c, given)
        # Reentrant checkpointing gives wrong gradients under ZeRO 3. Blocks draw no random
        # numbers, so there is no generator state to keep.
        return checkpoint(block, x, c, given, use_reentrant=False, preserve_rng_state=False)

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """Put patches (N, T, P * P * channels), channels last, together to (N, channels, H, W)."""
        (height, width), P, channels = self.input_size, self.patch_size, self.out_channels
        grid = patches.view(-1, height // P, width // P, P, P, channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, height, width)
