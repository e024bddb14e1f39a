"""What the registry of metrics (metrics.py) says of each number, and what its sums are made of.

N samples, L blocks, E experts, B ranges of timesteps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from models.gate import RoutingPlan
from training.config.tree import Config
from training.monitoring.expert_load import ExchangeShape

NUM_RANGES = 10  # B


class SumShape(NamedTuple):
    """What the lengths of sums depend on."""

    depth: int  # L
    num_experts: int  # E; 0 = a model without experts
    num_timesteps: int  # S
    exchange: ExchangeShape | None  # what expert parallelism sends; None without it

    def ranges(self) -> list[str]:
        """Name the B ranges of timesteps."""
        ends = [round(b * self.num_timesteps / NUM_RANGES) for b in range(NUM_RANGES + 1)]
        return [f"{ends[b]:03d}-{ends[b + 1] - 1:03d}" for b in range(NUM_RANGES)]


class MicroStep(NamedTuple):
    """One micro-step of this rank, as sums are made of it; tensors are on the training's device."""

    shape: SumShape  # of the sums
    num_samples: int  # N
    wait_sec: float  # time this rank waited for the batch
    is_finite: Tensor  # () float64, 1 if the loss is finite, else 0
    terms: Tensor  # (4,) float64, LossTerms summed over the samples; 0 where not finite
    mse: Tensor  # (N,) float64; 0 where the loss is not finite
    t: Tensor  # (N,) int64 timesteps
    timestep_range: Tensor  # (N,) int64, which of the B ranges each timestep lies in
    plan: RoutingPlan | None  # expert_index is (L, N, K) of this rank's samples; None: no experts


class Totals(NamedTuple):
    """An interval over all ranks, as sums are described by it."""

    shape: SumShape  # of the sums
    num_finite: float  # samples of the micro-steps whose loss is finite
    rank_sec: float  # seconds of the interval, added up over ranks
    num_steps: int  # optimizer steps
    num_ranks: int  # of the job


@dataclass(frozen=True, eq=False)
class Sum:
    """A float64 vector that is added up over micro-steps and ranks.

    A vector on the device leaves out micro-steps whose loss is not finite, which changed nothing,
    and is described only if there were others. Adding to it must not wait for the device.
    """

    add: Callable[[Tensor, MicroStep], object]  # a micro-step to the vector, in place
    # The metric's value, of the vector on the host; or the values of all metrics that name this
    # sum, by their tags.
    describe: Callable[[Tensor, Totals], float | dict[str, float]]
    size: Callable[[SumShape], int] = lambda _: 1  # of the vector; 0 = there is nothing to sum
    is_on_host: bool = False  # whether the numbers are the host's


def mean_over_samples(amount: Callable[[MicroStep], Tensor]) -> Sum:
    """Sum a number that is a sum over a micro-step's samples, and divide it by all samples.

    Both leave out micro-steps whose loss is not finite. The number must be finite there, too.
    """
    return Sum(
        lambda place, micro: place.addcmul_(amount(micro), micro.is_finite),
        lambda place, totals: float(place) / totals.num_finite,
    )


class RunTraits(NamedTuple):
    """What decides which metrics a run has."""

    config: Config
    num_experts: int  # of a block
    num_ranks: int
    has_peak: bool  # whether the device's peak speed is known

    def meets(self, condition: "Condition | None") -> bool:
        """Tell whether a run has what is only with a condition."""
        return condition is None or condition.holds(self)


class Condition(NamedTuple):
    """Which runs have a metric."""

    text: str  # completes "only with ..."
    holds: Callable[[RunTraits], bool]


class Curve(NamedTuple):
    """A metric's chart in a report."""

    title: str
    text: str  # what a person should look for
    is_log: bool = False


@dataclass(frozen=True)
class Metric:
    """One number over steps, or a family of them."""

    tag: str  # in TensorBoard and metrics.jsonl; {braces} stand for what differs in a family
    meaning: str  # for the documents, with its unit; a sentence without its full stop
    # Title of the chart that shows it, perhaps with others; "{block}" makes one for each block.
    chart: str | None = None
    sum: Sum | None = None  # what it is computed from, if it is summed over ranks
    curve: Curve | None = None  # its chart in a report
    only_with: Condition | None = None  # which runs have it, of those that have the group


class Group:
    """Charts that TensorBoard's page "custom scalars" shows together, and rows in the documents."""

    def __init__(self, title: str, *metrics: Metric, only_with: Condition | None = None) -> None:
        self.title, self.metrics, self.only_with = title, metrics, only_with
