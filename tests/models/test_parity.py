"""Numbers recorded from the official code of Switch-DiT and of DTR (float32, CPU)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from models.diffusion import Diffusion
from models.guidance import Guidance, classifier_free
from models.import_weights import import_weights
from models.network_options import NetworkOptions
from models.prior import diffusion_prior, prior_loss
from models.routing import ChannelRouter
from models.sampler import respaced, sample
from models.switch_dit import SwitchDiT
from models.unit_matching import match_units
from tests.support.tiny_models import tiny_options

OPTIONS = {
    "switch_tiny": {"depth": 3, "num_experts": 4, "top_k": 2},
    "dtr_tiny": {"depth": 2, "routing": "dtr", "num_experts": 0, "top_k": 0},
}
NUM_PARAMETERS = {"switch_tiny": 53, "dtr_tiny": 31}
TOLERANCE = 1e-4  # of the largest value of a tensor, or of a sample where samples differ in scale


def load(name):
    with np.load(Path(__file__).resolve().parents[1] / "parity" / f"{name}.npz") as arrays:
        return {
            name: array if array.dtype.kind == "U" else torch.from_numpy(array)
            for name, array in arrays.items()
        }


def build(recorded, name):
    model = SwitchDiT(
        NetworkOptions(
            input_size=(8, 8),
            patch_size=2,
            in_channels=4,
            hidden_size=32,
            num_heads=4,
            num_classes=10,
            **OPTIONS[name],
        )
    )
    weights = {k.removeprefix("weights/"): v for k, v in recorded.items() if "weights/" in k}
    model.load_state_dict(import_weights(weights).weights)
    return model


@pytest.fixture(scope="module", params=sorted(OPTIONS))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def recorded(kind):
    return load(kind)


@pytest.fixture(scope="module")
def model(recorded, kind):
    return build(recorded, kind)


@pytest.fixture
def predict(model):
    return lambda x, t, y: model(x, t, y).prediction


def assert_same(found, expected):
    """Compare sample by sample (or block by block), each relative to its largest value."""
    assert found.shape == expected.shape
    difference = (found - expected).abs().flatten(1).amax(1)
    scale = expected.abs().flatten(1).amax(1)
    assert (difference <= TOLERANCE * scale).all(), f"off by {(difference / scale).max():.1e}"


def test_prediction(model, recorded):
    output = model(recorded["x_t"], recorded["t"], recorded["y"])

    assert_same(output.prediction, recorded["prediction"])


def test_gate_table():
    recorded = load("switch_tiny")

    output = build(recorded, "switch_tiny")(recorded["x_t"], recorded["t"], recorded["y"])

    assert_same(output.gate_table, recorded["gate_probs"])


def test_channel_masks():
    router = ChannelRouter(tiny_options(hidden_size=32, num_timesteps=1000))

    assert torch.equal(router.mask_minus_one + 1, load("dtr_tiny")["channel_mask"])


def test_guided_prediction(predict, recorded):
    denoise = classifier_free(predict, recorded["y"][:3], 10, Guidance(1.5))

    found = denoise(recorded["x_t"][:3], recorded["t"][:3])

    assert_same(found, recorded["prediction_cfg_1p5"][:3])


def test_noised_latents(recorded):
    x_t = Diffusion().q_sample(recorded["x_start"], recorded["t"], recorded["noise"])

    assert_same(x_t, recorded["x_t"])


def loss_terms(model, recorded):
    x_t, t = recorded["x_t"], recorded["t"]
    prediction = model(x_t, t, recorded["y"]).prediction
    return Diffusion().loss_terms(prediction, recorded["x_start"], x_t, t, recorded["noise"])


def test_loss_terms(model, recorded):
    mse, vlb = loss_terms(model, recorded)

    assert_same(mse[:, None], recorded["mse"][:, None])
    assert_same(vlb[:, None], recorded["vb"][:, None])


def official_gradient(model, name):
    """The gradient of our parameter that has this official name."""
    if not name.startswith("routers."):
        return model.get_parameter(name).grad
    _, block, part = name.split(".", 2)
    experts = f"blocks.{block}.mixture.deepspeed_moe.experts"
    if part.startswith("experts"):
        return model.get_parameter(f"{experts}.{'weight' if part == 'experts.w' else 'bias'}").grad
    return model.get_parameter(f"gate.{part.rsplit('.')[-1]}").grad[int(block)]


def test_gradient_norm_of_every_parameter(model, recorded, kind):
    mse, vlb = loss_terms(model, recorded)
    model.zero_grad()
    (mse + vlb).mean().backward()

    assert len(recorded["grad_norm_names"]) == NUM_PARAMETERS[kind]
    for name, expected in zip(recorded["grad_norm_names"], recorded["grad_norms"], strict=True):
        norm = official_gradient(model, str(name)).norm().item()
        assert norm == pytest.approx(expected.item(), rel=TOLERANCE), name


def test_prior_map():
    assert torch.equal(diffusion_prior(1000, 3, 4, 2), load("switch_tiny")["prior_mask"])


def test_prior_loss_over_tie_breaks():
    recorded = load("switch_tiny")
    lowest, mean, highest = recorded["prior_loss_over_tie_breaks"].tolist()
    table, prior = recorded["gate_probs"], recorded["prior_mask"]

    losses = [
        prior_loss(table, prior, recorded["t"], match_units(table, 2, prior, seed)).item()
        for seed in range(300)
    ]

    assert lowest * (1 - 1e-5) <= min(losses) and max(losses) <= highest * (1 + 1e-5)
    assert np.mean(losses) == pytest.approx(mean, rel=1e-3)


def test_respaced_steps(predict, recorded):
    chain = respaced(Diffusion(), 10)
    x = recorded["respaced_x"]

    prediction = predict(x, chain.timesteps, recorded["respaced_y"])
    step = chain.p_mean_variance(prediction, x, torch.arange(10))

    assert torch.equal(chain.timesteps, recorded["respaced_timesteps"])
    assert_same(step.mean, recorded["respaced_mean"])
    assert_same(step.log_variance, recorded["respaced_log_variance"])
    assert_same(step.pred_x_start, recorded["respaced_pred_xstart"])


def test_ddim_sample(predict, recorded):
    denoise = classifier_free(predict, recorded["respaced_y"][:3], 10, Guidance())

    found = sample(
        denoise, recorded["respaced_x"][:3], diffusion=Diffusion(), method="ddim", num_steps=10
    )

    assert_same(found, recorded["ddim10_sample"])
