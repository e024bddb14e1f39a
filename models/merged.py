"""A Switch-DiT without experts: one merged affine map per block for each of a few timesteps.

Affine experts merge exactly (experts.py) and their gates depend on the timestep alone, so at a
given timestep the network is a plain DiT with one more affine map in every block. A sampler with a
fixed number of steps visits timesteps that are known beforehand; for these, gates, experts and the
timestep embedder can be left out.

N batch, C H W latents, D width, L blocks, E experts, G timesteps that are kept.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.experts import affine
from models.gate import build_plan
from models.network_options import NetworkOptions
from models.switch_dit import SwitchDiT, SwitchDiTOutput


class MergedDiT(SwitchDiT):
    """The network of a Switch-DiT with affine experts at G timesteps.

    Attributes:
        timesteps: (G,) int64.
        t_emb: (G, D), the timestep embedder's outputs.
        merged_weight: (L, G, D, D), the experts' weights of each block, merged.
        merged_bias: (L, G, D).
    """

    def __init__(self, timesteps: Sequence[int], options: NetworkOptions) -> None:
        """Build it with zeros for what is merged.

        Args:
            timesteps: those that are kept, each in [0, S).
            options: of the Switch-DiT; those of experts are ignored.
        """
        super().__init__(replace(options, routing="dense"))
        del self.t_embedder
        L, G, D = len(self.blocks), len(timesteps), options.hidden_size
        kept = torch.tensor(list(timesteps), dtype=torch.int64)
        self.register_buffer("timesteps", kept, persistent=False)
        self.t_emb = nn.Parameter(torch.zeros(G, D))
        self.merged_weight = nn.Parameter(torch.zeros(L, G, D, D))
        self.merged_bias = nn.Parameter(torch.zeros(L, G, D))

    def forward(
        self, x_t: Tensor, t: Tensor, y: Tensor, group_t: Tensor | None = None
    ) -> SwitchDiTOutput:
        """Predict as the Switch-DiT does.

        Args:
            x_t: (N, C, H, W).
            t: (1,) int64, or (N,) of one value, one of the kept timesteps.
            y: (N,) int64 labels.
            group_t: None; there are no experts to share out.

        Raises:
            ValueError: t was not kept.
        """
        found = (self.timesteps == t[0]).nonzero()
        if not len(found) or (t != t[0]).any():
            raise ValueError(
                f"this network was merged for the timesteps {self.timesteps.tolist()}, of which "
                f"all samples of a call have one; it was called with {t.tolist()}"
            )
        row = found[0, 0]
        x = self.x_embedder(x_t)
        x = x + self.pos_embed.to(x.dtype)
        c = (self.t_emb[row].float() + self.y_embedder(y)).to(x.dtype)
        for block, weight, bias in zip(
            self.blocks, self.merged_weight, self.merged_bias, strict=True
        ):
            x = block(x, c, affine(x, weight[row], bias[row]))
        return SwitchDiTOutput(self._unpatchify(self.final_layer(x, c)), None, None)


@torch.no_grad()
def merge_experts(model: SwitchDiT, timesteps: Sequence[int]) -> MergedDiT:
    """Merge the affine experts of a network at each of the timesteps.

    The products are those that the network does when all samples share a timestep. On a CPU the
    result therefore predicts the same as the network does then, bit for bit.
    """
    gate = model.gate
    assert model.options.has_experts, "there are no experts to merge"
    merged = MergedDiT(timesteps, model.options.for_prediction())
    kept = merged.state_dict()
    for name, value in model.state_dict().items():
        if name in kept:
            kept[name].copy_(value)
    for row, t in enumerate(timesteps):
        t_emb = model.t_embedder(torch.tensor([t], device=gate.weight.device))
        plan = build_plan(
            gate(t_emb),
            torch.zeros(1, dtype=torch.int64),
            model.top_k,
            renormalize=gate.renormalize,
        )
        merged.t_emb[row] = t_emb[0]
        for i, (block, routed) in enumerate(zip(model.blocks, plan.blocks(), strict=True)):
            experts, gates = block.mixture.deepspeed_moe.experts, routed.expert_weight
            D = experts.hidden_size
            merged.merged_weight[i, row] = (gates @ experts.weight.flatten(1)).view(D, D)
            merged.merged_bias[i, row] = (gates @ experts.bias)[0]
    return merged.eval()
