"""The sums over ranks that a training run keeps, and the metrics that each of them yields.

L blocks, E experts, K experts per sample, B ranges of timesteps.
"""

from torch import Tensor

from models.diffusion import LossTerms
from training.monitoring.expert_load import (
    add_exchanges,
    entropy_by_timestep,
    exchange_metrics,
    load_metrics,
)
from training.monitoring.metric import NUM_RANGES, MicroStep, Sum, SumShape, Totals

LOSS_TERMS = Sum(
    add=lambda place, micro: place.add_(micro.terms),
    describe=lambda place, totals: {
        f"loss/{name}": float(value) / totals.num_finite
        for name, value in zip(LossTerms._fields, place, strict=True)
    },
    size=lambda _: len(LossTerms._fields),
)


def _add_errors(place: Tensor, micro: MicroStep) -> None:
    place[:NUM_RANGES].index_add_(0, micro.timestep_range, micro.mse)
    place[NUM_RANGES:].index_add_(
        0, micro.timestep_range, micro.is_finite.expand(micro.num_samples)
    )


def _mean_errors(place: Tensor, totals: Totals) -> dict[str, float]:
    """Return the mean of each range of timesteps; one that drew no sample is left out."""
    ranges = zip(totals.shape.ranges(), *place.view(2, NUM_RANGES), strict=True)
    return {f"mse_by_timestep/{name}": float(e / n) for name, e, n in ranges if n > 0}


def _add_served(place: Tensor, micro: MicroStep) -> None:
    # Flat per block, expert by expert, so that one scatter counts both.
    places = micro.plan.expert_index * NUM_RANGES + micro.timestep_range[:, None]  # (L, N, K)
    places = places.flatten(1)
    served = place.view(micro.shape.depth, -1)
    served.scatter_add_(1, places, micro.is_finite.expand(places.shape))


def expert_count(place: Tensor, shape: SumShape) -> Tensor:
    """View SERVED as (L, E, B) samples of each block, expert and range of timesteps."""
    return place.view(shape.depth, shape.num_experts, NUM_RANGES)


def _describe_served(place: Tensor, totals: Totals) -> dict[str, float]:
    count = expert_count(place, totals.shape)
    by_timestep = entropy_by_timestep(count, totals.shape.ranges())
    return load_metrics(count.sum(dim=2), totals.num_finite) | by_timestep


ERRORS = Sum(_add_errors, _mean_errors, lambda _: 2 * NUM_RANGES)
SERVED = Sum(
    _add_served, _describe_served, lambda shape: shape.depth * shape.num_experts * NUM_RANGES
)
EXCHANGES = Sum(
    add=lambda place, micro: add_exchanges(
        place, micro.plan, micro.num_samples, micro.shape.exchange
    ),
    describe=lambda place, totals: exchange_metrics(
        place, totals.shape.exchange, totals.num_steps, totals.num_ranks
    ),
    size=lambda shape: shape.depth * shape.exchange.group_size + 2 if shape.exchange else 0,
    is_on_host=True,
)
SAMPLES = Sum(
    add=lambda place, micro: place.add_(micro.num_samples),
    describe=lambda place, totals: float(place) / (totals.rank_sec / totals.num_ranks),
    is_on_host=True,
)
WAITING = Sum(
    add=lambda place, micro: place.add_(micro.wait_sec),
    describe=lambda place, totals: 100.0 * float(place) / totals.rank_sec,
    is_on_host=True,
)
