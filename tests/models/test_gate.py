import pytest
import torch

from models.gate import ExpertProduct, TimestepGate, build_plan
from tests.support import reference, reference_routing


def random_table(depth=3, num_timesteps=20, num_experts=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(depth, num_timesteps, num_experts, generator=generator) * 2
    return logits.softmax(-1)


def random_timesteps(count, num_timesteps=20, seed=0):
    return torch.randint(num_timesteps, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_is_a_float32_softmax_of_one_linear_layer_per_block(dtype):
    torch.manual_seed(0)
    gate = TimestepGate(3, 16, 4).to(dtype)
    t_emb = torch.randn(20, 16)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        table = gate(t_emb)

    assert table.dtype == torch.float32 and table.shape == (3, 20, 4)
    for block in range(3):
        logits = torch.nn.functional.silu(t_emb) @ gate.weight[block].float().T
        torch.testing.assert_close(table[block], (logits + gate.bias[block].float()).softmax(-1))


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_the_plan_keeps_the_largest_gate_values_unchanged(top_k):
    table, t = random_table(), random_timesteps(7)

    plan = build_plan(table, t, top_k)

    assert plan.expert_index.shape == (3, 7, top_k) and plan.dispatch == []
    for block in range(3):
        for n in range(7):
            chosen = dict(reference.top_k_experts(table[block, t[n]], top_k))
            weights = plan.expert_weight[block, n]
            assert set(plan.expert_index[block, n].tolist()) == set(chosen)
            assert all(weights[e] == chosen.get(e, 0.0) for e in range(8))


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_renormalised_gate_values_sum_to_one(top_k):
    table, t = random_table().requires_grad_(), random_timesteps(7)

    plain = build_plan(table, t, top_k)
    plan = build_plan(table, t, top_k, renormalize=True)

    assert torch.equal(plan.expert_index, plain.expert_index)
    total = plain.expert_weight.sum(-1, keepdim=True)
    torch.testing.assert_close(plan.expert_weight, plain.expert_weight / total)
    gradient = torch.autograd.grad(plan.expert_weight.sum(), table)[0]
    torch.testing.assert_close(gradient, torch.zeros_like(table), atol=1e-6, rtol=0)


def test_gradients_reach_the_chosen_gate_values_only():
    table, t = random_table().requires_grad_(), random_timesteps(7)

    plan = build_plan(table, t, 2)
    plan.expert_weight.sum().backward()

    expected = torch.zeros_like(table)
    for block in range(3):
        for n in range(7):
            expected[block, t[n], plan.expert_index[block, n]] += 1.0
    assert torch.equal(table.grad, expected)


def test_routing_depends_on_the_timestep_alone():
    plan = build_plan(random_table(), torch.tensor([4, 9, 4]), 2)

    assert torch.equal(plan.expert_weight[:, 0], plan.expert_weight[:, 2])


def test_a_plan_splits_into_one_plan_per_block():
    plan = build_plan(random_table(), random_timesteps(5), 2)

    blocks = plan.blocks()

    assert len(blocks) == 3 and all(block.dispatch is None for block in blocks)
    assert torch.equal(torch.stack([block.expert_weight for block in blocks]), plan.expert_weight)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("timesteps", ["random", "all equal"])
def test_dispatch_equals_the_loop(num_ranks, top_k, timesteps):
    table = random_table()
    group_t = random_timesteps(num_ranks * 5)
    if timesteps == "all equal":
        group_t[:] = 3

    for rank in range(num_ranks):
        own_t = group_t[rank * 5 : rank * 5 + 5]
        plan = build_plan(table, own_t, top_k, group_t, rank, num_ranks)

        alone = build_plan(table, own_t, top_k)
        assert torch.equal(plan.expert_index, alone.expert_index)
        assert torch.equal(plan.expert_weight, build_plan(table, group_t, top_k).expert_weight)
        group_index = build_plan(table, group_t, top_k).expert_index
        for block, dispatch in enumerate(plan.dispatch):
            expected = reference.dispatch(group_index[block], 8, rank, num_ranks)
            send_rows, send_splits, recv_rows, recv_splits = dispatch
            found = send_rows.tolist(), send_splits, recv_rows.tolist(), recv_splits
            assert found == expected


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("top_k", [1, 3, 8])
@pytest.mark.parametrize("timesteps", ["random", "all equal"])
@pytest.mark.parametrize("product", [ExpertProduct.GROUPED, ExpertProduct.LOOP])
def test_samples_are_grouped_by_expert_as_in_the_loop(num_ranks, top_k, timesteps, product):
    table, group_t = random_table(), random_timesteps(num_ranks * 5)
    if timesteps == "all equal":
        group_t[:] = 3
    group_index = build_plan(table, group_t, top_k).expert_index

    for rank in range(num_ranks):
        own_t = group_t[rank * 5 : rank * 5 + 5]
        group = (group_t, rank, num_ranks)
        blocks = build_plan(table, own_t, top_k, *group, product=product).blocks()

        held = range(rank * 8 // num_ranks, (rank + 1) * 8 // num_ranks)
        for index, (_, dispatch, rows) in zip(group_index, blocks, strict=True):
            received = dispatch.recv_rows.tolist() if dispatch else range(5)
            expected = reference_routing.expert_rows(index, held, received)
            assert (rows.samples.tolist(), rows.experts.tolist(), rows.ends.tolist()) == expected
            counts = rows.experts.bincount(minlength=len(held))
            assert rows.counts is None or torch.equal(rows.counts, counts)
            assert (rows.counts is None) == (product is ExpertProduct.GROUPED)


def test_unequal_batches_in_a_group_are_refused():
    with pytest.raises(AssertionError, match="equal batches"):
        build_plan(random_table(), random_timesteps(3), 2, random_timesteps(7), 0, 2)
