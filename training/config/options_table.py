"""Generate the table of options from the configuration: python -m training.config.options_table

With --write, the table in docs/options.md is replaced.
"""

import sys
from dataclasses import MISSING
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import yaml

from data_tools.process.entry_point import enter
from training.config.generated_table import GeneratedTable
from training.config.option import Option
from training.config.tree import SECTIONS, options


def options_table() -> str:
    """Return one Markdown table of every key: flag, default, meaning."""
    lines = ["| flag | default | meaning |", "| --- | --- | --- |"]
    section = ""
    for leaf in options():
        if leaf.section != section:
            section = leaf.section
            lines.append(f"| **{section}** | | {SECTIONS[section].__doc__.rstrip('.')} |")
        lines.append(f"| `{leaf.flag}` | {_default(leaf)} | {_meaning(leaf)} |")
    return "\n".join(lines)


def _default(leaf: Option) -> str:
    default = leaf.field.default
    return "preset" if default is MISSING else f"`{_text(default)}`"


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(str(one) for one in value) or "none"
    return yaml.safe_dump(value).splitlines()[0]  # as a preset would state it


def _meaning(leaf: Option) -> str:
    meaning = leaf.field.metadata["help"]
    choices = leaf.field.metadata["choices"]
    if not all(choice in meaning for choice in choices):
        meaning += f" ({', '.join(choices)})"
    return meaning.replace("|", "\\|")


TABLE = GeneratedTable("docs/options.md", "options", "training.config.options_table", options_table)

if __name__ == "__main__":
    enter(TABLE.main, prints_result=True)
