"""Switch-DiT: a diffusion transformer whose blocks mix experts by noise level (arXiv 2403.09176).

N batch, C H W latents, T tokens, D width, L blocks, E experts, K experts per sample, S diffusion
timesteps, P patch size.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.gate import BlockPlan, RoutingPlan, TimestepGate, build_plan
from models.layers import (
    DiTBlock,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    sincos_positions,
)
from models.moe import make_mixture


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


class SwitchDiTOutput(NamedTuple):
    """What a forward pass returns, in training and evaluation alike.

    Attributes:
        prediction: (N, 2C, H, W) noise | variance channels, in the model's dtype.
        gate_table: (L, S, E) float32, with gradient; the prior loss needs it.
        plan: the routing that was used.
    """

    prediction: Tensor
    gate_table: Tensor
    plan: RoutingPlan


class SwitchDiTBlock(DiTBlock):
    """A DiT block behind a mixture of experts; the block itself is what all timesteps share."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        num_experts: int,
        expert_parallel_size: int,
    ) -> None:
        super().__init__(hidden_size, num_heads, mlp_ratio)
        self.mixture = make_mixture(hidden_size, num_experts, expert_parallel_size)

    def forward(self, x: Tensor, c: Tensor, plan: BlockPlan) -> Tensor:
        """Run the block on the stream x (N, T, D), conditioned on c (N, D)."""
        # The mask is m = 1 + mixture: the identity until the zero-initialised experts learn.
        return super().forward(x, c, self.mixture(x, plan))


class SwitchDiT(nn.Module):
    """The model: noisy latents, timesteps and labels in, noise and variance out.

    It draws no random numbers: labels are dropped and noise is added outside.
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
        activation_checkpointing: bool = False,
    ) -> None:
        """Build an initialised model, in which every block is the identity.

        Args:
            input_size: H, W of the latents, multiples of patch_size.
            num_classes: 0 for an unconditional model; the label num_classes means "no label".
            expert_parallel_size: ranks over which the experts of each block are shared out.
            activation_checkpointing: keep only the input of each block for the backward pass.
        """
        super().__init__()
        height, width = input_size
        assert height % patch_size == 0 and width % patch_size == 0, "patches must tile the latents"
        assert 1 <= top_k <= num_experts, "top_k must be between 1 and num_experts"
        self.input_size, self.patch_size = input_size, patch_size
        self.in_channels, self.num_classes = in_channels, num_classes
        self.num_experts, self.top_k, self.num_timesteps = num_experts, top_k, num_timesteps
        self.activation_checkpointing = activation_checkpointing
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.gate = TimestepGate(depth, hidden_size, num_experts)
        self.blocks = nn.ModuleList(
            SwitchDiTBlock(hidden_size, num_heads, mlp_ratio, num_experts, expert_parallel_size)
            for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, 2 * in_channels)
        positions = sincos_positions(height // patch_size, width // patch_size, hidden_size)
        self.register_buffer("pos_embed", positions, persistent=False)

    def forward(
        self, x_t: Tensor, t: Tensor, y: Tensor, group_t: Tensor | None = None
    ) -> SwitchDiTOutput:
        """Predict the noise. With expert parallelism, all ranks must call this.

        Args:
            x_t: (N, C, H, W) noisy latents, cast to the dtype of the weights.
            t: (N,) int64 timesteps in [0, S).
            y: (N,) int64 labels; num_classes where there is none.
            group_t: (R * N,) timesteps of the expert-parallel group's R ranks, in rank order;
                needed when expert_parallel_size > 1.
        """
        # All timesteps at once: the prior loss needs the whole gate table, and the cost is that
        # of a few tokens.
        t_emb = self.t_embedder(torch.arange(self.num_timesteps, device=t.device))  # (S, D) float32
        gate_table = self.gate(t_emb)
        group_rank, group_size = self.blocks[0].mixture.group_rank_and_size()
        plan = build_plan(gate_table, t, self.top_k, group_t, group_rank, group_size)
        x = self.x_embedder(x_t)
        x = x + self.pos_embed.to(x.dtype)
        c = (t_emb[t] + self.y_embedder(y)).to(x.dtype)
        for block, block_plan in zip(self.blocks, plan.blocks(), strict=True):
            x = self._run_block(block, x, c, block_plan)
        return SwitchDiTOutput(self._unpatchify(self.final_layer(x, c)), gate_table, plan)

    def _run_block(self, block: nn.Module, x: Tensor, c: Tensor, plan: BlockPlan) -> Tensor:
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return block(x, c, plan)
        # Reentrant checkpointing gives wrong gradients under ZeRO 3. Blocks draw no random
        # numbers, so there is no generator state to keep.
        return checkpoint(block, x, c, plan, use_reentrant=False, preserve_rng_state=False)

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """Put patches (N, T, P * P * 2C), channels last, together to (N, 2C, H, W)."""
        (height, width), P = self.input_size, self.patch_size
        grid = patches.view(-1, height // P, width // P, P, P, 2 * self.in_channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, 2 * self.in_channels, height, width)
