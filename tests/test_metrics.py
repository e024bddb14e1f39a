"""Metrics of an interval: means over samples, expert loads, buckets, all by hand."""

import math

import pytest
import torch

from models.diffusion import LossTerms
from models.gate import RoutingPlan
from training.metrics import MetricSums, load_metrics

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


def test_even_loads_have_entropy_one_and_max_over_mean_one():
    metrics = load_metrics(torch.full((2, 4), 6.0), num_samples=12)

    assert metrics["moe/load_entropy"] == pytest.approx(1.0)
    assert metrics["moe/load_max_over_mean"] == pytest.approx(1.0)
    assert metrics["moe/idle_experts"] == 0
    assert metrics["moe_load/block_01/expert_3"] == pytest.approx(0.5)


def test_one_busy_expert_has_entropy_zero_and_leaves_the_others_idle():
    metrics = load_metrics(torch.tensor([[10.0, 0.0, 0.0, 0.0]]), num_samples=10)

    assert metrics["moe/load_entropy"] == pytest.approx(0.0)
    assert metrics["moe/load_max_over_mean"] == pytest.approx(4.0)
    assert metrics["moe/idle_experts"] == 3


def test_entropy_of_a_skewed_block():
    metrics = load_metrics(torch.tensor([[3.0, 1.0]]), num_samples=4)

    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert metrics["moe_entropy/block_00"] == pytest.approx(expected)


def test_a_single_expert_is_even_by_definition():
    assert load_metrics(torch.tensor([[4.0]]), num_samples=4)["moe/load_entropy"] == 1.0
