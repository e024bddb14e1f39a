"""Weights of other programs: recognised by their names, renamed, with equal predictions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel

from models.import_weights import check_positions, import_weights
from models.network_options import NetworkOptions
from models.switch_dit import SwitchDiT

TRUNK = {
    "input_size": (8, 8),
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 32,
    "num_heads": 4,
    "num_classes": 10,
    "num_experts": 4,
    "top_k": 2,
}


def recorded_weights(name):
    with np.load(Path(__file__).resolve().parents[1] / "parity" / f"{name}.npz") as arrays:
        return {
            key.removeprefix("weights/"): torch.from_numpy(arrays[key])
            for key in arrays
            if key.startswith("weights/")
        }


@pytest.fixture(scope="module")
def switch_weights():
    return recorded_weights("switch_tiny")


@pytest.fixture(scope="module")
def dit_weights():
    """Of the official DTR, whose names are DiT's."""
    return recorded_weights("dtr_tiny")


def random_model(depth=2):
    torch.manual_seed(0)
    model = SwitchDiT(NetworkOptions(depth=depth, **TRUNK))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def random_batch():
    """Noisy latents, timesteps from both ends, labels."""
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0, 7, 999]), torch.arange(3)


def is_routing(name):
    return name.startswith("gate.") or ".mixture." in name


def test_official_switch_dit_has_exactly_the_parameters_of_the_model(switch_weights):
    derived = {"full_time": torch.arange(1000), "prior._unit_mapping": torch.zeros(1000, 12)}

    imported = import_weights({**switch_weights, **derived})

    assert imported.kind == "Switch-DiT (official code)"
    shapes = {name: value.shape for name, value in imported.weights.items()}
    assert shapes == {
        k: v.shape for k, v in SwitchDiT(NetworkOptions(depth=3, **TRUNK)).named_parameters()
    }


def test_official_dit_has_exactly_the_parameters_outside_the_routing(dit_weights):
    imported = import_weights(dit_weights)

    assert imported.kind == "DiT or DTR (official code)"
    assert imported.positions.shape == (16, 32)
    dense = SwitchDiT(NetworkOptions(depth=2, routing="dense", **TRUNK))
    assert set(imported.weights) == {name for name, _ in dense.named_parameters()}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_our_own_names_come_back_whether_experts_are_stacked_or_not(prefix):
    model = random_model()
    parameters = dict(model.named_parameters())

    for names in (model.state_dict(), parameters):
        imported = import_weights({prefix + name: value for name, value in names.items()})
        assert imported.kind == "Switch-DiT (this program)"
        assert imported.weights.keys() == parameters.keys()
        assert all(torch.equal(imported.weights[name], parameters[name]) for name in parameters)
    trunk = {name: value for name, value in parameters.items() if not is_routing(name)}
    assert import_weights(trunk).kind == "DiT or DTR (this program)"


@pytest.fixture
def diffusers_dit():
    """The class of diffusers, tiny and random, with the numbers of the published DiT."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_eps=1e-6,  # DiT's; the class has 1e-5 for one of two norms
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    shared = model.transformer_blocks[0].norm1.emb
    # DiT's frequencies; the class spaces them by 1 / 127 instead of 1 / 128.
    shared.time_proj.downscale_freq_shift = 0
    for block in model.transformer_blocks:
        block.norm1.emb = shared
    return model


def test_diffusers_dit_predicts_the_same_after_its_import(diffusers_dit):
    imported = import_weights(diffusers_dit.state_dict())
    model = SwitchDiT(NetworkOptions(depth=2, routing="dense", **TRUNK))
    model.load_state_dict(imported.weights)
    x, t, y = random_batch()

    with torch.no_grad():
        expected = diffusers_dit(x, t, y).sample
        found = model(x, t, y).prediction

    assert imported.kind == "DiT (diffusers)"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_diffusers_blocks_with_embedders_of_their_own_are_refused(diffusers_dit):
    weights = diffusers_dit.state_dict()
    name = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    weights[name] = weights[name] + 1

    with pytest.raises(ValueError, match=r"blocks\.1\.norm1\.emb\.class_embedder.* differs from"):
        import_weights(weights)


def test_the_positional_table_must_be_ours_on_a_grid_like_ours(dit_weights):
    positions = import_weights(dit_weights).positions

    check_positions(positions, (4, 4))
    with pytest.raises(ValueError, match=r"pos_embed differs by 0\.1 from the fixed sine-cosine"):
        check_positions(positions + 0.1, (4, 4))
    for another_grid in ((4, 2), (8, 8), (2, 8)):
        check_positions(positions + 0.1, another_grid)


def test_what_is_not_a_whole_diffusion_transformer_is_refused(switch_weights):
    with pytest.raises(ValueError, match=r"no tensor is of a .* block \(1 tensors, such as head\)"):
        import_weights({"head": torch.zeros(1)})
    without = {k: v for k, v in switch_weights.items() if k != "routers.1.f_gate.1.bias"}
    with pytest.raises(ValueError, match=r"routers\.I\.f_gate\.1\.bias .* for \[0, 2\] only"):
        import_weights(without)


@pytest.mark.parametrize("experts", [{}, {"expert_kind": "mlp"}, {"renormalize_gates": True}])
def test_a_dit_predicts_the_same_with_new_experts(dit_weights, experts):
    """Upcycling is exact: experts start at zero, so the mixture's mask is one."""
    weights = import_weights(dit_weights).weights
    dense = SwitchDiT(NetworkOptions(depth=2, routing="dense", **TRUNK))
    dense.load_state_dict(weights)
    sparse = SwitchDiT(NetworkOptions(depth=2, **experts, **TRUNK))
    sparse.load_state_dict(weights, strict=False)

    with torch.no_grad():
        expected, found = (model(*random_batch()).prediction for model in (dense, sparse))

    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
