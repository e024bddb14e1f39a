"""Mixtures, on one process and shared out over ranks (experts alone: test_experts.py)."""

import os

import pytest
import torch

from models.gate import BlockPlan, ExpertProduct, build_plan
from models.moe import Mixture
from models.routing import make_mixture
from tests.support import reference_routing
from tests.support.ranks import run_ranks
from tests.support.tiny_models import tiny_options


@pytest.mark.parametrize("kind", ["affine", "mlp"])
def test_a_new_mixture_adds_nothing(kind):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 6, generator=generator)
    probs = torch.randn(1, 4, 5, generator=generator).softmax(-1)
    mixture = make_mixture(tiny_options(hidden_size=6, num_experts=5, expert_kind=kind))

    plan = build_plan(probs, torch.arange(4), 2, product=ExpertProduct.LOOP)

    assert isinstance(mixture, Mixture)
    assert torch.equal(mixture(x, plan.blocks()[0]), torch.zeros_like(x))


def test_a_plan_of_gate_values_alone_merges():
    mixture = Mixture(tiny_options(hidden_size=6, num_experts=2))
    mixture.deepspeed_moe.experts.bias.data.normal_()
    gates = torch.tensor([[1.0, 0.0], [0.0, 2.0]])

    output = mixture(torch.zeros(2, 3, 6), BlockPlan(gates))

    bias = mixture.deepspeed_moe.experts.bias
    assert torch.equal(output[:, 0], torch.stack((bias[0], 2 * bias[1])))


def test_parameters_have_the_names_that_deepspeed_knows():
    names = set(Mixture(tiny_options(num_experts=2, expert_kind="mlp")).state_dict())

    prefix = "deepspeed_moe.experts.deepspeed_experts"
    kinds = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    assert names == {f"{prefix}.{i}.{kind}" for i in (0, 1) for kind in kinds}


# Expert parallelism: the same network on one process and shared out over ranks, in float64.

DEPTH, NUM_EXPERTS, WIDTH, NUM_TOKENS, NUM_TIMESTEPS, LOCAL_BATCH = 2, 8, 4, 3, 20, 5
EXPERTS = {
    "affine": (reference_routing.affine_expert, [(WIDTH, WIDTH), (WIDTH,)]),
    "mlp": (reference_routing.mlp_expert, [(WIDTH, 6), (6,), (6, WIDTH), (WIDTH,)]),
}


class Problem:
    """Gate table, experts and a global batch; equal on all ranks."""

    def __init__(self, kind, num_samples, timesteps):
        generator = torch.Generator().manual_seed(7)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.expert, shapes = EXPERTS[kind]
        self.table = (2 * draw(DEPTH, NUM_TIMESTEPS, NUM_EXPERTS)).softmax(-1).requires_grad_()
        self.parameters = [0.3 * draw(DEPTH, NUM_EXPERTS, *shape) for shape in shapes]
        self.x = draw(num_samples, NUM_TOKENS, WIDTH)
        self.target = draw(num_samples, NUM_TOKENS, WIDTH)
        self.slots = torch.stack(
            [torch.randperm(NUM_EXPERTS, generator=generator) for _ in range(DEPTH)]
        )
        self.t = torch.randint(NUM_TIMESTEPS, (num_samples,), generator=generator)
        if timesteps == "all equal":
            self.t[:] = 3


def next_stream(x, mixed):
    return x * (1 + mixed) + torch.tanh(x)


def single_process(problem, top_k, renormalize):
    """Output and gradients of the mean loss on one process, by the loops of the reference."""
    parameters = [parameter.clone().requires_grad_() for parameter in problem.parameters]
    x = problem.x
    for block in range(DEPTH):
        probs, of_block = problem.table[block, problem.t], [p[block] for p in parameters]
        mixed = reference_routing.mixture_of(problem.expert, x, probs, of_block, top_k, renormalize)
        x = next_stream(x, mixed)
    loss = (x - problem.target).square().mean()
    return x.detach(), torch.autograd.grad(loss, [problem.table, *parameters])


def check_dispatch(problem, top_k, renormalize, mixtures, rank, world_size, groups):
    """Compare this rank's share of outputs and averaged gradients with one process."""
    expected, (table_grad, *expert_grads) = single_process(problem, top_k, renormalize)
    group_rank, group_size = mixtures[0].group_rank_and_size()
    own = slice(rank * LOCAL_BATCH, (rank + 1) * LOCAL_BATCH)
    first = (rank - group_rank) * LOCAL_BATCH
    group_t = problem.t[first : first + group_size * LOCAL_BATCH]
    product = mixtures[0].deepspeed_moe.experts.choose_product(NUM_TOKENS, top_k)
    plan = build_plan(
        problem.table,
        problem.t[own],
        top_k,
        group_t,
        group_rank,
        group_size,
        slot_of_expert=problem.slots,
        renormalize=renormalize,
        product=product,
    )
    own_slots = slice(
        group_rank * NUM_EXPERTS // group_size, (group_rank + 1) * NUM_EXPERTS // group_size
    )
    held = [slots.argsort()[own_slots] for slots in problem.slots]  # experts of each block
    x = problem.x[own].clone().requires_grad_()  # a leaf with gradient, like an embedding's output
    for block, (mixture, block_plan) in enumerate(zip(mixtures, plan.blocks(), strict=True)):
        for parameter, value in zip(mixture.parameters(), problem.parameters, strict=True):
            parameter.data.copy_(value[block, held[block]])
        x = next_stream(x, mixture(x, block_plan))
    torch.testing.assert_close(x.detach(), expected[own])

    parameters = [p for m in mixtures for p in m.parameters()]
    loss = (x - problem.target[own]).square().mean()
    found = torch.autograd.grad(loss, [problem.table, *parameters])
    torch.distributed.all_reduce(found[0])
    for gradient in found[1:]:
        torch.distributed.all_reduce(gradient, group=groups)
    torch.testing.assert_close(found[0] / world_size, table_grad)
    for i, gradient in enumerate(found[1:]):
        block, kind = divmod(i, len(expert_grads))
        torch.testing.assert_close(gradient / world_size, expert_grads[kind][block, held[block]])
    return [block.dispatch for block in plan.blocks()]


def check_all_dispatches(rank, world_size):
    from deepspeed.utils import groups

    torch.set_default_dtype(torch.float64)
    kinds = (("affine", "merged"), ("affine", "dispatched"), ("mlp", "auto"))
    for group_size in {2, world_size}:
        num_rows = []
        for kind, dispatch in kinds:
            options = tiny_options(
                hidden_size=WIDTH,
                num_experts=NUM_EXPERTS,
                expert_kind=kind,
                expert_hidden_ratio=1.5,
                expert_dispatch=dispatch,
                expert_parallel_size=group_size,
            )
            mixtures = [make_mixture(options) for _ in range(DEPTH)]
            for mixture in mixtures:
                mixture.set_deepspeed_parallelism()
            same_experts = groups._get_expert_data_parallel_group(f"ep_size_{group_size}")
            for timesteps, top_k in (("random", 1), ("random", 3), ("all equal", 2)):
                problem = Problem(kind, world_size * LOCAL_BATCH, timesteps)
                dispatches = check_dispatch(
                    problem, top_k, top_k == 3, mixtures, rank, world_size, same_experts
                )
                num_rows += [sum(dispatch.recv_splits) for dispatch in dispatches]
        is_starved = torch.tensor([0.0 in num_rows]).float()
        torch.distributed.all_reduce(is_starved)
        assert is_starved > 0, "the premise: some rank receives nothing in some block"


@pytest.mark.processes
@pytest.mark.parametrize("world_size", [2, 4])
def test_experts_shared_out_over_ranks_equal_one_process(world_size):
    run_ranks(check_all_dispatches, world_size)


def fail_on_rank_one(rank, world_size):
    assert world_size == 2
    if rank == 1:
        raise ValueError(f"rank {rank} of process {os.getpid()} gives up")


@pytest.mark.processes
def test_the_error_of_a_rank_is_raised_by_the_test():
    with pytest.raises(AssertionError, match="rank1 failed[^$]*ValueError: rank 1 of process"):
        run_ranks(fail_on_rank_one, 2)
