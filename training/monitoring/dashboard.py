"""Arrange the registry's metrics as charts of TensorBoard's page "custom scalars"."""

from typing import Any

from training.config.tree import Config
from training.monitoring import metrics as registry
from training.monitoring.metric import Group, RunTraits

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
        has_peak: whether the peak of the device, which speeds are compared with, is known.
    """
    run = RunTraits(config, num_experts, num_ranks, has_peak)
    groups = [group for group in registry.GROUPS if run.meets(group.only_with)]
    groups.remove(registry.IMAGES)
    return {group.title: _charts(group, run, depth) for group in groups}


def evaluation_charts() -> Layout:
    """Return the charts of a run's scores, which come with them: TensorBoard merges layouts."""
    # Of several networks, a slash and the network stand behind a tag.
    return {registry.IMAGES.title: _charts(registry.IMAGES, end="(/|$)")}


def _charts(
    group: Group, run: RunTraits | None = None, depth: int = 0, end: str = "$"
) -> dict[str, Chart]:
    charts: dict[str, Chart] = {}
    for metric in group.metrics:
        if metric.chart is None or (run is not None and not run.meets(metric.only_with)):
            continue
        blocks = range(depth) if "{block}" in metric.chart else [None]
        for block in blocks:
            title, tag = metric.chart, metric.tag
            if block is not None:
                title, tag = (text.replace("{block}", f"{block:02d}") for text in (title, tag))
            prefix, brace, _ = tag.partition("{")
            pattern = prefix if brace else f"{tag}{end}"
            charts.setdefault(title, ["Multiline", []])[1].append(pattern)
    return charts
