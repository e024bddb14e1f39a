"""The network of FID, against the published graph: names, shapes, arithmetic, resizing, checksum.

The weights themselves are not here: no test runs the real network.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_tools.errors import ConfigError
from tests.support.reference_inception import BLOCKS, STEM, Graph, torch_name
from tests.support.reference_scores import resize
from training.evaluation import networks
from training.evaluation.card import describe_reference, say_left_out
from training.evaluation.image_npz import ImageNpz
from training.evaluation.inception import Inception, resize_like_tensorflow
from training.evaluation.networks import POOL, SPATIAL, InceptionNetwork
from training.evaluation.scores import Reference, feature_statistics, score

NUM_TENSORS = 566  # of the published file of weights
# (height, width, channels) of the graph's layers for a 299 x 299 image.
SHAPES = {
    "conv": (149, 149, 32),
    "conv_1": (147, 147, 32),
    "conv_2": (147, 147, 64),
    "pool": (73, 73, 64),
    "conv_3": (73, 73, 80),
    "conv_4": (71, 71, 192),
    "pool_1": (35, 35, 192),
    "mixed/join": (35, 35, 256),
    **dict.fromkeys(("mixed_1/join", "mixed_2/join"), (35, 35, 288)),
    **{f"mixed_{i}/join": (17, 17, 768) for i in range(3, 8)},
    "mixed_6/conv": (17, 17, 192),
    "mixed_8/join": (8, 8, 1280),
    **dict.fromkeys(("mixed_9/join", "mixed_10/join"), (8, 8, 2048)),
}


@pytest.fixture(scope="module")
def model():
    """The network with weights that let every layer matter."""
    torch.manual_seed(0)
    model = Inception().eval()
    for name, value in model.state_dict().items():
        if name.endswith("running_mean") or name.endswith("bn.bias"):
            value.normal_(std=0.2)
        elif name.endswith("running_var") or name.endswith("bn.weight"):
            value.uniform_(0.5, 1.5)
        elif name.endswith("conv.weight"):
            value.normal_(std=(2.0 / value[0].numel()) ** 0.5)
    return model


@pytest.fixture(scope="module")
def looked(model):
    """One image through the network and through the graph, with every layer of both."""
    pixels = torch.randint(0, 256, (1, 60, 80, 3), dtype=torch.uint8)
    layers = {}

    def remember(name):
        return lambda _module, _inputs, output: layers.__setitem__(name, output)

    hooks = [
        module.register_forward_hook(remember(name))
        for name, module in model.named_modules()
        if name.split(".")[-1].startswith(("Conv2d", "Mixed", "branch"))
    ]
    with torch.no_grad():
        features = model(pixels)
        x = resize_like_tensorflow(pixels.permute(0, 3, 1, 2).float(), 299)
        graph = Graph(model.state_dict())
        graph.run((x.double() - 128) / 128)
    for hook in hooks:
        hook.remove()
    return features, layers, graph


def test_every_tensor_of_the_published_file_has_its_place(model, looked):
    names = model.state_dict().keys()
    _, _, graph = looked

    counters = {name for name in names if name.endswith("num_batches_tracked")}
    assert len(names) == NUM_TENSORS
    assert names - counters == graph.used
    assert model.fc.weight.shape == (1008, 2048)


@pytest.mark.parametrize("scope", SHAPES)
def test_the_graphs_layers_have_their_published_shapes(looked, scope):
    _, channels, height, width = looked[2].tensors[scope].shape

    assert (height, width, channels) == SHAPES[scope]


def test_every_layer_computes_what_the_graph_computes(looked):
    _, layers, graph = looked
    compared = 0
    for scope, expected in graph.tensors.items():
        name = BLOCKS.get(scope.removesuffix("/join"))
        if not scope.endswith("/join"):
            name = torch_name(scope) if scope in STEM or "/" in scope else None
        if name is not None:
            compared += 1
            error = (layers[name] - expected).abs().max() / expected.abs().max()
            assert error < 1e-4, f"{scope} ({name}): {error}"

    assert compared == len(layers) == 94 + 11


def test_features_are_the_pooled_layer_and_seven_channels_of_mixed_6(looked):
    features, _, graph = looked
    pool, spatial = graph.tensors["pool_3"], graph.tensors["mixed_6/conv"][:, :7]

    assert features.pool.shape == (1, 2048)
    assert features.spatial.shape == (1, 2023)
    np.testing.assert_allclose(features.pool, pool, atol=1e-4 * pool.abs().max())
    in_order_of_nhwc = spatial[0].permute(1, 2, 0).reshape(-1)
    limit = 1e-4 * spatial.abs().max()
    np.testing.assert_allclose(features.spatial[0], in_order_of_nhwc, atol=limit)


def test_logits_lack_the_bias(model, looked):
    pool = looked[0].pool

    difference = model.fc(pool) - model.logits(pool)

    torch.testing.assert_close(difference, model.fc.bias[None], atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(5, 7), (64, 64), (40, 20), (299, 299), (21, 64)])
@pytest.mark.parametrize("size", [31, 64])
def test_resizing_is_tensorflows_of_2015(shape, size):
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.float32)

    found = resize_like_tensorflow(torch.from_numpy(image)[None, None], size)

    np.testing.assert_array_equal(found[0, 0].numpy(), resize(image, size))


def test_resizing_has_no_half_pixel_shift_and_no_corner_alignment():
    """Twice as large: every second pixel is an old one, and the last repeats the edge."""
    found = resize_like_tensorflow(torch.tensor([[[[0.0, 8.0], [4.0, 12.0]]]]), 4)[0, 0]

    assert found[0].tolist() == [0.0, 4.0, 8.0, 8.0]
    assert found[:, 0].tolist() == [0.0, 2.0, 4.0, 4.0]


class TestWeights:
    """--inception and the caches."""

    def test_a_file_that_is_missing(self, tmp_path):
        with pytest.raises(ConfigError, match="none.pth: there is no such file; fetch it from htt"):
            networks.load_inception(tmp_path / "none.pth", torch.device("cpu"))

    def test_a_file_with_another_checksum(self, tmp_path):
        path = tmp_path / "inception.pth"
        path.write_bytes(b"torchvision's")

        with pytest.raises(ConfigError) as error:
            networks.load_inception(path, torch.device("cpu"))

        assert f"--inception {path}: has sha256 " in str(error.value)
        assert "the Inception weights of FID have 6726825d0af5; with others no" in str(error.value)

    @pytest.mark.parametrize("name", networks.INCEPTION_FILES)
    def test_torchs_cache_is_looked_at_under_both_names(self, tmp_path, monkeypatch, name):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        path = tmp_path / "hub" / "checkpoints" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"damaged")

        with pytest.raises(ConfigError) as error:
            networks.load_inception(None, torch.device("cpu"))

        assert str(error.value).startswith(f"{path}: has sha256 ")

    def test_no_cache_and_no_network(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        nowhere = (tmp_path / "weights.pth").as_uri()
        monkeypatch.setattr(networks, "INCEPTION_URL", nowhere)

        with pytest.raises(ConfigError) as error:
            networks.load_inception(None, torch.device("cpu"))

        assert "--inception is not given, " in str(error.value)
        assert f"; fetch {nowhere} elsewhere and give --inception FILE." in str(error.value)

    def test_a_right_file_is_loaded(self, tmp_path, monkeypatch, model):
        path = tmp_path / "inception.pth"
        torch.save(model.state_dict(), path)
        monkeypatch.setattr(networks, "INCEPTION_SHA256", networks.sha256_of(path))

        network = networks.load_inception(path, torch.device("cpu"))

        found = network.model.state_dict()
        assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())
        assert network.min_images == 2049


def test_gpus_convolve_exactly_and_with_their_library():
    with networks.full_precision():
        cudnn = torch.backends.cudnn
        assert cudnn.enabled and cudnn.deterministic and not cudnn.allow_tf32


class Few(torch.nn.Module):
    """Looks at images as Inception does, with 8 and 6 features instead of 2048 and 2023."""

    def forward(self, pixels):
        means = pixels.double().unflatten(1, (2, -1)).flatten(2, 3).mean(dim=2)  # (N, 2, 3)
        pool = torch.cat((means.flatten(1), means[:, :, 0] ** 2), dim=1).float()
        return SimpleNamespace(pool=pool, spatial=pool[:, :6])

    def logits(self, pool):
        return pool


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    path = tmp_path_factory.mktemp("samples") / "samples.npz"
    np.savez(path, np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8))
    return ImageNpz(path, "")


class TestReferencesOfOtherProjects:
    """Files of mu and sigma alone, as pytorch-fid and others publish them."""

    @pytest.fixture
    def few(self):
        network = InceptionNetwork(Few(), "0" * 64, torch.device("cpu"))
        network.widths = {POOL: 8, SPATIAL: 6}
        return network

    @pytest.fixture
    def network(self, model):
        return InceptionNetwork(model, "0" * 64, torch.device("cpu"))

    def test_mu_and_sigma_give_fid_and_the_rest_is_said_to_be_left_out(
        self, few, samples, tmp_path
    ):
        seen = feature_statistics(few, samples.batches(2)).gaussians[POOL]
        shifted = seen.mean.numpy() + np.eye(8)[0] * 3.0
        np.savez(tmp_path / "r.npz", mu=shifted, sigma=seen.covariance.numpy())

        reference = Reference(tmp_path / "r.npz", few, (16, 16))

        found = score(samples, reference)
        assert list(found) == ["fid", "inception_score"]
        assert found["fid"] == pytest.approx(9.0, rel=1e-3)
        assert say_left_out(reference) == (
            "left out: sfid (no mu_s and sigma_s in the reference), kid, precision and recall (no "
            "images (arr_0) in the reference)"
        )
        assert describe_reference(reference, 20)["reference"]["left_out"].keys() == {
            *("sfid", "kid", "precision", "recall")
        }

    @pytest.mark.parametrize(
        ("arrays", "sentence"),
        [
            (
                {"mu": np.zeros(64), "sigma": np.eye(64)},
                "its mu and sigma have shapes (64,) and (64, 64), features of inception-2015-12-05 "
                "2048 numbers; give a file that the same network made.",
            ),
            (
                {"mu": np.full(2048, np.nan), "sigma": np.eye(2048)},
                "its mu and sigma are no finite numbers; give another file.",
            ),
            (
                {"features_mu": np.zeros(64), "features_sigma": np.eye(64)},
                "holds no mu and sigma, the statistics of inception-2015-12-05, and 0 images, "
                "fewer than the 2,049 that a covariance takes; its features_mu and features_sigma "
                "are of another network; make one with training/reference_statistics.py.",
            ),
        ],
    )
    def test_statistics_of_another_network_are_refused(self, network, tmp_path, arrays, sentence):
        path = tmp_path / "r.npz"
        np.savez(path, **arrays)

        with pytest.raises(ConfigError) as error:
            Reference(path, network, (16, 16))

        assert str(error.value) == f"--reference {path}: {sentence}"
