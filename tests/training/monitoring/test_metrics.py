"""Metrics of an interval: means over samples, expert loads, buckets, all by hand."""

from types import SimpleNamespace

import pytest
import torch

from models.diffusion import LossTerms
from models.gate import RoutingPlan
from tests.support.ranks import run_ranks
from training.loop import read_step
from training.monitoring import interval_sums
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


class Clock:
    """A clock that runs only when something takes time."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


class SlowStream:
    """Batches that a rank waits for."""

    def __init__(self, clock, sec):
        self.clock, self.sec, self.wait_sec = clock, sec, 7.0

    def __next__(self):
        self.clock.now += self.sec
        self.wait_sec += self.sec


def train_slowly(clock, stream, sums, compute_sec):
    """Two steps of two micro-steps, as the loop reads and counts them."""
    training = SimpleNamespace(
        stream=stream,
        engine=SimpleNamespace(gradient_accumulation_steps=lambda: 2),
        heartbeat=SimpleNamespace(enter=lambda *_: None),
    )
    sums.restart_clock()
    for step in range(2):
        for _, wait_sec in read_step(training, step).batches:
            clock.now += compute_sec
            sums.add(step, terms(1.0), torch.ones(3), torch.tensor([5, 5, 5]), None, wait_sec, 2)
    return sums.reduce().metrics


def test_waiting_for_data_is_its_share_of_the_interval(single_process_group, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(interval_sums, "time", clock)
    sums, stream = MetricSums(1, 0, 100, CPU), SlowStream(clock, 1.5)
    clock.now += 50.0  # before the first step

    metrics = train_slowly(clock, stream, sums, compute_sec=4.5)

    assert metrics["speed/data_wait_pct"] == pytest.approx(25.0)
    assert metrics["speed/samples_per_sec"] == pytest.approx(12 / 24.0)
    stream.sec = 0.0
    assert train_slowly(clock, stream, sums, compute_sec=1.0)["speed/data_wait_pct"] == 0.0


def check_waiting_of_one_rank(rank, world_size):
    clock = Clock()
    interval_sums.time = clock
    wait_sec = (2.0, 0.0)[rank]

    metrics = train_slowly(
        clock, SlowStream(clock, wait_sec), MetricSums(1, 0, 100, CPU), 4.0 - wait_sec
    )

    assert metrics["speed/data_wait_pct"] == pytest.approx(25.0), "half of the time of one of two"
    assert metrics["speed/samples_per_sec"] == pytest.approx(24 / 16.0)


@pytest.mark.processes
def test_waiting_is_the_mean_over_ranks():
    run_ranks(check_waiting_of_one_rank, 2)
