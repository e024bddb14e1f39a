"""The mixture of experts of a block whose experts are all on one rank.

What mixtures over several ranks (expert_parallel.py) have in common with it is here too.

N batch, T tokens, D width, E experts held by this rank.
"""

from typing import Any

from torch import Tensor, nn

from models.experts import AffineExperts, MlpExperts, StackedExperts
from models.gate import BlockPlan
from models.network_options import NetworkOptions


class MixtureBody(nn.Module):
    """What DeepSpeed expects between a mixture and its experts: a module that knows their group.

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

    def __init__(self, options: NetworkOptions) -> None:
        super().__init__()
        self.deepspeed_moe = MixtureBody(make_experts(options))

    def group_rank_and_size(self) -> tuple[int, int]:
        """Return this rank's place in the expert-parallel group and the group's size."""
        return 0, 1

    def forward(self, x: Tensor, plan: BlockPlan) -> Tensor:
        """Return the weighted sum of the experts of each sample of (N, T, D)."""
        return self.deepspeed_moe.experts(x, plan.expert_weight, plan.rows)


def make_experts(options: NetworkOptions, group_rank: int = 0) -> StackedExperts:
    """Build the experts of one block that a rank holds.

    Args:
        options: of the network.
        group_rank: this rank's place in the expert-parallel group.
    """
    num_local = options.num_experts // options.expert_parallel_size
    if options.expert_kind == "affine":
        return AffineExperts(options.hidden_size, num_local, options.expert_dispatch)
    return MlpExperts(
        options.hidden_size,
        num_local,
        options.expert_hidden_size,
        first=group_rank * num_local,
        total=options.num_experts,
    )
