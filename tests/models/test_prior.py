import math
from itertools import permutations

import numpy as np
import pytest
import torch

from benchmarks.prior_matching import cost_by_differences
from models.prior import diffusion_prior, prior_loss
from models.unit_matching import assign_units, match_units, matching_cost
from tests.support import reference


def random_table(depth=3, num_timesteps=30, num_experts=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drift = torch.linspace(-1, 1, num_timesteps)[None, :, None]
    logits = torch.randn(depth, 1, num_experts, generator=generator) + drift * torch.randn(
        depth, 1, num_experts, generator=generator
    )
    return (2 * logits).softmax(-1)


@pytest.mark.parametrize(
    ("depth", "num_experts", "top_k", "alpha"), [(3, 4, 2, 4.0), (2, 3, 1, 1.0), (5, 3, 3, 2.0)]
)
def test_the_prior_equals_the_loop_and_gives_every_timestep_k_units_per_block(
    depth, num_experts, top_k, alpha
):
    prior = diffusion_prior(100, depth, num_experts, top_k, alpha)

    expected = reference.prior_map(100, depth, num_experts, top_k, alpha)
    assert torch.equal(prior, torch.from_numpy(expected).float())
    assert (prior.sum(1) == depth * top_k).all()


def test_the_window_slides_from_the_first_unit_to_the_last():
    prior = diffusion_prior(1000, 12, 3, 2)

    starts = prior.argmax(1)
    assert starts[0] == 0 and starts[-1] == 12
    assert (starts.diff() >= 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_loss_equals_the_tensor_of_differences_with_the_same_permutations(seed):
    table, prior = random_table(seed=seed), diffusion_prior(30, 3, 4, 2)
    t = torch.tensor([0, 3, 17, 29, 29])
    generator = np.random.default_rng(seed)
    gate_order, prior_order = generator.permutation(12), generator.permutation(12)

    assignment = match_units(table, 2, prior, seed)
    loss = prior_loss(table, prior, t, assignment)

    expected = reference.matched_prior_loss(table, 2, prior, t, gate_order, prior_order)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_the_matching_is_optimal():
    generator = np.random.default_rng(0)
    uses = torch.from_numpy(generator.integers(0, 2, (9, 5)).astype(np.float32))
    prior = torch.from_numpy(generator.integers(0, 2, (9, 5)).astype(np.float32))
    in_order = np.arange(5)

    assignment = assign_units(uses, prior, in_order, in_order)

    def cost(permutation):
        return (uses - prior[:, list(permutation)]).abs().sum()

    assert cost(assignment) == min(cost(p) for p in permutations(range(5)))


def test_a_seed_decides_the_matching_and_ties_are_broken_differently_by_others():
    table, prior = random_table(), diffusion_prior(30, 3, 4, 2)

    matchings = [match_units(table, 2, prior, seed) for seed in range(8)]

    assert torch.equal(matchings[3], match_units(table, 2, prior, 3))
    assert all(torch.equal(m.sort().values, torch.arange(12)) for m in matchings)
    assert len({tuple(m.tolist()) for m in matchings}) > 1


def test_a_gate_that_follows_the_prior_is_found_whatever_the_order_of_its_units():
    prior = diffusion_prior(30, 1, 6, 2)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    table = (prior[:, order] / 2).unsqueeze(0)  # (1, S, 6), rows sum to 1

    assignment = match_units(table, 2, prior, seed=0)

    loss = prior_loss(table, prior, torch.arange(30), assignment)
    assert abs(loss) < 1e-6


def test_the_loss_is_log_two_when_gate_and_prior_are_disjoint():
    prior = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    table = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])

    loss = prior_loss(table, prior, torch.tensor([0, 1]), torch.arange(2))

    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)


def test_the_gradient_pulls_gates_towards_the_prior():
    prior, t = diffusion_prior(30, 3, 4, 2), torch.arange(30)
    logits = random_table().log()
    assignment = match_units(logits.softmax(-1), 2, prior, seed=0)
    losses = []

    for _ in range(100):
        logits.requires_grad_()
        loss = prior_loss(logits.softmax(-1), prior, t, assignment)
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - 20 * gradient).detach()
        losses.append(loss.item())

    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.7 * losses[0]


def test_the_cost_of_a_pair_of_units_counts_the_timesteps_that_only_one_of_them_serves():
    generator = torch.Generator().manual_seed(0)
    uses, prior = (torch.randint(0, 2, (20, 6), generator=generator).float() for _ in range(2))

    cost = matching_cost(uses, prior)

    assert torch.equal(cost, cost_by_differences(uses, prior, num_slices=3))
    for u in range(6):
        for v in range(6):
            assert cost[u, v] == sum(a != b for a, b in zip(uses[:, u], prior[:, v], strict=True))
