"""Configurations for tests: small.yaml, with some leaves replaced."""

from dataclasses import replace
from pathlib import Path

from training.config import options
from training.preset import load_preset


def small(**values):
    """The configuration that tests state numbers of, with some leaves replaced."""
    return changed(load_preset(str(Path(__file__).with_name("small.yaml"))), **values)


def changed(config, **values):
    """Return the configuration with some leaves replaced."""
    for leaf in options():
        if leaf.name in values:
            part = replace(getattr(config, leaf.section), **{leaf.name: values.pop(leaf.name)})
            config = replace(config, **{leaf.section: part})
    assert not values, values
    return config
