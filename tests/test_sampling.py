"""Images depend on (seed, index), class and settings; never on the batch they were drawn in."""

import numpy as np
import pytest
import torch

from models.diffusion import Diffusion
from models.switch_dit import SwitchDiT
from training.sampling import SamplerSettings, image_grid, sample_latents

SHAPE = (4, 8, 8)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = SwitchDiT(
        input_size=(8, 8),
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        depth=2,
        num_heads=2,
        num_classes=3,
        num_experts=3,
        top_k=2,
    )
    for parameter in model.parameters():  # zero-initialised outputs would hide everything
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def draw(model, indices, labels, method="ddpm", seed=0, cfg_scale=2.0):
    return sample_latents(
        model,
        Diffusion("cosine", 1000),
        SamplerSettings(method, 5, cfg_scale, seed),
        indices=torch.tensor(indices),
        labels=torch.tensor(labels),
        latent_shape=SHAPE,
        null_class=3,
    )


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_an_image_is_the_same_in_any_batch(model, method, cfg_scale):
    together = draw(model, [0, 1, 2, 3], [0, 1, 2, 0], method, cfg_scale=cfg_scale)
    alone = draw(model, [2], [2], method, cfg_scale=cfg_scale)

    torch.testing.assert_close(together[2:3], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_seed_index_and_class_each_change_an_image(model, method):
    image = draw(model, [0], [0], method)

    assert not torch.allclose(image, draw(model, [1], [0], method), atol=1e-2)
    assert not torch.allclose(image, draw(model, [0], [0], method, seed=1), atol=1e-2)
    assert not torch.allclose(image, draw(model, [0], [1], method), atol=1e-3)


def test_a_grid_holds_every_image_and_pads_the_last_row():
    pixels = np.stack([np.full((4, 4, 3), value, dtype=np.uint8) for value in (10, 20, 30)])

    grid = image_grid(pixels, columns=2)

    for value in (10, 20, 30):
        assert (grid == value).all(axis=-1).sum() == 16
    assert grid.shape[0] < grid.shape[1] * 2


def test_labels_take_a_line_above_each_row():
    pixels = np.zeros((2, 16, 16, 3), dtype=np.uint8)

    plain, labelled = (
        image_grid(pixels, columns=1, row_labels=labels) for labels in (None, ["cat", "dog"])
    )

    assert labelled.shape[0] > plain.shape[0]
    assert labelled.shape[1] == plain.shape[1]
