"""The registry of metrics: an entry is summed, named, charted, reported and documented."""

import re

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from models.diffusion import LossTerms
from models.gate import Dispatch, RoutingPlan
from tests.support.configs import small
from training import report
from training.monitoring import metrics as registry
from training.monitoring.dashboard import dashboard, evaluation_charts
from training.monitoring.event_files import TENSORBOARD_DIR, Monitor
from training.monitoring.expert_load import ExchangeShape
from training.monitoring.interval_sums import MetricSums
from training.monitoring.metric import Curve, Metric, mean_over_samples
from training.monitoring.metrics_table import TABLE, metrics_table
from training.reports.run_data import load_runs
from training.run.directory import CONFIG_FILE

CPU = torch.device("cpu")
PLAN = RoutingPlan(
    torch.empty(0), torch.zeros(1, 4, 1, dtype=torch.int64), [Dispatch(None, [3, 1], None, [2, 2])]
)
SHAPE = ExchangeShape(group_rank=0, group_size=2, row_bytes=4, num_passes=2)


def interval(errors, exchange=None):
    """The interval of two equal steps of four samples."""
    sums = MetricSums(1, 2, 100, CPU, exchange)
    for step in range(2):
        terms = LossTerms(*(torch.tensor(2.0) for _ in range(4)))
        sums.add(step, terms, torch.tensor(errors), torch.tensor([5, 5, 50, 95]), PLAN, 0.0)
    return sums.reduce()


def enter(metric, group, monkeypatch):
    """Add an entry to the registry."""
    monkeypatch.setattr(group, "metrics", (*group.metrics, metric))
    monkeypatch.setattr(registry, "METRICS", (*registry.METRICS, metric))


def test_one_entry_is_summed_named_charted_reported_and_documented(
    single_process_group, monkeypatch, tmp_path
):
    entry = Metric(
        "loss/square",
        "mean of the squared error's square",
        "a new chart",
        mean_over_samples(lambda micro: micro.mse.square().sum()),
        Curve("A new curve", "Look here."),
    )
    lengths = []

    def all_reduce(tensor, reduce=torch.distributed.all_reduce):
        lengths.append(len(tensor))
        reduce(tensor)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    interval([1.0, 2.0, 3.0, 4.0])
    enter(entry, registry.LEARNING, monkeypatch)
    found = interval([1.0, 2.0, 3.0, 4.0]).metrics

    assert lengths[1] - lengths[0] == 1, "it travels with the others"
    assert found["loss/square"] == pytest.approx((1 + 4 + 9 + 16) / 4)

    monitor = Monitor(tmp_path)
    monitor.layout(dashboard(small(), depth=1, num_experts=2, num_ranks=1, has_peak=False))
    for step in (10, 20):
        monitor.scalars(step, found)
    monitor.close()
    events = EventAccumulator(str(tmp_path / TENSORBOARD_DIR))
    events.Reload()
    (layout,) = events.Tensors("custom_scalars__config__")
    learning = Layout.FromString(layout.tensor_proto.string_val[0]).category[0]
    (chart,) = (chart for chart in learning.chart if chart.title == "a new chart")
    assert all(re.match(tag, "loss/square") for tag in chart.multiline.tag)
    assert [event.step for event in events.Scalars("loss/square")] == [10, 20]

    (tmp_path / CONFIG_FILE).write_text(small().to_yaml())
    page = report.write_report(load_runs([tmp_path]), tmp_path / "report").read_text()
    assert "<b>A new curve</b>Look here." in page
    assert (tmp_path / "report/loss-square.png").exists()

    assert "| `loss/square` | mean of the squared error's square |" in metrics_table().splitlines()


def test_a_sum_yields_the_metrics_that_name_it_and_no_others(single_process_group):
    tags = {metric.tag for metric in registry.METRICS if metric.sum is not None}

    found = {
        re.sub(r"block_\d\d", "block_{block}", re.sub(r"\d\d\d?-\d+$", "{range}", tag))
        for tag in interval([1.0] * 4, SHAPE).metrics
    }

    found = {re.sub(r"expert_\d+", "expert_{expert}", tag) for tag in found}
    assert found == tags | {"memory/max_rss_gib"}


def test_a_metric_has_one_entry():
    tags = [metric.tag for metric in registry.METRICS]

    assert len(set(tags)) == len(tags)


def test_charts_are_those_that_a_run_has_numbers_for():
    plain = dashboard(small(routing="dense"), depth=2, num_experts=0, num_ranks=1, has_peak=False)
    full = dashboard(
        small(loss_weight="uncertainty", expert_parallel_size=3),
        *(2, 3, 6),
        has_peak=True,
    )

    assert list(plain) == ["Is it learning?", "Is it fast?", "Did it survive?"]
    assert list(full) == [
        *("Is it learning?", "Is it fast?", "What do the experts do?"),
        *("Share of the samples, block by block", "Did it survive?"),
    ]
    rare = {
        *("distance from the prior", "learned weights: log variance"),
        *("share of the GPU's peak, %", "communication, and what nothing hides of it, %"),
        *("MiB that a rank sends per step, experts only", "busiest rank of a group over the mean"),
    }
    titles = [{title for charts in layout.values() for title in charts} for layout in (plain, full)]
    assert rare <= titles[1] and not rare & titles[0]
    shares = full["Share of the samples, block by block"]
    assert shares["block 01"] == ["Multiline", ["moe_load/block_01/expert_"]]
    assert full["Is it learning?"]["loss"] == ["Multiline", ["loss/mse$", "loss/total$"]]
    (scores,) = evaluation_charts().values()
    assert scores["held-out loss"] == ["Multiline", ["eval/loss_"]]


def test_the_documents_table_of_metrics_is_the_registrys():
    command = "run python -m training.monitoring.metrics_table --write"

    assert TABLE.current_text() == TABLE.text(), command


def test_a_mean_leaves_out_what_is_not_finite_whatever_it_is_made_of(
    single_process_group, monkeypatch
):
    entry = Metric(
        "loss/early",
        "share of the samples below timestep 50",
        sum=mean_over_samples(lambda micro: (micro.t < 50).sum()),
    )
    enter(entry, registry.LEARNING, monkeypatch)
    sums, t = MetricSums(1, 2, 100, CPU), torch.tensor([5, 5, 50, 95])
    for step, value in enumerate((2.0, float("nan"))):
        terms = LossTerms(*(torch.tensor(value) for _ in range(4)))
        sums.add(step, terms, torch.full((4,), value), t, PLAN, 0.0)

    assert sums.reduce().metrics["loss/early"] == 0.5
