import os

import pytest
import torch

from models.gate import BlockPlan, build_plan
from models.moe import Mixture, StackedExperts, make_mixture
from tests import reference
from tests.ranks import run_ranks


def random_experts(hidden_size=6, num_experts=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    experts = StackedExperts(hidden_size, num_experts).double()
    for parameter in experts.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return experts


def random_batch(num_samples=4, num_tokens=3, hidden_size=6, num_experts=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_samples, num_tokens, hidden_size, generator=generator).double()
    probs = torch.randn(num_samples, num_experts, generator=generator).double().softmax(-1)
    return x, probs


def only_top_k(probs, top_k):
    values, index = probs.topk(top_k, dim=-1)
    return torch.zeros_like(probs).scatter(-1, index, values)


def gradients(output, tensors):
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    return torch.autograd.grad((output * target).sum(), tensors)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_merged_experts_equal_the_loop_in_outputs_and_gradients(top_k):
    experts = random_experts()
    x, probs = (tensor.requires_grad_() for tensor in random_batch())

    merged = experts(x, only_top_k(probs, top_k))
    looped = reference.mixture(x, probs, experts.weight, experts.bias, top_k)

    torch.testing.assert_close(merged, looped)
    tensors = [x, probs, experts.weight, experts.bias]
    for found, expected in zip(gradients(merged, tensors), gradients(looped, tensors), strict=True):
        torch.testing.assert_close(found, expected)


def test_merged_experts_are_accurate_in_float32():
    experts, (x, probs) = random_experts(), random_batch()
    exact = reference.mixture(x, probs, experts.weight, experts.bias, 2)

    merged = experts.float()(x.float(), only_top_k(probs, 2).float())

    torch.testing.assert_close(merged.double(), exact, rtol=1e-5, atol=1e-6)


def test_one_expert_equals_a_dense_layer():
    experts, (x, _) = random_experts(num_experts=1), random_batch()

    output = experts(x, torch.ones(4, 1).double())

    dense = torch.nn.functional.linear(x, experts.weight[0].T, experts.bias[0])
    torch.testing.assert_close(output, dense)


def test_an_idle_expert_gets_a_zero_gradient():
    experts, (x, probs) = random_experts(), random_batch()
    weights = probs.clone()
    weights[:, 3] = 0.0

    experts(x, weights).sum().backward()

    assert torch.equal(experts.weight.grad[3], torch.zeros(6, 6).double())
    assert torch.equal(experts.bias.grad[3], torch.zeros(6).double())
    assert experts.weight.grad[[0, 1, 2, 4]].abs().sum((1, 2)).all()


def test_a_rank_without_samples_still_gives_every_expert_a_gradient():
    experts = random_experts()

    output = experts(torch.zeros(0, 3, 6).double(), torch.zeros(0, 5).double())
    output.sum().backward()

    assert output.shape == (0, 3, 6)
    assert torch.equal(experts.weight.grad, torch.zeros(5, 6, 6).double())
    assert torch.equal(experts.bias.grad, torch.zeros(5, 6).double())


def test_a_new_mixture_adds_nothing():
    x, probs = random_batch()
    mixture = make_mixture(6, 5, expert_parallel_size=1).double()

    assert isinstance(mixture, Mixture)
    assert torch.equal(mixture(x, BlockPlan(probs, None)), torch.zeros_like(x))


def test_state_dict_names_experts_one_by_one():
    mixture = Mixture(6, 2)
    mixture.deepspeed_moe.experts.weight.data.normal_()

    state = mixture.state_dict()

    prefix = "deepspeed_moe.experts.deepspeed_experts"
    names = {f"{prefix}.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")}
    assert set(state) == names
    assert torch.equal(state[f"{prefix}.1.weight"], mixture.deepspeed_moe.experts.weight[1])


@pytest.mark.parametrize("is_stacked", [True, False])
def test_both_forms_of_names_are_loaded(is_stacked):
    source, target = Mixture(6, 2), Mixture(6, 2)
    for parameter in source.parameters():
        parameter.data.normal_()
    state = dict(source.named_parameters()) if is_stacked else source.state_dict()

    target.load_state_dict(state)

    for name, parameter in target.named_parameters():
        assert torch.equal(parameter, source.get_parameter(name))


def test_a_missing_expert_is_reported_by_name():
    state = Mixture(6, 2).state_dict()
    del state["deepspeed_moe.experts.deepspeed_experts.1.weight"]

    with pytest.raises(RuntimeError, match=r"deepspeed_moe\.experts\.weight"):
        Mixture(6, 2).load_state_dict(state)


# Expert parallelism: the same network on one process and shared out over ranks, in float64.

DEPTH, NUM_EXPERTS, WIDTH, NUM_TOKENS, NUM_TIMESTEPS, LOCAL_BATCH = 2, 8, 4, 3, 20, 5


class Problem:
    """Gate table, experts and a global batch; equal on all ranks."""

    def __init__(self, num_samples, timesteps):
        generator = torch.Generator().manual_seed(7)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.table = (2 * draw(DEPTH, NUM_TIMESTEPS, NUM_EXPERTS)).softmax(-1).requires_grad_()
        self.weight = 0.3 * draw(DEPTH, NUM_EXPERTS, WIDTH, WIDTH)
        self.bias = 0.3 * draw(DEPTH, NUM_EXPERTS, WIDTH)
        self.x = draw(num_samples, NUM_TOKENS, WIDTH)
        self.target = draw(num_samples, NUM_TOKENS, WIDTH)
        self.t = torch.randint(NUM_TIMESTEPS, (num_samples,), generator=generator)
        if timesteps == "all equal":
            self.t[:] = 3


def next_stream(x, mixed):
    return x * (1 + mixed) + torch.tanh(x)


def single_process(problem, top_k):
    """Output and gradients of the mean loss on one process, by the loops of reference.py."""
    weight, bias = problem.weight.clone(), problem.bias.clone()
    weight.requires_grad_(), bias.requires_grad_()
    x = problem.x
    for block in range(DEPTH):
        probs = problem.table[block, problem.t]
        x = next_stream(x, reference.mixture(x, probs, weight[block], bias[block], top_k))
    loss = (x - problem.target).square().mean()
    return x.detach(), torch.autograd.grad(loss, [problem.table, weight, bias])


def check_dispatch(problem, top_k, mixtures, rank, world_size, groups):
    """Compare this rank's share of outputs and averaged gradients with one process."""
    expected, (table_grad, weight_grad, bias_grad) = single_process(problem, top_k)
    group_rank, group_size = mixtures[0].group_rank_and_size()
    own = slice(rank * LOCAL_BATCH, (rank + 1) * LOCAL_BATCH)
    first = (rank - group_rank) * LOCAL_BATCH
    group_t = problem.t[first : first + group_size * LOCAL_BATCH]
    plan = build_plan(problem.table, problem.t[own], top_k, group_t, group_rank, group_size)
    held = slice(
        group_rank * NUM_EXPERTS // group_size, (group_rank + 1) * NUM_EXPERTS // group_size
    )
    x = problem.x[own].clone().requires_grad_()  # a leaf with gradient, like an embedding's output
    for block, (mixture, block_plan) in enumerate(zip(mixtures, plan.blocks(), strict=True)):
        experts = mixture.deepspeed_moe.experts
        experts.weight.data.copy_(problem.weight[block, held])
        experts.bias.data.copy_(problem.bias[block, held])
        x = next_stream(x, mixture(x, block_plan))
    torch.testing.assert_close(x.detach(), expected[own])

    parameters = [p for m in mixtures for p in m.parameters()]
    loss = (x - problem.target[own]).square().mean()
    found = torch.autograd.grad(loss, [problem.table, *parameters])
    torch.distributed.all_reduce(found[0])
    for gradient in found[1:]:
        torch.distributed.all_reduce(gradient, group=groups)
    torch.testing.assert_close(found[0] / world_size, table_grad)
    for block in range(DEPTH):
        of_weight, of_bias = found[1 + 2 * block], found[2 + 2 * block]
        torch.testing.assert_close(of_weight / world_size, weight_grad[block, held])
        torch.testing.assert_close(of_bias / world_size, bias_grad[block, held])
    return [block.dispatch for block in plan.blocks()]


def check_all_dispatches(rank, world_size):
    from deepspeed.utils import groups

    torch.set_default_dtype(torch.float64)
    for group_size in {2, world_size}:
        mixtures = [make_mixture(WIDTH, NUM_EXPERTS, group_size) for _ in range(DEPTH)]
        for mixture in mixtures:
            mixture.set_deepspeed_parallelism()
        same_experts = groups._get_expert_data_parallel_group(f"ep_size_{group_size}")
        num_rows = []
        for timesteps in ("random", "all equal"):
            for top_k in (1, 3):
                problem = Problem(world_size * LOCAL_BATCH, timesteps)
                dispatches = check_dispatch(
                    problem, top_k, mixtures, rank, world_size, same_experts
                )
                num_rows += [sum(dispatch.recv_splits) for dispatch in dispatches]
        is_starved = torch.tensor([0.0 in num_rows]).float()
        torch.distributed.all_reduce(is_starved)
        assert is_starved > 0, "the premise: some rank receives nothing in some block"


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [2, 4])
def test_experts_shared_out_over_ranks_equal_one_process(world_size):
    run_ranks(check_all_dispatches, world_size)


def fail_on_rank_one(rank, world_size):
    assert world_size == 2
    if rank == 1:
        raise ValueError(f"rank {rank} of process {os.getpid()} gives up")


@pytest.mark.ranks
def test_the_error_of_a_rank_is_raised_by_the_test():
    with pytest.raises(AssertionError, match="rank1 failed[^$]*ValueError: rank 1 of process"):
        run_ranks(fail_on_rank_one, 2)
