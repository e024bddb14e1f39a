"""Images depend on (seed, index), class and settings; never on the batch they were drawn in."""

import pytest
import torch

from models.diffusion import Diffusion
from models.guidance import Guidance
from models.network_options import NetworkOptions
from models.sampler import SAMPLING_METHODS, methods_for
from models.switch_dit import SwitchDiT
from training.sampling.latents import SamplerSettings, sample_latents

SHAPE = (4, 8, 8)
# One way to draw per method: (objective, method).
WAYS = [("epsilon", "ddpm"), ("v", "ddim"), ("x0", "dpmpp-2m"), ("flow", "euler"), ("flow", "heun")]


def make_model(objective="epsilon", *, latent_shape=SHAPE, num_classes=3, seed=0, **changes):
    torch.manual_seed(seed)
    arguments = {
        "input_size": latent_shape[1:],
        "patch_size": 2,
        "in_channels": latent_shape[0],
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 2,
        "num_classes": num_classes,
        "num_experts": 3,
        "top_k": 2,
        "learned_variance": objective == "epsilon",
    }
    model = SwitchDiT(NetworkOptions(**{**arguments, **changes}))
    for parameter in model.parameters():  # zero-initialised outputs would hide everything
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def draw(
    model,
    indices,
    labels,
    objective="epsilon",
    method=None,
    *,
    seed=0,
    scale=2.0,
    latent_shape=SHAPE,
    **changes,
):
    method = method or methods_for(objective)[0]
    return sample_latents(
        model,
        Diffusion("linear", 1000, objective=objective),
        SamplerSettings(method, 5, seed, Guidance(scale)),
        indices=torch.tensor(indices),
        labels=torch.tensor(labels),
        latent_shape=latent_shape,
        null_class=model.options.num_classes,
        **changes,
    )


def assert_same(found, expected):
    """Equal but for rounding, which a sampler's first steps enlarge: relative to the largest."""
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


def test_every_method_is_tried_here():
    assert {method for _, method in WAYS} == set(SAMPLING_METHODS)


@pytest.mark.parametrize(("objective", "method"), WAYS)
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_an_image_is_the_same_in_any_batch(objective, method, scale):
    model = make_model(objective)

    together = draw(model, [0, 1, 2, 3], [0, 1, 2, 0], objective, method, scale=scale)
    alone = draw(model, [2], [2], objective, method, scale=scale)

    assert_same(together[2:3], alone)


@pytest.mark.parametrize(("objective", "method"), WAYS)
def test_seed_index_and_class_each_change_an_image(objective, method):
    model = make_model(objective)
    image = draw(model, [0], [0], objective, method)

    assert not torch.allclose(image, draw(model, [1], [0], objective, method), atol=1e-2)
    assert not torch.allclose(image, draw(model, [0], [0], objective, method, seed=1), atol=1e-2)
    assert not torch.allclose(image, draw(model, [0], [1], objective, method), atol=1e-3)


class PerSampleTimesteps(torch.nn.Module):
    """Calls a model with one timestep per sample, as training does."""

    def __init__(self, model):
        super().__init__()
        self.model, self.options = model, model.options

    def forward(self, x_t, t, y):
        assert t.shape == (1,), "sampling should share the timestep"
        return self.model(x_t, t.expand(len(x_t)), y)


@pytest.mark.parametrize(
    "changes",
    [{}, {"top_k": 3}, {"expert_kind": "mlp"}, {"routing": "dtr"}, {"routing": "dense"}],
    ids=str,
)
@pytest.mark.parametrize(("objective", "method"), [("epsilon", "ddpm"), ("flow", "heun")])
def test_experts_merged_per_timestep_draw_the_same_images(objective, method, changes):
    model = make_model(objective, **changes)
    images = ([0, 1, 2], [0, 1, 2], objective, method)

    merged = draw(model, *images)
    per_sample = draw(PerSampleTimesteps(model), *images)

    assert_same(merged, per_sample)


@pytest.mark.parametrize("latent_shape", [(4, 8, 16), (16, 8, 4), (32, 4, 4)])
@pytest.mark.parametrize("num_classes", [0, 1, 10_000])
def test_any_latents_and_any_number_of_classes(latent_shape, num_classes):
    model = make_model(latent_shape=latent_shape, num_classes=num_classes)
    scale = 2.0 if num_classes else 1.0
    labels = [0, max(num_classes - 1, 0)]

    found = draw(model, [0, 1], labels, scale=scale, latent_shape=latent_shape)

    assert found.shape == (2, *latent_shape) and found.isfinite().all()


def test_guidance_compares_with_the_null_class():
    """A guidance scale of 0 is a model that is told no label."""
    model = make_model()

    unlabelled = draw(model, [0, 1], [0, 1], scale=0.0)

    told = draw(model, [0, 1], [model.options.num_classes] * 2, scale=1.0)
    assert_same(unlabelled, told)


def test_autoguidance_of_scale_zero_draws_the_weaker_models_images():
    model, weak = make_model("v"), make_model("v", routing="dense", hidden_size=16, seed=1)

    found = draw(model, [0, 1], [0, 1], "v", scale=0.0, weak_model=weak)

    expected = draw(weak, [0, 1], [0, 1], "v", scale=1.0)
    assert_same(found, expected)
