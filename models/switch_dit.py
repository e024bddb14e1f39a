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
from models.network_options import NetworkOptions
from models.routing import ROUTERS


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
        prediction: (N, C, H, W) what the objective asks for (diffusion.py), or (N, 2C, H, W) with C
            variance channels behind it; in the dtype of the weights.
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
    """The network: maps noisy latents, timesteps and labels to a prediction.

    With routing "dtr" or "dense" it is DTR or plain DiT (routing.py). It draws no random numbers:
    labels are dropped and noise is added outside.
    """

    def __init__(self, options: NetworkOptions) -> None:
        """Build an initialised model, in which every block is the identity."""
        super().__init__()
        height, width = options.input_size
        P, D = options.patch_size, options.hidden_size
        assert height % P == 0 and width % P == 0, "patches must tile the latents"
        assert options.has_experts or options.expert_parallel_size == 1, (
            "there are no experts to share out"
        )
        self.options = options
        self.x_embedder = PatchEmbed(P, options.in_channels, D)
        self.t_embedder = TimestepEmbedder(D)
        self.y_embedder = LabelEmbedder(options.num_classes, D)
        self.gate = ROUTERS[options.routing](options)  # named after what it holds: all gates
        self.num_experts, self.top_k = self.gate.num_experts, self.gate.top_k
        self.blocks = nn.ModuleList(self.gate.block_class(options) for _ in range(options.depth))
        self.final_layer = FinalLayer(D, P, options.out_channels)
        self.register_buffer("pos_embed", sincos_positions(*options.grid, D), persistent=False)
        self.uncertainty = (
            UncertaintyWeights(options.num_timesteps) if options.has_loss_uncertainty else None
        )
        if options.compile_blocks:
            for block in self.blocks:
                block.compile()

    def forward(
        self, x_t: Tensor, t: Tensor, y: Tensor, group_t: Tensor | None = None
    ) -> SwitchDiTOutput:
        """Predict what the objective asks for. With expert parallelism, all ranks must call this.

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
        if not (self.options.activation_checkpointing and torch.is_grad_enabled()):
            return block(x, c, given)
        # Reentrant checkpointing gives wrong gradients under ZeRO 3. Blocks draw no random
        # numbers, so there is no generator state to keep.
        return checkpoint(block, x, c, given, use_reentrant=False, preserve_rng_state=False)

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """Put patches (N, T, P * P * channels), channels last, together to (N, channels, H, W)."""
        P, channels = self.options.patch_size, self.options.out_channels
        grid = patches.view(-1, *self.options.grid, P, P, channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, *self.options.input_size)
