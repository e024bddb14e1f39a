"""Draw the experts, samples and gates on which expert-parallel layers are compared.

N samples of a rank, T tokens, D width, L layers, E experts, K experts per sample, S timesteps, R
ranks of the group, G = R * N.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from models.prior import diffusion_prior

NUM_TIMESTEPS = 1000
CHOSEN_LOGIT, LOGIT_NOISE = 4.0, 0.5
ROUTINGS = ("prior", "even")


class Sizes(NamedTuple):
    """What both sides are built with."""

    batch_size: int  # N
    num_tokens: int
    width: int
    depth: int
    num_experts: int
    top_k: int
    kind: str  # "affine" or "mlp"
    hidden_ratio: float


class Problem(NamedTuple):
    """What both sides compute with; equal on all ranks but for x and gradient."""

    gate_logits: Tensor  # (L, S, E) float32, a leaf
    group_t: Tensor  # (G,) int64
    experts: list[Tensor]  # weights and biases, each (L, E, ...), weights (..., in, out)
    x: Tensor  # (N, T, D) of this rank, a leaf
    gradient: Tensor  # (N, T, D) of the loss with respect to the last layer's output


class Side(NamedTuple):
    """One way to compute the layers.

    Attributes:
        name: for the table.
        forward: x -> the stream behind the last layer.
        expert_gradients: of this rank's experts, each (L, E / R, ...).
        clear: forgets all gradients of experts.
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    expert_gradients: Callable[[], list[Tensor]]
    clear: Callable[[], None]


def make_problem(
    sizes: Sizes, routing: str, rank: int, world_size: int, device: torch.device
) -> Problem:
    """Draw experts, samples and gates.

    Args:
        sizes: of the layers.
        routing: "prior" = gates that follow the diffusion prior of one block, its experts in a
            random order per layer, as matching leaves them; "even" = gates without a pattern.
        rank: of this process.
        world_size: R.
        device: of everything.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    L, E, D = sizes.depth, sizes.num_experts, sizes.width
    logits = LOGIT_NOISE * draw(L, NUM_TIMESTEPS, E)
    if routing == "prior":
        window = diffusion_prior(NUM_TIMESTEPS, 1, E, sizes.top_k)  # (S, E) 0/1
        order = torch.stack([torch.randperm(E, generator=generator) for _ in range(L)])
        logits += CHOSEN_LOGIT * window[:, order].transpose(0, 1)
    group_t = torch.randint(NUM_TIMESTEPS, (world_size * sizes.batch_size,), generator=generator)
    H = int(sizes.hidden_ratio * D)
    shapes = [(D, D), (D,)] if sizes.kind == "affine" else [(D, H), (H,), (H, D), (D,)]
    experts = [draw(L, E, *shape) * shape[0] ** -0.5 for shape in shapes]
    generator.manual_seed(1 + rank)
    x, gradient = (draw(sizes.batch_size, sizes.num_tokens, D) for _ in range(2))
    return Problem(
        logits.to(device).requires_grad_(),
        group_t.to(device),
        [values.to(device) for values in experts],
        x.to(device).requires_grad_(),
        gradient.to(device),
    )


def held_experts(sizes: Sizes, rank: int, world_size: int) -> slice:
    """Return which experts a rank holds."""
    num_local = sizes.num_experts // world_size
    return slice(rank * num_local, (rank + 1) * num_local)
