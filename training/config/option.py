"""Declare a key of the configuration, and check its values."""

import dataclasses
import math
import operator
import re
from collections.abc import Callable
from dataclasses import MISSING, field
from typing import Any, NamedTuple

from data_tools.errors import ConfigError
from training.config.wording import did_you_mean, shown

EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


def option(
    help_text: str,
    default: Any = MISSING,
    *,
    choices: tuple[str, ...] = (),
    bounds: str = "",
    may_change: bool = False,
    expands: Callable[[str, str], str] | None = None,
) -> Any:
    """Declare one key.

    Args:
        help_text: one line: meaning, unit, what null or 0 means.
        default: without one, every preset must state the key.
        choices: the allowed texts, where there are few.
        bounds: comparisons that the value must satisfy, such as ">=0 <1".
        may_change: a run directory may be continued with another value.
        expands: of paths: replaces ~ and variables in a value, given where it stands.
    """
    metadata = {"help": help_text, "choices": choices, "bounds": bounds, "may_change": may_change}
    metadata["expands"] = expands
    return field(default=default, metadata=metadata)


class Option(NamedTuple):
    """One leaf of the tree."""

    section: str
    name: str
    kind: type  # int, float, bool or str; of the elements, if it is a list
    is_nullable: bool
    is_list: bool
    field: dataclasses.Field

    @property
    def flag(self) -> str:
        """The leaf's command-line spelling."""
        return "--" + self.name.replace("_", "-")


def check_value(leaf: Option, value: Any, where: str) -> Any:
    """Return `value` if it has the leaf's type and is allowed, else raise ConfigError.

    Args:
        value: from YAML or a parsed flag; for a list, one value stands for a list of one.
        where: the key as the user knows it: "file.yaml: optim.lr" or "--lr".
    """
    if value is None and leaf.is_nullable:
        return None
    if leaf.is_list:
        values = value if isinstance(value, list | tuple) else [value]
        checked = tuple(_check_one(leaf, one, where) for one in values)
        if len(set(checked)) < len(checked):
            raise ConfigError(f"{where} names a value twice: {shown(list(values))}.")
        return checked
    return _check_one(leaf, value, where)


def _check_one(leaf: Option, value: Any, where: str) -> Any:
    if leaf.kind is float and type(value) is int:
        value = float(value)
    if type(value) is not leaf.kind:
        null = " or null" if leaf.is_nullable else ""
        raise ConfigError(f"{where} must be {EXPECTED[leaf.kind]}{null}, not {shown(value)}.")
    if value == "":
        raise ConfigError(f"{where} is empty; give a text.")
    choices = leaf.field.metadata["choices"]
    if choices and value not in choices:
        raise ConfigError(f"{where}: unknown value '{value}'{did_you_mean(value, choices)}")
    bounds = leaf.field.metadata["bounds"]
    for sign, limit in re.findall(r"([<>]=?)([\d.]+)", bounds):
        is_infinite = isinstance(value, float) and not math.isfinite(value)
        if is_infinite or not _COMPARE[sign](value, float(limit)):
            raise ConfigError(f"{where} must be {bounds.replace(' ', ' and ')}, not {value}.")
    return value
