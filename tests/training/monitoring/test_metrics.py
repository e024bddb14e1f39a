"""Metrics of an interval: means over samples, expert loads, buckets, all by hand."""

import pytest
import torch

from models.diffusion import LossTerms
from models.gate import RoutingPlan
from training.monitoring.interval_sums import MetricSums

CPU = torch.device("cpu")


def plan(expert_index):
    return RoutingPlan(torch.empty(0), torch.tensor(expert_index), [])


def terms(value):
    return LossTerms(*(torch.tensor(value) for _ in range(4)))


def test_losses_are_means_over_samples_not_over_micro_steps(single_process_group):
    sums = MetricSums(depth=1, num_experts=2, num_timesteps=100, device=CPU)
    one, three = torch.tensor([5]), torch.tensor([5, 5, 95])

    sums.add(0, terms(8.0), torch.tensor([8.0]), one, plan([[[0]]]), wait_sec=0.0)
    sums.add(1, terms(4.0), torch.tensor([2.0, 4.0, 6.0]), three, plan([[[0], [1], [1]]]), 0.0)
    metrics = sums.reduce().metrics

    assert metrics["loss/total"] == pytest.approx((8.0 + 3 * 4.0) / 4)
    assert metrics["mse_by_timestep/000-009"] == pytest.approx((8.0 + 2.0 + 4.0) / 3)
    assert metrics["mse_by_timestep/090-099"] == pytest.approx(6.0)
    assert "mse_by_timestep/010-019" not in metrics
    assert metrics["moe_load/block_00/expert_0"] == pytest.approx(0.5)


def test_an_interval_starts_empty(single_process_group):
    sums = MetricSums(depth=1, num_experts=2, num_timesteps=100, device=CPU)
    t = torch.tensor([5])
    sums.add(0, terms(100.0), torch.tensor([100.0]), t, plan([[[0]]]), 0.0)
    sums.reduce()

    sums.add(0, terms(1.0), torch.tensor([1.0]), t, plan([[[1]]]), 0.0)
    metrics = sums.reduce().metrics

    assert metrics["loss/total"] == pytest.approx(1.0)
    assert metrics["moe_load/block_00/expert_0"] == 0.0


def test_samples_are_counted_by_block_expert_and_range_of_timesteps(single_process_group):
    sums = MetricSums(depth=2, num_experts=3, num_timesteps=100, device=CPU)
    generator = torch.Generator().manual_seed(0)
    expected = torch.zeros(2, 3, 10, dtype=torch.float64)
    for micro_step in range(3):
        t = torch.randint(100, (4,), generator=generator)
        chosen = torch.rand(2, 4, 3, generator=generator).argsort(-1)[..., :2]
        is_left_out = micro_step == 1
        loss = float("nan") if is_left_out else 1.0
        sums.add(0, terms(loss), torch.full((4,), loss), t, plan(chosen.tolist()), 0.0, 3)
        for block in range(2):
            for i in range(4):
                for expert in chosen[block, i]:
                    expected[block, expert, t[i] // 10] += not is_left_out

    interval = sums.reduce()

    assert torch.equal(interval.expert_count, expected)
    loads = [interval.metrics[f"moe_load/block_01/expert_{e}"] for e in range(3)]
    assert loads == pytest.approx((expected[1].sum(-1) / 8).tolist())
    by_range = {k for k in interval.metrics if k.startswith("moe_entropy_by_timestep/")}
    seen = [b for b in range(10) if expected[..., b].any()]
    assert by_range == {f"moe_entropy_by_timestep/{10 * b:03d}-{10 * b + 9:03d}" for b in seen}


def test_an_interval_without_a_finite_step_has_no_loads(single_process_group):
    sums = MetricSums(depth=1, num_experts=2, num_timesteps=100, device=CPU)
    nan, t = float("nan"), torch.tensor([5])
    sums.add(0, terms(nan), torch.tensor([nan]), t, plan([[[0]]]), 0.0)

    interval = sums.reduce()

    assert interval.expert_count is None
    assert not any(name.startswith("moe") for name in interval.metrics)
