"""--deterministic: torch is told, and every kind of network trains that way."""

import os

import pytest
import torch

from tests.support.tiny_models import batch, tiny_model
from training.engine.build import choose_operators

VARIABLE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    filled = torch.utils.deterministic.fill_uninitialized_memory
    monkeypatch.setenv(VARIABLE, "")  # so that it is as before afterwards
    monkeypatch.delenv(VARIABLE)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


def test_torch_and_cublas_are_told_and_torch_is_told_otherwise_by_the_next_run():
    choose_operators(True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ[VARIABLE] == ":4096:8"

    choose_operators(False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_workspace_that_the_environment_states_is_kept(monkeypatch):
    monkeypatch.setenv(VARIABLE, ":16:8")

    choose_operators(True)

    assert os.environ[VARIABLE] == ":16:8"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"expert_dispatch": "dispatched"},
        {"expert_kind": "mlp"},
        {"routing": "dtr"},
        {"routing": "dense", "qk_norm": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_operators_of_any_kind(options, dtype):
    def gradients():
        model = tiny_model(**options).to(dtype)
        model(*batch()).prediction.float().square().mean().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    expected = gradients()
    choose_operators(True)

    for found, wanted in zip(gradients(), expected, strict=True):
        assert torch.equal(found, wanted)
