"""Balance, dead experts and traffic against counts by hand; on ranks, against what was sent."""

import math

import pytest
import torch

from models.diffusion import LossTerms
from models.gate import Dispatch, RoutingPlan
from models.network_options import NetworkOptions
from models.switch_dit import SwitchDiT
from tests.support.ranks import run_ranks
from training.monitoring.expert_load import (
    DEAD_INTERVALS,
    ExchangeShape,
    GateDrift,
    LoadHistory,
    add_exchanges,
    entropy_by_timestep,
    exchange_metrics,
    exchange_shape,
    load_metrics,
)
from training.monitoring.interval_sums import MetricSums


def test_even_loads_have_entropy_one_and_max_over_mean_one():
    metrics = load_metrics(torch.full((2, 4), 6.0), num_samples=12)

    assert metrics["moe/load_entropy"] == pytest.approx(1.0)
    assert metrics["moe/load_max_over_mean"] == pytest.approx(1.0)
    assert metrics["moe/idle_experts"] == metrics["moe/starved_experts"] == 0
    assert metrics["moe_load/block_01/expert_3"] == pytest.approx(0.5)


def test_one_busy_expert_has_entropy_zero_and_leaves_the_others_idle():
    metrics = load_metrics(torch.tensor([[10.0, 0.0, 0.0, 0.0]]), num_samples=10)

    assert metrics["moe/load_entropy"] == pytest.approx(0.0)
    assert metrics["moe/load_max_over_mean"] == pytest.approx(4.0)
    assert metrics["moe/idle_experts"] == metrics["moe/starved_experts"] == 3


def test_an_expert_starves_below_a_tenth_of_the_even_share():
    counts = torch.tensor([[487.0, 488.0, 25.0, 0.0], [486.0, 488.0, 26.0, 0.0]])

    assert load_metrics(counts[:1], num_samples=1000)["moe/starved_experts"] == 1
    assert load_metrics(24 * counts / 25, num_samples=960)["moe/starved_experts"] == 2
    counts[0] = torch.tensor([488.0, 488.0, 24.0, 0.0])
    assert load_metrics(counts, num_samples=1000)["moe/starved_experts"] == 3


def test_entropy_of_a_skewed_block():
    metrics = load_metrics(torch.tensor([[3.0, 1.0]]), num_samples=4)

    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert metrics["moe_entropy/block_00"] == pytest.approx(expected)


def test_a_single_expert_is_even_by_definition():
    assert load_metrics(torch.tensor([[4.0]]), num_samples=4)["moe/load_entropy"] == 1.0


def test_entropy_by_timestep_is_the_mean_over_blocks_within_a_range():
    counts = torch.zeros(2, 2, 3)
    counts[0, :, 0] = torch.tensor([4.0, 4.0])
    counts[1, :, 0] = torch.tensor([8.0, 0.0])
    counts[:, 1, 2] = 5.0

    assert entropy_by_timestep(counts, ["low", "mid", "high"]) == {
        "moe_entropy_by_timestep/low": pytest.approx(0.5),
        "moe_entropy_by_timestep/high": pytest.approx(0.0),
    }


def counts_of(*load):
    """One block's samples per expert, all in the first of two ranges of timesteps."""
    counts = torch.zeros(1, len(load), 2, dtype=torch.float64)
    counts[0, :, 0] = torch.tensor(load)
    return counts


def test_an_expert_is_dead_after_ten_intervals_and_named_once():
    history = LoadHistory(1, 3)
    history.add(1, counts_of(1, 1, 0))

    numbers, names = zip(*(history.add(i, counts_of(4, 0, 0)) for i in range(2, 13)), strict=True)

    dead = [metrics["moe/dead_experts"] for metrics in numbers]
    assert dead == [0.0] * (DEAD_INTERVALS - 2) + [1.0, 2.0, 2.0]
    assert names[8:] == ("block 0: 2", "block 0: 1", "") and not any(names[:8])
    assert all(metrics["moe/never_used_experts"] == 1.0 for metrics in numbers)
    revived, _ = history.add(13, counts_of(4, 0, 1))
    assert (revived["moe/never_used_experts"], revived["moe/dead_experts"]) == (0.0, 1.0)


def test_a_continued_run_remembers_its_experts_from_the_records():
    intervals = [counts_of(3, 1, 0)] + [counts_of(4, 0, 0)] * 9
    uninterrupted, records = LoadHistory(1, 3), [{"step": 0}]  # a step left out has no loads
    for step, counts in enumerate(intervals, 1):
        metrics = uninterrupted.add(step, counts)[0] | load_metrics(counts.sum(2), 4.0)
        records.append({"step": step} | metrics)
    uninterrupted.add(11, None)

    continued = LoadHistory(1, 3, records)

    expected = uninterrupted.add(12, counts_of(4, 0, 0))
    assert continued.add(12, counts_of(4, 0, 0)) == expected
    (steps, loads), (old_steps, old_loads) = continued.over_time(), uninterrupted.over_time()
    assert steps == old_steps == [*range(1, 11), 12]
    share = loads / loads.sum(dim=2, keepdim=True)
    assert torch.equal(share, old_loads / old_loads.sum(dim=2, keepdim=True))
    assert expected[0]["moe/dead_experts"] == 2.0 and expected[1] == "block 0: 1"


def test_the_counts_of_a_picture_begin_after_the_last_one():
    history = LoadHistory(1, 2)
    for step, counts in enumerate((counts_of(1, 2), counts_of(3, 4))):
        history.add(step, counts)

    assert torch.equal(history.take_counts(), counts_of(4, 6))
    assert history.take_counts() is None


def test_the_drift_of_gates_is_their_total_variation_distance():
    gates = torch.tensor([[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]])
    drift = GateDrift()

    assert drift.add(gates) is None
    assert drift.add(gates) == 0.0
    gates[0, 0] = torch.tensor([0.0, 0.0, 1.0])  # the caller's table may change in place
    assert drift.add(gates) == 0.5
    assert drift.add(torch.tensor([[[0.0, 0.0, 1.0], [0.5, 0.25, 0.25]]])) == 0.125


def test_traffic_of_two_steps_by_hand():
    shape = ExchangeShape(group_rank=1, group_size=2, row_bytes=1024, num_passes=3)
    sums = torch.zeros(2 * shape.group_size + 2)
    nothing = torch.zeros(0, dtype=torch.int64)
    for splits in ([[3, 1], [0, 4]], [[2, 2], [1, 4]]):
        dispatch = [Dispatch(nothing, split, nothing, [9, 9]) for split in splits]
        plan = RoutingPlan(torch.empty(0), torch.empty(0), dispatch)
        add_exchanges(sums, plan, 4, shape)

    # The other rank sends as much: what is summed over both is twice this.
    metrics = exchange_metrics(2 * sums, shape, num_steps=2, world_size=2)

    leaving = 3 + 0 + 2 + 1
    assert metrics["comm/mib_sent_per_step"] == pytest.approx(2 * leaving * 1024 * 3 / 2 / 2**20)
    assert metrics["comm/copies_per_sample"] == pytest.approx(2 * leaving / 16 / 2)
    blocks = [5 / 4, 8 / 4.5]
    assert metrics["comm/rank_load_max_over_mean"] == pytest.approx(sum(blocks) / 2)
    assert metrics["comm/rank_load_max_over_mean_worst_block"] == pytest.approx(max(blocks))


SIZES = {"input_size": (4, 4), "patch_size": 2, "in_channels": 2, "hidden_size": 8}
SIZES |= {"num_heads": 2, "num_classes": 3, "num_experts": 4, "top_k": 2, "num_timesteps": 20}
SIZES |= {"learned_variance": False}
BATCH, DEPTH, NUM_MICRO_STEPS = 6, 3, 2


def build(group_size, **options):
    """A model with random weights, its mixtures ready to communicate."""
    torch.manual_seed(0)
    sizes = SIZES | {"depth": DEPTH} | options
    model = SwitchDiT(NetworkOptions(expert_parallel_size=group_size, **sizes))
    for module in model.modules():
        if hasattr(module, "set_deepspeed_parallelism"):
            module.set_deepspeed_parallelism()
    for name, parameter in model.named_parameters():
        if "mixture" not in name:  # gates alike on all ranks
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def run_step(model, t, group_t, sums, autocast=False):
    """One micro-step, with its metrics."""
    N = len(t)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(torch.ones(N, 2, 4, 4), t, torch.zeros(N, dtype=torch.int64), group_t)
    output.prediction.float().square().mean().backward()
    zeros = LossTerms(*torch.zeros(4))
    sums.add(0, zeros, torch.zeros(N), t, output.plan, 0.0, NUM_MICRO_STEPS)


def sums_for(model, rank, group_size, precision):
    shape = exchange_shape(model, rank, group_size, precision)
    return MetricSums(DEPTH, 4, 20, torch.device("cpu"), shape)


class SentBytes:
    """Counts what leaves this rank through deepspeed.comm.all_to_all_single."""

    def __init__(self, rank):
        import deepspeed.comm

        self.total, exchange = 0, deepspeed.comm.all_to_all_single

        def counting(output, rows, output_splits, input_splits, group=None):
            row_bytes = rows[:1].numel() * rows.element_size() if len(rows) else 0
            self.total += row_bytes * (sum(input_splits) - input_splits[rank])
            return exchange(output, rows, output_splits, input_splits, group=group)

        deepspeed.comm.all_to_all_single = counting


def check_metrics_on_ranks(rank, world_size):
    sent = SentBytes(rank)
    generator = torch.Generator().manual_seed(1)
    t = torch.randint(20, (NUM_MICRO_STEPS, world_size * BATCH), generator=generator)
    alone = build(1)
    sums_alone = sums_for(alone, rank, 1, "fp32")
    for group_t in t:
        run_step(alone, group_t, None, sums_alone)
    torch.distributed.barrier()
    # Every rank ran the whole batch, so the counts are the world's times its size.
    expected = sums_alone.reduce()

    for precision, recomputes in (("fp32", False), ("fp32", True), ("autocast", True)):
        model = build(world_size, activation_checkpointing=recomputes)
        sums, before = sums_for(model, rank, world_size, precision), sent.total
        for group_t in t:
            own = group_t[rank * BATCH : (rank + 1) * BATCH]
            run_step(model, own, group_t, sums, precision == "autocast")
        interval = sums.reduce()

        assert torch.equal(interval.expert_count * world_size, expected.expert_count)
        moe = {k: v for k, v in expected.metrics.items() if k.startswith("moe")}
        assert {k: interval.metrics[k] for k in moe} == pytest.approx(moe)
        total = torch.tensor([sent.total - before], dtype=torch.float64)
        torch.distributed.all_reduce(total)
        assert total > 0
        per_step = interval.metrics["comm/mib_sent_per_step"]
        assert per_step * 2**20 == pytest.approx(float(total) / world_size), precision


@pytest.mark.processes
def test_loads_equal_one_process_and_bytes_are_those_that_were_sent():
    run_ranks(check_metrics_on_ranks, 2)
