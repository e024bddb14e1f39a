"""A mixture whose experts are shared out over a group of ranks (DeepSpeed-MoE, ZeRO 0 to 3).

Every rank knows the routing before the block runs (gate.py), so ranks need not tell each other
where samples go. A sample is sent once to each rank that holds one of its experts; that rank
applies its own copy of the gate values and sends back one partial sum. There is no capacity, no
padding and no dropped sample. The gradient of a gate value arises on the rank that applied it;
data-parallel averaging adds these parts up.

This is the only module in models/ that communicates.
"""

import deepspeed.comm as dist
import torch
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import Tensor, nn

from models.gate import BlockPlan
from models.moe import MixtureBody, make_experts
from models.network_options import NetworkOptions


class SharedOutMixture(nn.Module):
    """A mixture that holds 1 / expert_parallel_size of its experts on each rank.

    What DeepSpeed must see differs between ZeRO 3 and the stages below it, so each has a subclass;
    names, values and arithmetic are the same. DeepSpeed sets the process group when it starts.
    """

    def __init__(self, options: NetworkOptions) -> None:
        nn.Module.__init__(self)  # not MoE's, which would build its own gate and experts
        num_experts, ep_size = options.num_experts, options.expert_parallel_size
        assert num_experts % ep_size == 0, "experts must divide evenly over ranks"
        self.ep_size = ep_size
        self.expert_group_name = f"ep_size_{ep_size}"
        self.num_experts = num_experts
        self.num_local_experts = num_experts // ep_size
        # The groups do not exist yet; ranks of a group are consecutive, which is checked below.
        self._group_rank = dist.get_rank() % ep_size if dist.is_initialized() else 0
        experts = make_experts(options, self._group_rank)
        self.deepspeed_moe = MixtureBody(experts)
        for parameter in experts.parameters():
            parameter.allreduce = False  # averaged over the ranks with the same experts only
            parameter.group_name = self.expert_group_name

    def group_rank_and_size(self) -> tuple[int, int]:
        """Return this rank's place in the expert-parallel group and the group's size."""
        group = self.deepspeed_moe.ep_group
        assert group is not None, "deepspeed.initialize sets the group; call it before the model"
        group_rank = dist.get_rank(group=group)
        assert group_rank == self._group_rank, "ranks of an expert-parallel group are consecutive"
        return group_rank, self.ep_size

    # Sizes differ from step to step, and torch.compile would specialise on each of them.
    @torch.compiler.disable
    def forward(self, x: Tensor, plan: BlockPlan) -> Tensor:
        """Return the weighted sum of the experts of each sample. All ranks must call this.

        Args:
            x: (N, T, D) this rank's samples; N is equal on all ranks.
            plan: with the gate values of the whole group, and this rank's dispatch and rows.
        """
        dispatch, group = plan.dispatch, self.deepspeed_moe.ep_group
        assert dispatch is not None, "the plan was made for one rank"
        first = self._group_rank * self.num_local_experts
        gates = plan.expert_weight[dispatch.recv_rows, first : first + self.num_local_experts]
        rows = x.index_select(0, dispatch.send_rows)
        rows = _AllToAll.apply(group, rows, dispatch.send_splits, dispatch.recv_splits)
        sums = self.deepspeed_moe.experts(rows, gates, plan.rows)
        sums = _AllToAll.apply(group, sums, dispatch.recv_splits, dispatch.send_splits)
        return torch.zeros_like(x).index_add(0, dispatch.send_rows, sums.to(x.dtype))


class ExpertParallelMixture(SharedOutMixture, MoE):
    """For ZeRO 0 to 2, where the engine and its checkpoints look for a DeepSpeed MoE.

    It is one by type and by the attributes that they read; gate, dispatch and experts are ours.
    """

    use_residual = False
    enable_expert_tensor_parallelism = False


class ShardedExpertParallelMixture(SharedOutMixture):
    """For ZeRO 3, which also shards the weights, and refuses a DeepSpeed MoE.

    ZeRO 3 goes by marks on the parameters: these are sharded over the ranks that hold the same
    experts, averaged over all ranks, and counted once in the gradient's norm.
    """

    def __init__(self, options: NetworkOptions) -> None:
        super().__init__(options)
        for parameter in self.deepspeed_moe.parameters():
            parameter.ds_zero_placement_family = "autoep_expert"
            parameter.ds_zero_partition_group_name = self.expert_group_name

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Create the groups; the engine calls this before ZeRO shards. All ranks must call this."""
        parameters, name = list(self.deepspeed_moe.parameters()), self.expert_group_name
        # Sharded by zero.Init they would be over all ranks already, mixing different experts.
        is_sharded = any(hasattr(parameter, "ds_id") for parameter in parameters)
        assert not is_sharded, "build the model outside of zero.Init"
        if name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(
                self.ep_size, use_data_before_expert_parallel_=use_data_before_expert_parallel_
            )
        self.deepspeed_moe._set_ep_group(groups._get_expert_parallel_group(name))
        for parameter in parameters:
            # DeepSpeed finds this group itself for layers of its own only.
            parameter.ds_zero_partition_process_group = groups._get_expert_data_parallel_group(name)


class _AllToAll(torch.autograd.Function):
    """Exchange rows of uneven numbers; the gradient takes the way back."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        group: dist.ProcessGroup,
        rows: Tensor,
        send_splits: list[int],
        recv_splits: list[int],
    ) -> Tensor:
        ctx.group, ctx.send_splits, ctx.recv_splits = group, send_splits, recv_splits
        return _exchange(group, rows, send_splits, recv_splits)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: Tensor
    ) -> tuple[None, Tensor, None, None]:
        gradient = _exchange(ctx.group, gradient, ctx.recv_splits, ctx.send_splits)
        return None, gradient, None, None


def _exchange(
    group: dist.ProcessGroup, rows: Tensor, send_splits: list[int], recv_splits: list[int]
) -> Tensor:
    """Send rows grouped by destination, receive rows grouped by source. All ranks must call."""
    received = rows.new_empty((sum(recv_splits), *rows.shape[1:]))
    dist.all_to_all_single(received, rows.contiguous(), recv_splits, send_splits, group=group)
    return received
