"""The table of gates: what the whole model computes."""

import torch

from tests.support.configs import small
from training.engine.build import build_model
from training.engine.gate_table import gate_table


def test_the_gates_are_the_models():
    model = build_model(small())
    weights = {k: v for k, v in model.state_dict().items() if k.startswith(("t_embedder", "gate"))}
    x_t, t = torch.zeros(2, 4, 16, 16), torch.tensor([0, 999])

    with torch.no_grad():
        expected = model(x_t, t, torch.zeros(2, dtype=torch.int64)).gate_table

    assert torch.equal(gate_table(weights, 1000), expected)
