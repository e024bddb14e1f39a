"""The mixture of affine experts of a block (Switch-DiT, arXiv 2403.09176).

An expert is one linear map, so the experts of a sample merge exactly: with gate values g,
sum_e g_e (x W_e + b_e) = x (sum_e g_e W_e) + sum_e g_e b_e. One merged matrix per sample replaces
K products and all sorting of samples. Every expert takes part in every merge, chosen or not, so
its gradient is zero rather than missing: DeepSpeed's ZeRO needs the same gradients on every rank.

N batch, T tokens, D width, E experts held by this rank.
"""

from typing import Any

import torch
from torch import Tensor, nn

from models.gate import BlockPlan


class StackedExperts(nn.Module):
    """The experts of one block as one weight and one bias, zero at initialisation.

    `state_dict()` shows them one by one as `deepspeed_experts.I.weight`: DeepSpeed's checkpoints
    know experts by these names only. Loading takes both forms.
    """

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.weight = nn.Parameter(
            torch.zeros(num_experts, hidden_size, hidden_size)
        )  # (E, in, out)
        self.bias = nn.Parameter(torch.zeros(num_experts, hidden_size))
        self.register_state_dict_post_hook(_unstack_experts)
        self.register_load_state_dict_pre_hook(_stack_experts)

    def forward(self, x: Tensor, expert_weight: Tensor) -> Tensor:
        """Return sum_e g_e (x W_e + b_e).

        Args:
            x: (N, T, D); N may be 0, and every expert still gets a gradient, zero.
            expert_weight: (N, E) gate values g, zero for experts that a sample does not use.
        """
        D = x.shape[-1]
        gates = expert_weight.to(self.weight.dtype)
        weight = (gates @ self.weight.flatten(1)).view(-1, D, D)  # one matrix per sample
        bias = (gates @ self.bias).unsqueeze(1)  # (N, 1, D)
        return torch.baddbmm(bias, x, weight)


class MixtureBody(nn.Module):
    """The name space between a mixture and its experts that DeepSpeed looks for.

    Attributes:
        ep_group: process group of the ranks that share the experts; None without sharing.
    """

    def __init__(self, experts: StackedExperts) -> None:
        super().__init__()
        self.experts = experts
        self.ep_group: Any = None

    def _set_ep_group(self, ep_group: Any) -> None:
        """Take the group from DeepSpeed, which calls this when it starts the engine."""
        self.ep_group = ep_group


class Mixture(nn.Module):
    """A mixture whose experts are all on this rank, as ordinary parameters."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.deepspeed_moe = MixtureBody(StackedExperts(hidden_size, num_experts))

    def group_rank_and_size(self) -> tuple[int, int]:
        """Return this rank's place in the expert-parallel group and the group's size."""
        return 0, 1

    def forward(self, x: Tensor, plan: BlockPlan) -> Tensor:
        """Return the weighted sum of the experts of each sample of (N, T, D)."""
        return self.deepspeed_moe.experts(x, plan.expert_weight)


def make_mixture(hidden_size: int, num_experts: int, expert_parallel_size: int) -> nn.Module:
    """Build the mixture of one block, with its experts shared out if asked for."""
    if expert_parallel_size == 1:
        return Mixture(hidden_size, num_experts)
    # Imported here: a model on one GPU, or on a machine that only samples, needs no DeepSpeed.
    from models.expert_parallel import ExpertParallelMixture

    return ExpertParallelMixture(hidden_size, num_experts, expert_parallel_size)


def _unstack_experts(
    module: StackedExperts, state_dict: dict[str, Any], prefix: str, _metadata: Any
) -> None:
    for kind in ("weight", "bias"):
        stacked = state_dict.get(prefix + kind)
        # Under ZeRO 3 the parameter is an empty placeholder, which cannot be taken apart.
        if stacked is None or stacked.shape[:1] != (module.num_experts,):
            continue
        del state_dict[prefix + kind]
        for i, tensor in enumerate(stacked.unbind(0)):
            state_dict[f"{prefix}deepspeed_experts.{i}.{kind}"] = tensor


def _stack_experts(
    module: StackedExperts, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    for kind in ("weight", "bias"):
        names = [f"{prefix}deepspeed_experts.{i}.{kind}" for i in range(module.num_experts)]
        if all(name in state_dict for name in names):
            state_dict[prefix + kind] = torch.stack([state_dict.pop(name) for name in names])
