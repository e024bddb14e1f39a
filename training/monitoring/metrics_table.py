"""Generate the table of metrics from their registry: python -m training.monitoring.metrics_table

With --write, the table in docs/tensorboard.md is replaced.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from data_tools.process.entry_point import enter
from training.config.generated_table import GeneratedTable
from training.monitoring import metrics as registry
from training.monitoring.metric import Condition


def metrics_table() -> str:
    """Return one Markdown table of every metric and picture: its tag and meaning."""
    lines = ["| tag | meaning |", "| --- | --- |"]
    for group in registry.GROUPS:
        lines.append(f"| **{group.title}** | {_needed(group.only_with)} |")
        for metric in group.metrics:
            meaning = f"{metric.meaning}; {_needed(metric.only_with)}".rstrip("; ")
            lines.append(f"| `{metric.tag}` | {meaning} |")
    lines.append("| **Pictures** | |")
    lines += [f"| `{tag}` | {meaning} |" for tag, meaning in registry.PICTURES.items()]
    return "\n".join(lines)


def _needed(condition: Condition | None) -> str:
    return "" if condition is None else f"needs {condition.text}"


TABLE = GeneratedTable(
    "docs/tensorboard.md", "metrics", "training.monitoring.metrics_table", metrics_table
)

if __name__ == "__main__":
    enter(TABLE.main, prints_result=True)
