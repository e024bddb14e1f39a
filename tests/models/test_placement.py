"""Where experts sit and which rank trains which timestep: invariants, and brute force."""

import itertools

import numpy as np
import pytest
import torch

from benchmarks.placement import copies_per_sample
from models.dealing import deal, served_at_home
from models.gate import ExpertProduct, build_plan
from models.placement import (
    MAX_PARTITIONS,
    PLACEMENTS,
    contiguous_slots,
    num_partitions,
    place,
    rank_loads,
    rank_of_expert,
    reached_ranks,
)
from models.prior import diffusion_prior
from tests.support import reference, reference_routing

TIMESTEPS = 50


def chosen_at_random(depth, num_experts, top_k, seed):
    """Skewed random choices, alike at neighbouring timesteps, (L, S, E)."""
    generator = np.random.default_rng(seed)
    height = generator.normal(size=(depth, 1, num_experts))
    walk = generator.normal(size=(depth, TIMESTEPS, num_experts)).cumsum(1)
    order = np.argsort(-(2 * height + 0.3 * walk), axis=-1)
    chosen = np.zeros(order.shape, bool)
    np.put_along_axis(chosen, order[..., :top_k], True, axis=-1)
    return chosen


def weights_at_random(seed):
    return np.random.default_rng(seed).integers(0, 9, TIMESTEPS)


def load_and_traffic(rank_of, chosen, weight, num_ranks):
    """Of one block, by a loop over timesteps."""
    load, traffic = [0] * num_ranks, 0
    for uses, times in zip(chosen, weight.tolist(), strict=True):
        ranks = [rank_of[expert] for expert in np.flatnonzero(uses)]
        for rank in ranks:
            load[rank] += times
        traffic += times * len(set(ranks))
    return max(load), traffic


def brute_force(chosen, weight, num_ranks):
    """The least (worst load, traffic) over all assignments of one block's experts to ranks."""
    num_experts = chosen.shape[1]
    share = num_experts // num_ranks
    return min(
        load_and_traffic(rank_of, chosen, weight, num_ranks)
        for rank_of in itertools.product(range(num_ranks), repeat=num_experts)
        if all(rank_of.count(rank) == share for rank in range(num_ranks))
    )


@pytest.mark.parametrize("kind", PLACEMENTS)
@pytest.mark.parametrize(("num_experts", "num_ranks"), [(6, 1), (4, 4), (8, 2), (24, 4), (64, 8)])
def test_every_slot_holds_one_expert(kind, num_experts, num_ranks):
    chosen = chosen_at_random(3, num_experts, 2, seed=0)

    slots = place(kind, chosen, weights_at_random(0), num_ranks)

    assert slots.shape == (3, num_experts) and slots.dtype == np.int64
    assert all(sorted(of_block) == list(range(num_experts)) for of_block in slots.tolist())
    again = place(kind, chosen.copy(), weights_at_random(0), num_ranks)
    assert np.array_equal(slots, again)


def test_contiguous_and_strided_are_what_they_say():
    chosen, weight = chosen_at_random(2, 6, 2, seed=0), weights_at_random(0)

    contiguous, strided = (place(kind, chosen, weight, 3) for kind in ("contiguous", "strided"))

    assert np.array_equal(contiguous, contiguous_slots(2, 6))
    assert rank_of_expert(contiguous, 3).tolist() == [[0, 0, 1, 1, 2, 2]] * 2
    assert rank_of_expert(strided, 3).tolist() == [[0, 1, 2, 0, 1, 2]] * 2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize(("num_experts", "num_ranks"), [(4, 2), (6, 2), (6, 3), (8, 2)])
def test_balanced_has_the_least_worst_load_and_then_the_least_traffic(
    num_experts, num_ranks, top_k, seed
):
    chosen, weight = chosen_at_random(2, num_experts, top_k, seed), weights_at_random(seed)
    expected = [brute_force(of_block, weight, num_ranks) for of_block in chosen]

    exact = rank_of_expert(place("balanced", chosen, weight, num_ranks), num_ranks)
    searched = place("balanced", chosen, weight, num_ranks, exact=False)
    searched = rank_of_expert(searched, num_ranks)

    for block in range(2):
        of_block = chosen[block], weight, num_ranks
        assert load_and_traffic(exact[block].tolist(), *of_block) == expected[block]
        found = load_and_traffic(searched[block].tolist(), *of_block)
        assert expected[block] <= found
        assert found[0] <= 1.15 * expected[block][0] and found[1] <= 1.25 * expected[block][1]


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(4, 2), (8, 2), (8, 4), (16, 8), (64, 8)])
def test_balanced_is_never_worse_than_the_fixed_placements(num_experts, num_ranks):
    assert (num_partitions(num_experts, num_ranks) > MAX_PARTITIONS) == (num_experts >= 16), (
        "both ways"
    )
    for seed in range(3):
        chosen, weight = chosen_at_random(2, num_experts, 2, seed), weights_at_random(seed)
        worst = {
            kind: rank_loads(chosen, weight, place(kind, chosen, weight, num_ranks), num_ranks)
            for kind in PLACEMENTS
        }
        for kind in PLACEMENTS:
            assert worst[kind].sum() == 2 * 2 * weight.sum(), "samples x experts of both blocks"
            assert (worst["balanced"].max(1) <= worst[kind].max(1)).all()


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("product", list(ExpertProduct))
def test_a_plan_finds_experts_in_their_slots(num_ranks, product):
    """As if the experts were numbered by their slots; gate values and metrics keep their own."""
    depth, num_experts, top_k, N = 3, 8, 3, 5
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(depth, TIMESTEPS, num_experts, generator=generator)
    table, group_t = logits.softmax(-1), torch.randint(TIMESTEPS, (num_ranks * N,))
    slots = torch.stack([torch.randperm(num_experts, generator=generator) for _ in range(depth)])
    group = build_plan(table, group_t, top_k)

    for rank in range(num_ranks):
        own = slice(rank * N, (rank + 1) * N)
        plan = build_plan(
            table,
            group_t[own],
            top_k,
            group_t,
            rank,
            num_ranks,
            slot_of_expert=slots,
            product=product,
        )

        assert torch.equal(plan.expert_index, group.expert_index[:, own])
        for block, (weight, dispatch, rows) in enumerate(plan.blocks()):
            for expert, slot in enumerate(slots[block].tolist()):
                assert torch.equal(weight[:, slot], group.expert_weight[block, :, expert])
            by_slot = slots[block][group.expert_index[block]]
            expected = reference.dispatch(by_slot, num_experts, rank, num_ranks)
            send_rows, send_splits, recv_rows, recv_splits = dispatch
            found = send_rows.tolist(), send_splits, recv_rows.tolist(), recv_splits
            assert found == expected
            if product is not ExpertProduct.MERGED:
                held = range(rank * num_experts // num_ranks, (rank + 1) * num_experts // num_ranks)
                expected = reference_routing.expert_rows(by_slot, held, recv_rows.tolist())
                assert (
                    rows.samples.tolist(),
                    rows.experts.tolist(),
                    rows.ends.tolist(),
                ) == expected


# Dealing


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_benchmark_counts_the_copies_that_a_plan_sends(num_ranks):
    N, generator = 5, np.random.default_rng(0)
    chosen = chosen_at_random(3, 8, 2, seed=0)
    slots = place("strided", chosen, weights_at_random(0), num_ranks)
    group_t = generator.integers(0, TIMESTEPS, N * num_ranks)

    found = copies_per_sample(chosen, slots, group_t, num_ranks)

    assert found * 3 * len(group_t) == pytest.approx(copies(chosen, slots, group_t, num_ranks))
    sent, t = 0, torch.from_numpy(group_t)
    for rank in range(num_ranks):
        group = (t[rank * N : (rank + 1) * N], 2, t, rank, num_ranks)
        gates, slot_of_expert = torch.from_numpy(chosen).float(), torch.from_numpy(slots)
        for dispatch in build_plan(gates, *group, slot_of_expert=slot_of_expert).dispatch:
            sent += sum(dispatch.send_splits) - dispatch.send_splits[rank]
    assert sent == copies(chosen, slots, group_t, num_ranks)


def home_table(chosen, slots, num_ranks):
    top_k = chosen[0, 0].sum()
    args = (torch.from_numpy(chosen).float(), int(top_k), torch.from_numpy(slots), num_ranks)
    return served_at_home(*args).numpy()


def copies(chosen, slots, group_t, num_ranks):
    """Copies that travel, by a loop over samples and blocks."""
    ranks, N, count = rank_of_expert(slots, num_ranks), len(group_t) // num_ranks, 0
    for i, t in enumerate(group_t.tolist()):
        for block in range(len(chosen)):
            serving = set(ranks[block][chosen[block, t]].tolist())
            count += len(serving - {i // N})
    return count


@pytest.mark.parametrize("kind", PLACEMENTS)
@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_dealing_exchanges_timesteps_so_that_no_more_copies_travel(kind, top_k, num_ranks):
    for seed in range(3):
        chosen = chosen_at_random(3, 8, top_k, seed)
        slots = place(kind, chosen, np.ones(TIMESTEPS, np.int64), num_ranks)
        group_t = np.random.default_rng(seed).integers(0, TIMESTEPS, 6 * num_ranks)
        at_home = home_table(chosen, slots, num_ranks)

        dealt = deal(group_t, at_home)

        assert sorted(dealt.tolist()) == sorted(group_t.tolist()) and len(dealt) == len(group_t)
        assert np.array_equal(deal(group_t.copy(), at_home.copy()), dealt)
        before = copies(chosen, slots, group_t, num_ranks)
        after = copies(chosen, slots, dealt, num_ranks)
        assert after <= before
        saved = at_home[dealt].reshape(num_ranks, 6, num_ranks).diagonal(0, 0, 2).sum()
        total = reached_ranks(chosen, slots, num_ranks).sum(-1)[:, group_t].sum()
        assert after == total - saved


def test_dealing_finds_the_fewest_copies_of_all_ways_to_deal():
    for seed in range(5):
        chosen = chosen_at_random(2, 4, 2, seed)
        slots, group_t = contiguous_slots(2, 4), np.random.default_rng(seed).integers(0, 50, 6)

        dealt = deal(group_t, home_table(chosen, slots, 2))

        least = min(
            copies(chosen, slots, np.array(order), 2) for order in itertools.permutations(group_t)
        )
        assert copies(chosen, slots, dealt, 2) == least


def test_dealing_saves_a_third_of_the_copies_of_the_priors_routing():
    depth, num_experts, num_ranks = 12, 8, 4
    prior = diffusion_prior(1000, depth, num_experts, 2).bool().numpy()
    chosen = prior.reshape(1000, num_experts, depth).transpose(2, 0, 1)  # unit e * L + l
    slots = contiguous_slots(depth, num_experts)
    group_t = np.random.default_rng(0).integers(0, 1000, 32 * num_ranks)

    dealt = deal(group_t, home_table(chosen, slots, num_ranks))

    assert (chosen.sum(-1) == 2).all(), "the premise: two experts for every timestep"
    before, after = (copies(chosen, slots, t, num_ranks) for t in (group_t, dealt))
    assert after < 0.67 * before
