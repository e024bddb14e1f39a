"""The training step as the official Switch-DiT code organises it, to compare ours with.

It is written from the description of the method, not from its source. It uses the parameters of a
SwitchDiT of ours, so both compute the same function. Routing is decided block by block. Samples are
sorted by expert, which waits for the device in every block, and every expert multiplies its own.
Every step matches the prior through the (S, U, U) array of differences. Nothing is merged or fused.

N batch, T tokens, D width, L blocks, E experts, K experts per sample, S diffusion timesteps,
U = L * E units.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from models.layers import Attention, DiTBlock
from models.prior import prior_loss
from models.switch_dit import SwitchDiT


class OfficialWay(nn.Module):
    """A SwitchDiT with affine experts, run block by block without a plan.

    Args:
        model: whose parameters are used; they stay the model's.
    """

    def __init__(self, model: SwitchDiT) -> None:
        super().__init__()
        self.model = model

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prediction (N, 2C, H, W) and the gate table (L, S, E).

        Args:
            x_t: (N, C, H, W).
            t: (N,) int64.
            y: (N,) int64.
        """
        model = self.model
        t_emb = model.t_embedder(t)  # (N, D)
        every_t = model.t_embedder(
            torch.arange(model.options.num_timesteps, device=t.device)
        )  # (S, D)
        x = _patches(model, x_t) + model.pos_embed
        c = t_emb + model.y_embedder(y)
        tables = []
        for i, block in enumerate(model.blocks):
            gate_probs = self._gate(i, t_emb)  # (N, E)
            tables.append(self._gate(i, every_t))  # (S, E)
            mask = 1 + dispatched_mixture(
                x,
                gate_probs,
                model.top_k,
                block.mixture.deepspeed_moe.experts.weight,
                block.mixture.deepspeed_moe.experts.bias,
            )
            x = _block(block, x * mask, c) + (1 - mask) * x
        return model._unpatchify(model.final_layer(x, c)), torch.stack(tables)

    def _gate(self, block: int, t_emb: Tensor) -> Tensor:
        gate = self.model.gate
        logits = F.linear(F.silu(t_emb), gate.weight[block], gate.bias[block])
        return logits.float().softmax(-1)


def dispatched_mixture(
    x: Tensor, gate_probs: Tensor, top_k: int, weight: Tensor, bias: Tensor
) -> Tensor:
    """Return sum_e g_e (x W_e + b_e) over the top k, by sorting the samples by expert.

    Args:
        x: (N, T, D).
        gate_probs: (N, E).
        top_k: K.
        weight: (E, D, D); bias: (E, D).
    """
    values, index = gate_probs.topk(top_k, dim=-1)  # (N, K)
    expert, order = index.flatten().sort(stable=True)
    rows = order // top_k
    counts = expert.bincount(minlength=weight.shape[0]).tolist()  # waits for the device
    parts = [
        part @ w + b for part, w, b in zip(x[rows].split(counts), weight, bias, strict=True)
    ]  # an expert without samples multiplies zero rows
    weighted = torch.cat(parts) * values.flatten()[order][:, None, None]
    return weighted.new_zeros(x.shape).index_add(0, rows, weighted)


def match_by_differences(gate_table: Tensor, top_k: int, prior: Tensor, seed: int) -> Tensor:
    """Match units as `models.unit_matching.match_units` does, through the (S, U, U) array.

    Args:
        gate_table: (L, S, E).
        top_k: K.
        prior: (S, U).
        seed: of the order in which units are presented.

    Returns:
        (U,) int64.
    """
    chosen = gate_table.topk(top_k, dim=-1).indices
    uses = torch.zeros_like(gate_table).scatter(-1, chosen, 1.0).transpose(0, 1).flatten(1)
    generator = np.random.default_rng(seed)
    gate_order = generator.permutation(uses.shape[1])
    prior_order = generator.permutation(uses.shape[1])
    uses = uses[:, torch.from_numpy(gate_order).to(uses.device)]
    prior = prior[:, torch.from_numpy(prior_order).to(uses.device)]
    cost = (uses[:, :, None] - prior[:, None, :]).abs().sum(0)  # through (S, U, U)
    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    assignment = np.empty_like(gate_order)
    assignment[gate_order[rows]] = prior_order[columns]
    return torch.from_numpy(assignment).to(gate_table.device)


def official_prior_loss(
    gate_table: Tensor, top_k: int, prior: Tensor, t: Tensor, seed: int
) -> Tensor:
    """Match, then compare: the loss on the gates in one step."""
    assignment = match_by_differences(gate_table.detach(), top_k, prior, seed)
    return prior_loss(gate_table, prior, t, assignment)


def _patches(model: SwitchDiT, x_t: Tensor) -> Tensor:
    """Embed patches as DiT does, (N, T, D): a view whose rows of tokens lie apart."""
    return model.x_embedder.proj(x_t).flatten(2).transpose(1, 2)


def _block(block: DiTBlock, x: Tensor, c: Tensor) -> Tensor:
    """Run a block of DiT written out: one operation per symbol."""
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = block.adaLN_modulation(c)[
        :, None
    ].chunk(6, dim=-1)
    normed = block.norm1(x) * (1 + scale_msa) + shift_msa
    x = x + gate_msa * _attention(block.attn, normed)
    normed = block.norm2(x) * (1 + scale_mlp) + shift_mlp
    return x + gate_mlp * block.mlp(normed)


def _attention(attention: Attention, x: Tensor) -> Tensor:
    N, T, D = x.shape
    qkv = attention.qkv(x).reshape(N, T, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(*qkv.unbind(0))
    return attention.proj(y.transpose(1, 2).reshape(N, T, D))
