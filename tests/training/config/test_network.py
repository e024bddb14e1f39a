"""The network's options are stated in one place: NetworkOptions, read from the configuration."""

import json
from dataclasses import asdict, fields, replace

import pytest

from models.network_options import NetworkOptions
from training.config.network import network_options
from training.config.preset import load_preset

# What changes each option that no key of the same name in section `model` sets.
OTHER_KEYS = {
    "input_size": {"model": {"latent_width": 64}},
    "in_channels": {"model": {"latent_channels": 16}},
    "hidden_size": {"model": {"size": "S"}},
    "depth": {"model": {"size": "S"}},
    "num_heads": {"model": {"size": "S"}},
    "num_timesteps": {"diffusion": {"num_timesteps": 77}},
    "learned_variance": {"diffusion": {"learned_variance": False}},
    "has_loss_uncertainty": {"diffusion": {"loss_weight": "uncertainty"}},
}
LAYOUT = {"expert_parallel_size": 2, "shards_weights": True}  # given by what builds the network
ANOTHER_TEXT = {
    "routing": "dtr",
    "expert_kind": "mlp",
    "expert_dispatch": "merged",
    "attention_kernel": "fused",
}


@pytest.fixture(scope="module")
def config():
    return load_preset("demo")


def another(name, value):
    """A value that differs from `value`."""
    if isinstance(value, bool):
        return not value
    return ANOTHER_TEXT[name] if isinstance(value, str) else value + 1


@pytest.mark.parametrize("name", [f.name for f in fields(NetworkOptions) if f.name not in LAYOUT])
def test_a_key_of_the_configuration_reaches_every_option(config, name):
    value = getattr(network_options(config), name)
    keys = OTHER_KEYS.get(name) or {"model": {name: another(name, value)}}
    sections = {part: replace(getattr(config, part), **new) for part, new in keys.items()}

    found = getattr(network_options(replace(config, **sections)), name)

    assert found != value


def test_what_builds_the_network_says_how_it_is_shared_out(config):
    options = network_options(config, **LAYOUT)

    assert options == replace(network_options(config), **LAYOUT) != network_options(config)


def test_options_come_back_from_json(config):
    options = network_options(config)

    assert NetworkOptions(**json.loads(json.dumps(asdict(options)))) == options
