"""The two loops that benchmarks/sampling.py compares draw the same latents."""

import torch

from benchmarks.sampling import official_loop, our_loop
from benchmarks.sides import config_of, random_model
from models.diffusion import Diffusion


def test_the_plain_loop_draws_our_latents():
    model = random_model(config_of("demo"), torch.device("cpu")).eval()
    diffusion, labels = Diffusion("cosine", 1000), torch.tensor([0, 3])

    ours, plain = (
        loop(model, diffusion, labels, num_steps=3)() for loop in (our_loop, official_loop)
    )

    assert (ours - plain).norm() < 1e-3 * ours.norm()
