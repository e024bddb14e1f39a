"""Build our expert-parallel layers and DeepSpeed's own, with equal experts and equal routing.

DeepSpeed's layer (deepspeed.moe.layer.MoE) routes tokens by a gate on their values. Here its gate
gets the logits of each sample instead and repeats them for all tokens of the sample. DeepSpeed's
code then chooses and counts as for its own gate, without dropping a token. It divides the k gate
values by their sum; the result is multiplied by the sum again.

N samples of a rank, T tokens, D width, L layers, E experts, K experts per sample, S timesteps, R
ranks of the group, G = R * N.
"""

import contextlib
import io
from typing import Any

import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import top1gating, top2gating, topkgating
from torch import Tensor, nn

from benchmarks.layer_problem import Problem, Side, Sizes, held_experts
from models.gate import build_plan
from models.network_options import NetworkOptions
from models.routing import make_mixture

# Options of which a mixture makes no use.
NO_TRUNK = {"input_size": (1, 1), "patch_size": 1, "in_channels": 1, "num_heads": 1}
NO_TRUNK |= {"num_classes": 0}


def our_side(sizes: Sizes, problem: Problem, rank: int, world_size: int) -> Side:
    """Build our layers: one plan per step, then a mixture per layer."""
    options = NetworkOptions(
        **NO_TRUNK,
        hidden_size=sizes.width,
        depth=sizes.depth,
        num_experts=sizes.num_experts,
        top_k=sizes.top_k,
        expert_kind=sizes.kind,
        expert_hidden_ratio=sizes.hidden_ratio,
        expert_parallel_size=world_size,
    )
    mixtures = nn.ModuleList(make_mixture(options) for _ in range(sizes.depth))
    mixtures.to(problem.x.device)
    held = held_experts(sizes, rank, world_size)
    for layer, mixture in enumerate(mixtures):
        _join_group(mixture)
        for parameter, values in zip(mixture.parameters(), problem.experts, strict=True):
            parameter.data.copy_(values[layer, held])
    own_t = problem.group_t[rank * sizes.batch_size :][: sizes.batch_size]

    def forward(x: Tensor) -> Tensor:
        experts = mixtures[0].deepspeed_moe.experts
        table = problem.gate_logits.softmax(-1)  # of all timesteps, as the prior loss needs it
        plan = build_plan(
            table,
            own_t,
            sizes.top_k,
            problem.group_t,
            rank,
            world_size,
            product=experts.choose_product(sizes.num_tokens, sizes.top_k),
        )
        for mixture, block_plan in zip(mixtures, plan.blocks(), strict=True):
            x = x + mixture(x, block_plan)
        return x

    def gradients() -> list[Tensor]:
        of_layers = [[p.grad for p in mixture.parameters()] for mixture in mixtures]
        return [torch.stack(kind) for kind in zip(*of_layers, strict=True)]

    return Side("ours", forward, gradients, lambda: mixtures.zero_grad(set_to_none=True))


def stock_side(sizes: Sizes, problem: Problem, rank: int, world_size: int) -> Side:
    """Build DeepSpeed's layers, with a gate that routes by the given logits."""
    layers = nn.ModuleList(
        MoE(
            sizes.width,
            make_stock_expert(sizes),
            num_experts=sizes.num_experts,
            ep_size=world_size,
            k=sizes.top_k,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        for _ in range(sizes.depth)
    )
    held = range(sizes.num_experts)[held_experts(sizes, rank, world_size)]
    for number, layer in enumerate(layers):
        layer.deepspeed_moe.gate = GivenGate(sizes.top_k)
        _join_group(layer)
        for e, expert in zip(held, layer.deepspeed_moe.experts.deepspeed_experts, strict=True):
            for parameter, values in zip(expert.parameters(), problem.experts, strict=True):
                parameter.data.copy_(_transposed(values[number, e]))
    layers.to(problem.x.device)
    own_t = problem.group_t[rank * sizes.batch_size :][: sizes.batch_size]

    def forward(x: Tensor) -> Tensor:
        for number, layer in enumerate(layers):
            x = x + layer(x, problem.gate_logits[number, own_t])[0]
        return x

    def gradients() -> list[Tensor]:
        experts = [
            expert for layer in layers for expert in layer.deepspeed_moe.experts.deepspeed_experts
        ]
        of_experts = [[_transposed(p.grad) for p in expert.parameters()] for expert in experts]
        kinds = (torch.stack(kind) for kind in zip(*of_experts, strict=True))
        return [kind.unflatten(0, (sizes.depth, len(held))) for kind in kinds]

    return Side("DeepSpeed", forward, gradients, lambda: layers.zero_grad(set_to_none=True))


def make_stock_expert(sizes: Sizes) -> nn.Module:
    """Build an expert as DeepSpeed wants one."""
    D, H = sizes.width, int(sizes.hidden_ratio * sizes.width)
    if sizes.kind == "affine":
        return nn.Linear(D, D)
    return nn.Sequential(nn.Linear(D, H), nn.GELU(approximate="tanh"), nn.Linear(H, D))


class GivenGate(nn.Module):
    """Stands in for deepspeed.moe.sharded_moe.TopKGate; what it leaves out is the linear layer."""

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k, self.ep_group = top_k, None

    def _set_ep_group(self, ep_group: Any) -> None:
        self.ep_group = ep_group

    def forward(self, tokens: Tensor, sample_logits: Tensor, *_: Any) -> tuple[Any, ...]:
        """Route (N * T, D) tokens by the logits (N, E) of their samples."""
        num_tokens = tokens.shape[0] // sample_logits.shape[0]
        logits = sample_logits.repeat_interleave(num_tokens, dim=0)  # (N * T, E)
        options = {"drop_tokens": False, "ep_group": self.ep_group, "sparse_routes": True}
        if self.top_k == 1:  # the one whose gate value stays as it is
            return top1gating(logits, 1.0, 0, use_rts=False, **options)
        if self.top_k == 2:
            routed = top2gating(logits, 1.0, 0, top2_2nd_expert_sampling=False, **options)
        else:
            routed = topkgating(logits, self.top_k, 1.0, 0, **options)
        *routes, gates, counts = routed  # gates (K, N * T), which sum to 1
        kept = sample_logits.softmax(1).topk(self.top_k, dim=1).values.sum(1)
        return (*routes, gates * kept.repeat_interleave(num_tokens), counts)


def _join_group(layer: MoE) -> None:
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints that it creates the group
        layer.set_deepspeed_parallelism()


def _transposed(values: Tensor) -> Tensor:
    """Turn a weight (in, out) into torch's (out, in), or back; a bias stays as it is."""
    return values.T if values.dim() == 2 else values
