"""The mixture of experts of a block, on one rank or shared out over several.

N batch, T tokens, D width, E experts held by this rank.
"""

from typing import Any, NamedTuple

from torch import Tensor, nn

from models.experts import AffineExperts, MlpExperts, StackedExperts
from models.gate import BlockPlan


class ExpertOptions(NamedTuple):
    """What the experts of a block are.

    Attributes:
        num_experts: of a block, over all ranks.
        kind: "affine" or "mlp".
        hidden_ratio: hidden width of an mlp, relative to the model's.
        dispatch: "auto", "merged" or "dispatched" (affine experts).
        parallel_size: ranks over which the experts of a block are shared out.
        is_sharded: the weights of an expert are in turn sharded over the ranks that hold it, by
            ZeRO 3; matters if the experts are shared out.
    """

    num_experts: int
    kind: str = "affine"
    hidden_ratio: float = 1.0
    dispatch: str = "auto"
    parallel_size: int = 1
    is_sharded: bool = False


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

    def __init__(self, hidden_size: int, options: ExpertOptions) -> None:
        super().__init__()
        self.deepspeed_moe = MixtureBody(make_experts(hidden_size, options))

    def group_rank_and_size(self) -> tuple[int, int]:
        """Return this rank's place in the expert-parallel group and the group's size."""
        return 0, 1

    def forward(self, x: Tensor, plan: BlockPlan) -> Tensor:
        """Return the weighted sum of the experts of each sample of (N, T, D)."""
        return self.deepspeed_moe.experts(x, plan.expert_weight, plan.rows)


def mlp_expert_width(hidden_size: int, hidden_ratio: float) -> int:
    """Return the hidden width of an mlp expert in a model of width hidden_size."""
    return max(1, int(hidden_ratio * hidden_size))


def make_experts(hidden_size: int, options: ExpertOptions, group_rank: int = 0) -> StackedExperts:
    """Build the experts that a rank holds.

    Args:
        hidden_size: D.
        options: what they are.
        group_rank: this rank's place in the expert-parallel group.
    """
    num_local = options.num_experts // options.parallel_size
    if options.kind == "affine":
        return AffineExperts(hidden_size, num_local, options.dispatch)
    mlp_size = mlp_expert_width(hidden_size, options.hidden_ratio)
    return MlpExperts(hidden_size, num_local, mlp_size, group_rank * num_local, options.num_experts)


def make_mixture(hidden_size: int, options: ExpertOptions) -> nn.Module:
    """Build the mixture of one block, with its experts shared out if asked for."""
    if options.parallel_size == 1:
        return Mixture(hidden_size, options)
    # Imported here: a model on one GPU, or on a machine that only samples, needs no DeepSpeed.
    from models.expert_parallel import ExpertParallelMixture, ShardedExpertParallelMixture

    kind = ShardedExpertParallelMixture if options.is_sharded else ExpertParallelMixture
    return kind(hidden_size, options)
