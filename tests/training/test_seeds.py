"""Each seed decides its own kind of chance, and nothing else."""

import pytest
import torch

from data_tools.stream.loader import Batch, BatchReader
from tests.support.configs import small
from tests.support.synthetic import data_of, make_dataset
from training.engine.build import build_model
from training.engine.objective import Objective

KINDS = ("init", "noise", "data")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return data_of(make_dataset(tmp_path_factory.mktemp("data"), [8, 8]))


def chance_of(data, **seeds):
    """What a run begins with, by the kind of chance."""
    config = small(num_classes=3, **seeds)
    noisy = Objective(config, 0, 0.5, 0.0, torch.device("cpu")).micro_batch(
        Batch(torch.zeros(4, 8, 16, 16), torch.zeros(4).long(), torch.arange(4))
    )
    reader = BatchReader(data, seed=config.run.seed_of("data"), window=2, global_batch_size=16)
    return {
        "init": build_model(config).x_embedder.proj.weight.detach(),
        "noise": torch.cat((noisy.noise.flatten(), noisy.t)),
        "data": reader.read(0, 16).raw_latents,
    }


def changed(data, **seeds):
    before, after = chance_of(data, seed=5), chance_of(data, **{"seed": 5} | seeds)
    return [kind for kind in KINDS if not torch.equal(before[kind], after[kind])]


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_of_its_own_changes_one_kind_of_chance(data, kind):
    assert changed(data, **{f"seed_{kind}": 6}) == [kind]
    assert changed(data, **{f"seed_{kind}": 5}) == []


def test_the_seed_is_that_of_all_that_have_none(data):
    assert changed(data, seed=6) == list(KINDS)
    assert changed(data, seed=6, seed_data=5, seed_init=5, seed_noise=5) == []
