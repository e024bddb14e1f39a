"""Arrange the registry's metrics as charts of TensorBoard's page "custom scalars"."""

from typing import Any

from training.config.tree import Config
from training.monitoring import metrics as registry
from training.monitoring.metric import Metric, RunTraits

Chart = list[Any]  # as SummaryWriter.add_custom_scalars wants it: a kind, and regular expressions
Layout = dict[str, dict[str, Chart]]


def dashboard(
    config: Config, depth: int, num_experts: int, num_ranks: int, has_peak: bool
) -> Layout:
    """Return the charts of a training run.

    Args:
        config: of the run; charts of what it does not have are left out.
        depth: blocks.
        num_experts: of a block; 0 = a model without experts.
        num_ranks: that train.
        has_peak: whether the peak of the device, which speeds are compared with, is known.
    """
    run = RunTraits(config, num_experts, num_ranks, has_peak)
    return _layout(
        [
            metric
            for metric in registry.METRICS
            if metric.group != registry.IMAGES and all(one.holds(run) for one in metric.conditions)
        ],
        depth,
    )


def evaluation_charts() -> Layout:
    """Return the charts of a run's scores, which come with them: TensorBoard merges layouts."""
    scores = [metric for metric in registry.METRICS if metric.group == registry.IMAGES]
    return _layout(scores, end="(/|$)")  # of several networks, a slash and the network


def _layout(metrics: list[Metric], depth: int = 0, end: str = "$") -> Layout:
    layout: Layout = {}
    for metric in metrics:
        if metric.chart is None:
            continue
        charts = layout.setdefault(metric.group.title, {})
        blocks = range(depth) if "{block}" in metric.chart else [None]
        for block in blocks:
            title, tag = metric.chart, metric.tag
            if block is not None:
                title, tag = (text.replace("{block}", f"{block:02d}") for text in (title, tag))
            prefix, brace, _ = tag.partition("{")
            charts.setdefault(title, ["Multiline", []])[1].append(
                prefix if brace else f"{tag}{end}"
            )
    return layout
