import pytest
import torch

from models.diffusion import Diffusion
from models.guidance import Guidance, autoguided, classifier_free

OBJECTIVES = ["epsilon", "v", "x0", "flow"]


def latents(num_samples=3, channels=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_samples, channels, 4, 4, generator=generator)


def labelled_model(x, t, y):
    """Noise that depends on the label, and variance channels that do too."""
    noise = x + y[:, None, None, None]
    return torch.cat((noise, 10 + noise), dim=1)


def weak_model(x, t, y):
    return 0.5 * labelled_model(x, t, y) - 1.0


class Recorder:
    """A model that remembers the labels and timesteps it was called with."""

    def __init__(self, model_fn):
        self.model_fn, self.labels, self.timesteps = model_fn, [], []

    def __call__(self, x, t, y):
        self.labels.append(y.tolist())
        self.timesteps.append(t.tolist())
        return self.model_fn(x, t, y)


Y = torch.tensor([1, 2, 3])
NULL = torch.full((3,), 7)
AT_500 = torch.tensor([500])


@pytest.mark.parametrize(("num_channels", "num_guided"), [(None, 4), (3, 3)])
def test_classifier_free_guidance_moves_away_from_the_unlabelled(num_channels, num_guided):
    x, guidance = latents(), Guidance(1.5, num_channels)

    found = classifier_free(labelled_model, Y, 7, guidance)(x, AT_500)

    with_label, without = labelled_model(x, None, Y), labelled_model(x, None, NULL)
    moved = without + 1.5 * (with_label - without)
    expected = torch.cat((moved[:, :num_guided], with_label[:, num_guided:]), dim=1)
    torch.testing.assert_close(found, expected)


def test_three_guided_channels_are_no_more_than_the_latents_have():
    x = latents(channels=2)

    found = classifier_free(labelled_model, Y, 7, Guidance(2.0, 3))(x, AT_500)

    expected = classifier_free(labelled_model, Y, 7, Guidance(2.0))(x, AT_500)
    assert torch.equal(found, expected)


def test_autoguidance_moves_away_from_the_weaker_model_with_the_same_label():
    x = latents()

    found = autoguided(labelled_model, weak_model, Y, Guidance(2.0))(x, AT_500)

    strong, weak = labelled_model(x, None, Y), weak_model(x, None, Y)
    expected = torch.cat((weak[:, :4] + 2 * (strong - weak)[:, :4], strong[:, 4:]), dim=1)
    torch.testing.assert_close(found, expected)


def test_a_weaker_model_may_have_no_variance_channels():
    x = latents()

    found = autoguided(labelled_model, lambda x, t, y: weak_model(x, t, y)[:, :4], Y, Guidance(2.0))

    expected = autoguided(labelled_model, weak_model, Y, Guidance(2.0))(x, AT_500)
    assert torch.equal(found(x, AT_500), expected)


@pytest.mark.parametrize(
    ("guidance", "acts"),
    [
        (Guidance(1.0), False),
        (Guidance(2.0), True),
        (Guidance(2.0, interval=(500, 500)), True),
        (Guidance(2.0, interval=(501, 999)), False),
        (Guidance(2.0, interval=(0, 499)), False),
    ],
)
def test_where_guidance_does_not_act_nothing_is_computed_for_it(guidance, acts):
    x, model, weak = latents(), Recorder(labelled_model), Recorder(weak_model)

    without_classifier = classifier_free(model, Y, 7, guidance)(x, AT_500)
    by_weak = autoguided(model, weak, Y, guidance)(x, AT_500)

    assert model.labels[0] == ([1, 2, 3, 7, 7, 7] if acts else [1, 2, 3])
    assert len(weak.labels) == acts
    for found in (without_classifier, by_weak):
        assert torch.equal(found, labelled_model(x, None, Y)) != acts


def test_timesteps_of_their_own_are_doubled_and_a_shared_one_is_not():
    model, guided = Recorder(labelled_model), Guidance(2.0)
    denoise = classifier_free(model, Y, 7, guided)

    denoise(latents(), torch.tensor([1, 2, 3]))
    denoise(latents(), AT_500)

    assert model.timesteps == [[1, 2, 3, 1, 2, 3], [500]]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_guiding_what_is_predicted_equals_guiding_the_noise(objective):
    diffusion = Diffusion("linear", objective=objective, learned_variance=False)
    x, t = latents(), torch.tensor([300])
    strong, weak = latents(seed=1), latents(seed=2)
    guidance = Guidance(2.5)

    found = diffusion.denoised(guidance.combine(strong, weak, 4), x, t)

    of_strong, of_weak = diffusion.denoised(strong, x, t), diffusion.denoised(weak, x, t)
    noise = of_weak.noise + 2.5 * (of_strong.noise - of_weak.noise)
    x_start = (x - diffusion.sigma[300].float() * noise) / diffusion.signal[300].float()
    torch.testing.assert_close(found.noise, noise, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.x_start, x_start, rtol=1e-5, atol=1e-5)
