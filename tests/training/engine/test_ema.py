"""The averages of the weights: against their weighted sums, and through saving and loading."""

import copy
import dataclasses

import pytest
import torch

from tests.support.reference import exponential_average, power_function_average
from training.config.preset import load_preset
from training.engine.average_profiles import (
    EMA_KEY,
    PowerProfile,
    TraditionalProfile,
    gamma_of_std,
    profiles_of,
    std_of_gamma,
)
from training.engine.optimizer import EMAAdamW

AVERAGES = {
    EMA_KEY: TraditionalProfile(0.9),
    "ema-0.5": TraditionalProfile(0.5, has_warmup=True),
    "ema-std0.050": PowerProfile(0.05),
    "ema-std0.200": PowerProfile(0.2),
}


def train(optimizer, param, steps):
    """Take steps on a fixed sequence of gradients; return the weights after each."""
    history = []
    for step in range(steps):
        param.grad = torch.full_like(param, float(step + 1))
        optimizer.step()
        history.append(param.detach().clone())
    return history


@pytest.mark.parametrize("is_fused", [False, True])
def test_every_average_is_its_profiles_weighted_sum_of_the_trajectory(is_fused):
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    param = torch.nn.Parameter(start.clone())
    optimizer = EMAAdamW([param], lr=0.1, profiles=AVERAGES, fused=is_fused)

    trajectory = torch.stack([start, *train(optimizer, param, 25)]).numpy()

    for key, profile in AVERAGES.items():
        if isinstance(profile, PowerProfile):
            expected = power_function_average(trajectory, profile.gamma)
        else:
            expected = exponential_average(trajectory, profile.decay, profile.has_warmup)
        torch.testing.assert_close(
            optimizer.state[param][key], torch.from_numpy(expected), rtol=1e-12, atol=1e-12, msg=key
        )


def test_widths_and_exponents_are_inverse_to_each_other():
    for gamma in (0.0, 0.5, 6.94, 16.97, 100.0, 1e4):
        std = std_of_gamma(gamma)
        assert gamma_of_std(std) == pytest.approx(gamma, rel=1e-9, abs=1e-9)
        assert std == pytest.approx(((gamma + 1) / (gamma + 3)) ** 0.5 / (gamma + 2), rel=1e-12)
    # The paper's two: sigma_rel 0.05 and 0.10.
    assert [round(gamma_of_std(std), 2) for std in (0.05, 0.10)] == [16.97, 6.94]


def test_a_late_step_weighs_in_with_all_its_digits():
    steps = torch.tensor([400_000.0], dtype=torch.float64)
    weight = PowerProfile(0.05).new_weight(steps).item()

    # The series of 1 - (1 - 1 / n)^p to third order; the next term is 1e-17 of it.
    power = gamma_of_std(0.05) + 1
    series = power / 4e5 - power * (power - 1) / 2 / 4e5**2
    series += power * (power - 1) * (power - 2) / 6 / 4e5**3
    assert weight == pytest.approx(series, rel=1e-12)


def test_averages_are_named_by_their_profiles():
    optim = load_preset("tests/small.yaml").optim

    profiles = profiles_of(
        dataclasses.replace(optim, ema_decays=(0.999, 0.9999), ema_stds=(0.05, 0.1234))
    )

    assert list(profiles) == ["ema", "ema-0.9999", "ema-std0.050", "ema-std0.1234"]
    assert next(iter(profiles.values())).name == "0.999"


def test_parameters_move_exactly_as_under_adamw():
    ours = torch.nn.Parameter(torch.ones(3))
    theirs = torch.nn.Parameter(torch.ones(3))
    settings = {"lr": 0.1, "weight_decay": 0.01, "betas": (0.8, 0.95)}

    a = train(EMAAdamW([ours], profiles=AVERAGES, **settings), ours, 5)
    b = train(torch.optim.AdamW([theirs], **settings), theirs, 5)

    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_each_parameter_counts_its_own_steps():
    early, late = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = EMAAdamW([early, late], lr=0.1, profiles=AVERAGES)
    train(optimizer, early, 3)
    assert EMA_KEY not in optimizer.state[late], "no gradient, no average"
    train(optimizer, late, 1)

    # The first step's weights are the whole of a power-function average.
    assert torch.equal(optimizer.state[late]["ema-std0.050"], late.detach())
    assert not torch.equal(optimizer.state[early]["ema-std0.050"], early.detach())


def test_saving_and_loading_continues_every_average():
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = EMAAdamW([param], lr=0.1, profiles=AVERAGES)
    train(optimizer, param, 3)
    saved, weights = copy.deepcopy(optimizer.state_dict()), param.detach().clone()
    train(optimizer, param, 2)

    again = torch.nn.Parameter(weights)
    resumed = EMAAdamW([again], lr=0.1, profiles=AVERAGES)
    resumed.load_state_dict(saved)
    train(resumed, again, 2)

    for key in AVERAGES:
        assert torch.equal(resumed.state[again][key], optimizer.state[param][key])
