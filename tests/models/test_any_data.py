"""Any number of classes, none too, and latents of any shape: labels, gradients, images, checks."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from data_tools.errors import ConfigError
from data_tools.stream.loader import Batch
from models.diffusion import Diffusion
from models.guidance import Guidance
from models.network_options import NetworkOptions
from models.switch_dit import SwitchDiT
from tests.support.launch import REPOSITORY
from training.config.preset import load_preset
from training.config.validation import check_data, validate
from training.engine.objective import Objective
from training.sampling.latents import SamplerSettings, sample_latents

SMALL = load_preset(str(REPOSITORY / "tests" / "small.yaml"))
DEEPSPEED = REPOSITORY / "ds_configs" / "zero2.json"
CLASSES = [0, 1, 10, 1000, 10_000]
SHAPES = [(4, 4, 4), (16, 4, 6), (32, 6, 4), (4, 2, 8)]


def random_model(num_classes=3, shape=(4, 4, 4), **options):
    """A small model with random weights, so that nothing is zero."""
    torch.manual_seed(0)
    model = SwitchDiT(
        NetworkOptions(
            input_size=shape[1:],
            patch_size=2,
            in_channels=shape[0],
            hidden_size=32,
            depth=2,
            num_heads=4,
            num_classes=num_classes,
            num_experts=4,
            top_k=2,
            **options,
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def training_labels(num_classes, dropout, count=4096):
    """Labels of the data and those that training makes of them."""
    config = replace(
        SMALL,
        model=replace(SMALL.model, num_classes=num_classes),
        data=replace(SMALL.data, class_dropout_prob=dropout),
    )
    labels = torch.arange(count) % max(1, num_classes)
    batch = Batch(torch.zeros(count, 2, 1, 1), labels, torch.arange(count))
    return labels, Objective(config, 0, 1.0, 0.0, torch.device("cpu")).micro_batch(batch).y


@pytest.mark.parametrize("num_classes", CLASSES)
def test_training_replaces_the_share_of_labels_by_the_null_class(num_classes):
    labels, kept = training_labels(num_classes, dropout=0.0)
    _, dropped = training_labels(num_classes, dropout=1.0)
    _, mixed = training_labels(num_classes, dropout=0.1)

    assert torch.equal(kept, labels)
    assert torch.equal(dropped, torch.full_like(labels, num_classes))
    is_null = mixed == num_classes
    assert torch.equal(mixed[~is_null], labels[~is_null])
    if num_classes:
        assert is_null.float().mean().item() == pytest.approx(0.1, abs=5 * (0.09 / 4096) ** 0.5)


def test_an_unconditional_model_ignores_the_classes_of_its_data():
    config = replace(SMALL, model=replace(SMALL.model, num_classes=0))
    batch = Batch(torch.zeros(8, 2, 1, 1), torch.arange(8), torch.arange(8))

    y = Objective(config, 0, 1.0, 0.0, torch.device("cpu")).micro_batch(batch).y

    assert torch.equal(y, torch.zeros(8, dtype=torch.int64))


@pytest.mark.parametrize("num_classes", CLASSES)
def test_a_label_trains_its_row_of_the_table_and_no_other(num_classes):
    model = random_model(num_classes)
    y = torch.tensor([0, num_classes // 2, num_classes])

    prediction = model(torch.randn(3, 4, 4, 4), torch.tensor([1, 500, 999]), y).prediction
    prediction.square().mean().backward()

    gradient = model.y_embedder.embedding_table.weight.grad
    assert gradient.shape == (num_classes + 1, 32)
    assert gradient.any(dim=1).nonzero().flatten().tolist() == y.unique().tolist()


def draw(model, labels, cfg_scale, shape=(4, 4, 4)):
    return sample_latents(
        model,
        Diffusion(),
        SamplerSettings("ddim", 3, seed=0, guidance=Guidance(cfg_scale)),
        indices=torch.arange(len(labels)),
        labels=labels,
        latent_shape=shape,
        null_class=model.options.num_classes,
    )


@pytest.mark.parametrize("num_classes", CLASSES)
def test_guidance_of_scale_0_draws_as_without_labels(num_classes):
    model = random_model(num_classes)
    labels = torch.tensor([0, num_classes // 2])
    without_labels = torch.full_like(labels, num_classes)

    unguided = draw(model, without_labels, 1.0)

    torch.testing.assert_close(draw(model, labels, 0.0), unguided, rtol=1e-4, atol=1e-4)
    if num_classes:
        assert not torch.allclose(draw(model, labels, 1.0), unguided, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shape", SHAPES)
def test_images_have_the_shape_of_the_latents(shape):
    images = draw(random_model(shape=shape), torch.tensor([0, 1]), 2.0, shape)

    assert images.shape == (2, *shape)
    assert images.isfinite().all()


@pytest.mark.parametrize("routing", ["switch", "dtr", "dense"])
@pytest.mark.parametrize("shape", SHAPES)
def test_without_attention_a_pixel_acts_on_its_own_patch_alone(shape, routing):
    """Rows and columns are told apart on the way in and on the way out."""
    model = random_model(shape=shape, routing=routing)
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
    C, H, W = shape
    x, t, y = torch.zeros(1, C, H, W), torch.tensor([999]), torch.tensor([0])

    for row, column in ((0, W - 1), (H - 1, 0), (H - 1, W - 1)):
        changed = x.clone()
        changed[0, C - 1, row, column] = 1.0
        with torch.no_grad():
            difference = model(changed, t, y).prediction - model(x, t, y).prediction
        touched = torch.zeros(H, W, dtype=torch.bool)
        touched[row // 2 * 2 : row // 2 * 2 + 2, column // 2 * 2 : column // 2 * 2 + 2] = True
        assert torch.equal(difference[0].abs().amax(0) > 1e-7, touched)


def check(model, **data):
    """Validate a model's keys against a data set's."""
    config = replace(SMALL, model=replace(SMALL.model, **model))
    fields = {"num_samples": 100, "num_classes": 10, "latent_channels": 4, "has_flip": True}
    sizes = {"latent_height": 16, "latent_width": 16, "folder": SMALL.data.data}
    validate(config, DEEPSPEED, 1)
    check_data(config, SimpleNamespace(**{**fields, **sizes, **data}))


def test_latents_that_are_not_square_are_accepted_as_stated():
    check({"latent_width": 24}, latent_width=24)
    check({"latent_size": 24, "latent_width": 16}, latent_height=24)
    check({"latent_width": 16})
    check({"latent_channels": 16, "num_classes": 0}, latent_channels=16, num_classes=0)


@pytest.mark.parametrize(
    ("model", "data", "sentence"),
    [
        ({}, {"latent_width": 24}, "holds latents of 4x16x24 (channels x height x width) but the"),
        ({"latent_width": 24}, {}, "takes 4x16x24; set --latent-channels, --latent-size and, unl"),
        ({"latent_width": 17}, {}, "--patch-size 2 does not divide --latent-width 17; use 2, 4"),
        ({"latent_size": 15, "latent_width": 16}, {}, "does not divide --latent-size 15; use"),
    ],
)
def test_latents_of_another_shape_are_refused(model, data, sentence):
    with pytest.raises(ConfigError) as error:
        check(model, **data)

    assert sentence in str(error.value)
