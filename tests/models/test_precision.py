"""A network that predicts in bf16, beside itself in fp32."""

import copy

import pytest
import torch

from models.diffusion import Diffusion
from models.guidance import Guidance
from models.precision import cast_network, products_in
from tests.support.tiny_models import batch, tiny_model
from training.sampling.latents import SamplerSettings, sample_latents

NETWORKS = {
    "merged": {"expert_dispatch": "merged"},
    "dispatched": {"expert_dispatch": "dispatched"},
    "mlp": {"expert_kind": "mlp"},
    "dtr": {"routing": "dtr"},
    "dense": {"routing": "dense"},
    "qk_norm": {"qk_norm": True},
}


def in_both(**options):
    """A network in fp32, and its copy in bf16."""
    model = tiny_model(**options).eval()
    return model, cast_network(copy.deepcopy(model), "bf16")


def distance(found, right):
    return ((found.float() - right).norm() / right.norm()).item()


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_bf16_chooses_the_same_experts_and_predicts_nearly_the_same(name):
    exact, fast = in_both(**NETWORKS[name])
    expected, found = exact(*batch()), fast(*batch())

    assert found.prediction.dtype == torch.bfloat16
    assert distance(found.prediction, expected.prediction) < 0.03
    if exact.options.has_experts:
        assert torch.equal(found.gate_table, expected.gate_table)


@pytest.mark.parametrize("name", NETWORKS)
def test_bf16_draws_nearly_the_same_latents(name):
    drawn = [
        sample_latents(
            model,
            Diffusion("cosine", 50),
            SamplerSettings("ddim", 8, 0, guidance=Guidance(2.0)),
            indices=torch.arange(3),
            labels=torch.tensor([0, 3, 9]),
            latent_shape=(4, 4, 6),
            null_class=10,
        )
        for model in in_both(**NETWORKS[name])
    ]
    assert drawn[1].dtype == torch.float32
    assert 0 < distance(drawn[1], drawn[0]) < 0.05


def test_fp32_and_tf32_leave_the_weights_and_other_products_alone():
    model = tiny_model()
    before = torch.get_float32_matmul_precision()
    for precision, within in (("fp32", before), ("tf32", "high"), ("bf16", before)):
        with products_in(precision):
            assert torch.get_float32_matmul_precision() == within
        assert torch.get_float32_matmul_precision() == before
    for precision in ("fp32", "tf32"):
        assert {p.dtype for p in cast_network(model, precision).parameters()} == {torch.float32}
