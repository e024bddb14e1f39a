"""Configurations for tests: small.yaml, with some leaves replaced; precision that is stated."""

import json
from dataclasses import replace
from pathlib import Path

from training.config.precision import PRECISION_BLOCKS
from training.config.preset import load_preset
from training.config.tree import options

# For --deepspeed: the default, ds_configs/zero2.json, in fp32 on every machine.
TESTS = Path(__file__).resolve().parents[1]
FP32 = TESTS / "fp32.json"
SHIPPED = TESTS.parent / "ds_configs"


def small(**values):
    """The configuration that tests state numbers of, with some leaves replaced."""
    return changed(load_preset(str(TESTS / "small.yaml")), **values)


def changed(config, **values):
    """Return the configuration with some leaves replaced."""
    for leaf in options():
        if leaf.name in values:
            part = replace(getattr(config, leaf.section), **{leaf.name: values.pop(leaf.name)})
            config = replace(config, **{leaf.section: part})
    assert not values, values
    return config


def stated(folder, name, is_reduced):
    """Write a copy of ds_configs/NAME.json whose "auto" precision is on or off; return its path."""
    values = json.loads((SHIPPED / f"{name}.json").read_text())
    for block in PRECISION_BLOCKS:
        if block in values:
            values[block]["enabled"] = is_reduced
    path = folder / f"{name}-{'bf16' if is_reduced else 'fp32'}.json"
    path.write_text(json.dumps(values))
    return path
