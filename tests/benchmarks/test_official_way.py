"""The official way of benchmarks/ computes what our step does, or comparing them is pointless."""

import dataclasses
from dataclasses import replace

import pytest
import torch

from benchmarks.measure import HostReads, counted_flops
from benchmarks.official_way import match_by_differences
from benchmarks.sides import config_of, make_batch, official_side, our_side
from models.flops import training_flops
from models.prior import diffusion_prior
from models.unit_matching import match_units
from training.config.network import network_options

BATCH_SIZE = 6


@pytest.fixture(scope="module")
def sides():
    config = config_of("demo")
    model = dataclasses.replace(config.model, num_experts=4, top_k=2, latent_size=8)
    config = dataclasses.replace(config, model=model)
    batch = make_batch(config, BATCH_SIZE, torch.device("cpu"))
    return config, [make(config, batch, torch.float32) for make in (our_side, official_side)]


def test_loss_and_gradients_are_equal(sides):
    losses, gradients = [], []

    for side in sides[1]:
        side.model.zero_grad()
        loss = side.loss(3)
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad for p in side.model.parameters()])

    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for ours, official in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, official, rtol=1e-4, atol=1e-4 * official.abs().max())


def test_flops_of_a_step_equal_the_closed_form(sides):
    config, (ours, official) = sides
    network = network_options(config)
    matching = 2 * network.num_timesteps * (network.depth * network.num_experts) ** 2

    assert counted_flops(lambda: ours.step(0)) == training_flops(network, BATCH_SIZE) + matching
    dispatched = replace(network, expert_dispatch="dispatched")
    # Routing once more for the samples alone, on top of the closed form.
    assert counted_flops(lambda: official.step(0)) == pytest.approx(
        training_flops(dispatched, BATCH_SIZE), rel=0.01
    )


def test_our_step_reads_from_the_device_once_and_the_official_way_in_every_block(sides):
    config, (ours, official) = sides
    counts = []

    for side in (ours, official):
        with HostReads() as reads:
            side.loss(0).backward()
        counts.append(reads.counts)

    assert counts[0] == {"cpu": 1}
    depth = network_options(config).depth
    assert counts[1] == {"cpu": 1, "bincount": depth, "tolist": depth}


@pytest.mark.parametrize("seed", range(3))
def test_matching_through_differences_gives_the_same_assignment(seed):
    prior = diffusion_prior(50, 3, 4, 2)
    table = torch.rand(3, 50, 4, generator=torch.Generator().manual_seed(seed)).softmax(-1)

    assert torch.equal(
        match_by_differences(table, 2, prior, seed), match_units(table, 2, prior, seed)
    )
