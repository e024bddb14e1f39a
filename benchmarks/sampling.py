"""Measure sampling by precision, against a plain loop over the official way in fp32.

    python benchmarks/sampling.py                             # S/2, 4 images, guided, 5 DDIM steps
    python benchmarks/sampling.py --size demo --steps 2

Every side draws with classifier-free guidance from equal random weights. A step of the plain loop
is the official way's forward pass of both halves, one timestep for all, and DDIM's formula. The
sides take turns, so that other load meets all alike; the best of each counts.
"""

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from benchmarks.measure import describe_machine
from benchmarks.official_way import OfficialWay
from benchmarks.sides import OFFICIAL, config_of, random_model
from data_tools.errors import ArgumentParser, exit_on_config_error, refuse_below_one
from data_tools.process.entry_point import enter
from models.diffusion import Diffusion
from models.guidance import Guidance
from models.precision import cast_network
from models.randomness import Stream, normal
from models.sampler import respaced
from models.switch_dit import SwitchDiT
from training.sampling.latents import SamplerSettings, sample_latents

SCALE = 2.0  # of guidance


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="S", choices=("demo", "S", "B", "L", "XL"))
    parser.add_argument("--images", type=int, default=4, help="at a time; the network sees twice")
    parser.add_argument("--steps", type=int, default=5, help="of DDIM")
    parser.add_argument("--repeats", type=int, default=5, help="of each side")
    parser.add_argument("--threads", type=int, default=None, help="default: torch's")
    return parser.parse_args(argv)


def our_loop(
    model: SwitchDiT, diffusion: Diffusion, labels: Tensor, num_steps: int
) -> Callable[[], Tensor]:
    """Draw as training/sample.py does."""
    options = model.options
    settings = SamplerSettings("ddim", num_steps, 0, guidance=Guidance(SCALE))

    def draw() -> Tensor:
        return sample_latents(
            model,
            diffusion,
            settings,
            indices=torch.arange(len(labels)),
            labels=labels,
            latent_shape=(options.in_channels, *options.input_size),
            null_class=options.num_classes,
        )

    return draw


def official_loop(
    model: SwitchDiT, diffusion: Diffusion, labels: Tensor, num_steps: int
) -> Callable[[], Tensor]:
    """Draw as a plain loop does: both halves with their label, routed sample by sample."""
    network, options = OfficialWay(model), model.options
    chain, shape = respaced(diffusion, num_steps), (options.in_channels, *options.input_size)
    both = torch.cat((labels, torch.full_like(labels, options.num_classes)))

    @torch.no_grad()
    def draw() -> Tensor:
        x = normal(0, Stream.SAMPLE_START, torch.arange(len(labels)), math.prod(shape))
        x = x.view(-1, *shape)
        for i in reversed(range(num_steps)):
            t = chain.timesteps[i].expand(len(both))
            prediction = network(torch.cat((x, x)), t, both)[0][:, : options.in_channels]
            conditional, unconditional = prediction.chunk(2)
            noise = unconditional + SCALE * (conditional - unconditional)
            power, previous = chain.alphas_cumprod[i], chain.alphas_cumprod_prev[i]
            x_start = (x - (1 - power).sqrt() * noise) / power.sqrt()
            x = (previous.sqrt() * x_start + (1 - previous).sqrt() * noise).float()
        return x

    return draw


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    with exit_on_config_error():
        args = parse(argv)
        refuse_below_one(args, "images", "steps", "repeats", "threads")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    config = config_of(args.size)
    model = random_model(config, torch.device("cpu")).eval()
    process = config.diffusion
    diffusion = Diffusion(process.noise_schedule, process.num_timesteps)
    labels = torch.arange(args.images) % max(1, config.model.num_classes)
    fast = cast_network(copy.deepcopy(model), "bf16")
    sides = {
        OFFICIAL: official_loop(model, diffusion, labels, args.steps),
        "ours, fp32": our_loop(model, diffusion, labels, args.steps),
        "ours, bf16": our_loop(fast, diffusion, labels, args.steps),
    }
    best = dict.fromkeys(sides, math.inf)
    for repeat in range(args.repeats + 1):
        for name, draw in sides.items():
            started = time.perf_counter()
            draw()
            if repeat > 0:  # the first one warms up
                best[name] = min(best[name], time.perf_counter() - started)
    print(describe_machine(torch.device("cpu")))
    print(f"{args.size}, {args.images} images, guided, {args.steps} DDIM steps")
    print(f"{'side':<14} {'ms/step':>9} {'speed-up':>8}")
    for name, seconds in best.items():
        print(
            f"{name:<14} {1e3 * seconds / args.steps:>9.1f} {best[OFFICIAL] / seconds:>8.2f}",
            flush=True,
        )


if __name__ == "__main__":
    enter(main)
