"""The three kinds of routing: which parts of a block a timestep uses.

A kind of routing is a choice of the mask m of every block (layers.py): m * x goes through the
block, (1 - m) * x passes by.

    dense    no mask: plain DiT
    dtr      a fixed 0/1 mask of channels per timestep (Denoising Task Routing, arXiv 2310.07138)
    switch   1 + a mixture of experts gated by the timestep (Switch-DiT, arXiv 2403.09176)

A router names the class of a model's blocks and, in each forward pass, gives each block its mask.

N batch, T tokens, D width, L blocks, E experts, K experts per sample, S diffusion timesteps.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.gate import BlockPlan, RoutingPlan, TimestepGate, build_plan
from models.layers import DiTBlock
from models.moe import Mixture
from models.network_options import NetworkOptions
from models.prior import diffusion_prior

EmbedTimesteps = Callable[[Tensor], Tensor]  # (S,) -> (S, D) float32


class Routes(NamedTuple):
    """What a router gives to one forward pass.

    Attributes:
        t_emb: (N, D) float32 embedded timesteps; (1, D) if all samples share one.
        per_block: the last argument of every block's forward pass, L of them.
        gate_table: (L, S, E) float32 with gradient, or None.
        plan: which experts serve which sample, or None.
    """

    t_emb: Tensor
    per_block: Sequence[Any]
    gate_table: Tensor | None
    plan: RoutingPlan | None


def make_mixture(options: NetworkOptions) -> nn.Module:
    """Build the mixture of one block, with its experts shared out if asked for."""
    if options.expert_parallel_size == 1:
        return Mixture(options)
    # Imported here: a model on one GPU, or on a machine that only samples, needs no DeepSpeed.
    from models.expert_parallel import ExpertParallelMixture, ShardedExpertParallelMixture

    kind = ShardedExpertParallelMixture if options.shards_weights else ExpertParallelMixture
    return kind(options)


class SwitchDiTBlock(DiTBlock):
    """A DiT block behind a mixture of experts; all timesteps share the block itself."""

    def __init__(self, options: NetworkOptions) -> None:
        super().__init__(options)
        self.mixture = make_mixture(options)

    def forward(self, x: Tensor, c: Tensor, plan: BlockPlan) -> Tensor:
        """Run the block on the stream x (N, T, D), conditioned on c (N, D)."""
        # The mask is m = 1 + mixture: the identity until the zero-initialised experts learn.
        return super().forward(x, c, self.mixture(x, plan))


class DenseRouter(nn.Module):
    """No routing: all timesteps share everything."""

    num_experts = top_k = 0
    block_class = DiTBlock

    def __init__(self, _options: NetworkOptions) -> None:
        super().__init__()

    def route(
        self,
        embed: EmbedTimesteps,
        t: Tensor,
        x: Tensor,
        blocks: Sequence[nn.Module],
        group_t: Tensor | None,
    ) -> Routes:
        """Route the samples of one forward pass.

        Args:
            embed: the timestep embedder.
            t: (N,) int64 timesteps, or (1,) if all samples share one.
            x: (N, T, D) stream that enters the first block.
            blocks: all of the model's.
            group_t: timesteps of the expert-parallel group, where there is one.
        """
        return Routes(embed(t), [None] * len(blocks), None, None)


class ChannelRouter(DenseRouter):
    """DTR: every timestep owns a window of channels, equal in all blocks, which slides over them.

    The window has int(beta * D) channels and starts at ((t / (S - 1)) ** alpha) of the way.
    """

    def __init__(self, options: NetworkOptions) -> None:
        super().__init__(options)
        # Switch-DiT's prior slides the same window over experts; here the units are channels.
        D = options.hidden_size
        num_open = int(D * options.dtr_beta)
        mask = diffusion_prior(options.num_timesteps, 1, D, num_open, options.dtr_alpha)  # (S, D)
        mask_minus_one = (mask - 1).to(torch.get_default_device())
        self.register_buffer("mask_minus_one", mask_minus_one, persistent=False)  # (S, D)

    def route(
        self,
        embed: EmbedTimesteps,
        t: Tensor,
        x: Tensor,
        blocks: Sequence[nn.Module],
        group_t: Tensor | None,
    ) -> Routes:
        """Route the samples of one forward pass; the arguments are the base class's."""
        mask_minus_one = self.mask_minus_one[t].unsqueeze(1).to(x.dtype)  # (N, 1, D)
        return Routes(embed(t), [mask_minus_one] * len(blocks), None, None)


class ExpertRouter(TimestepGate):
    """Switch-DiT: a gate chooses the experts of every block by the timestep."""

    block_class = SwitchDiTBlock

    def __init__(self, options: NetworkOptions) -> None:
        super().__init__(options.depth, options.hidden_size, options.num_experts)
        assert 1 <= options.top_k <= options.num_experts, "top_k must be between 1 and num_experts"
        self.num_experts, self.top_k = options.num_experts, options.top_k
        self.num_timesteps, self.renormalize = options.num_timesteps, options.renormalize_gates
        # Where the experts of each block sit (placement.py); part of a run's layout, not weights.
        slots = torch.arange(options.num_experts).repeat(options.depth, 1)
        self.register_buffer("slots", slots, persistent=False)  # (L, E)

    def route(
        self,
        embed: EmbedTimesteps,
        t: Tensor,
        x: Tensor,
        blocks: Sequence[nn.Module],
        group_t: Tensor | None,
    ) -> Routes:
        """Route the samples of one forward pass; the arguments are DenseRouter's."""
        N, T, _ = x.shape
        mixture = blocks[0].mixture  # it stands for all of them
        group_rank, group_size = mixture.group_rank_and_size()
        is_shared = len(t) == 1 < N
        assert not (is_shared and group_size > 1), (
            "expert parallelism needs a timestep per sample; repeat t"
        )
        # Without sharing, all timesteps at once: the prior loss needs the whole gate table, and the
        # cost is that of a few tokens.
        t_emb = embed(t if is_shared else torch.arange(self.num_timesteps, device=t.device))
        gate_table = self(t_emb)
        row = torch.zeros_like(t) if is_shared else t
        plan = build_plan(
            gate_table,
            row,
            self.top_k,
            group_t,
            group_rank,
            group_size,
            slot_of_expert=self.slots,
            renormalize=self.renormalize,
            product=mixture.deepspeed_moe.experts.choose_product(
                T, self.top_k, is_shared=is_shared
            ),
        )
        return Routes(t_emb[row], plan.blocks(), None if is_shared else gate_table, plan)


ROUTERS = {"switch": ExpertRouter, "dtr": ChannelRouter, "dense": DenseRouter}
