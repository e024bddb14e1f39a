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
    """What the lengths of sums depend on.

    Attributes:
        depth: L.
        num_experts: E; 0 = a model without experts.
        num_timesteps: S.
        exchange: what expert parallelism sends; None without it.
    """

    depth: int
    num_experts: int
    num_timesteps: int
    exchange: ExchangeShape | None

    def ranges(self) -> list[str]:
        """Name the B ranges of timesteps."""
        ends = [round(b * self.num_timesteps / NUM_RANGES) for b in range(NUM_RANGES + 1)]
        return [f"{ends[b]:03d}-{ends[b + 1] - 1:03d}" for b in range(NUM_RANGES)]


class MicroStep(NamedTuple):
    """One micro-step of this rank, as sums are made of it; tensors are on the training's device.

    Attributes:
        shape: of the sums.
        num_samples: N.
        wait_sec: time this rank waited for the batch.
        is_finite: () float64, 1 if the loss is finite, else 0.
        terms: (4,) float64, LossTerms summed over the samples; 0 where the loss is not finite.
        mse: (N,) float64; 0 where the loss is not finite.
        t: (N,) int64 timesteps.
        timestep_range: (N,) int64, which of the B ranges each timestep lies in.
        plan: its routing; expert_index is (L, N, K) for this rank's samples; None without experts.
    """

    shape: SumShape
    num_samples: int
    wait_sec: float
    is_finite: Tensor
    terms: Tensor
    mse: Tensor
    t: Tensor
    timestep_range: Tensor
    plan: RoutingPlan | None


class Totals(NamedTuple):
    """An interval over all ranks, as sums are described by it.

    Attributes:
        shape: of the sums.
        num_finite: samples of the micro-steps whose loss is finite.
        rank_sec: seconds of the interval, added up over ranks.
        num_steps: optimizer steps.
        num_ranks: of the job.
    """

    shape: SumShape
    num_finite: float
    rank_sec: float
    num_steps: int
    num_ranks: int


@dataclass(frozen=True, eq=False)
class Sum:
    """A float64 vector that is added up over micro-steps and ranks.

    A vector on the device leaves out micro-steps whose loss is not finite, which changed nothing,
    and is described only if there were others. Adding to it must not wait for the device.

    Attributes:
        add: adds a micro-step to the vector, in place.
        describe: returns the metric's value, of the vector on the host; or the values of all
            metrics that name this sum, by their tags.
        size: length of the vector; 0 = there is nothing to sum.
        is_on_host: whether the numbers are the host's.
    """

    add: Callable[[Tensor, MicroStep], object]
    describe: Callable[[Tensor, Totals], float | dict[str, float]]
    size: Callable[[SumShape], int] = lambda _: 1
    is_on_host: bool = False


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


class Condition(NamedTuple):
    """Which runs have a metric."""

    text: str  # completes "only with ..."
    holds: Callable[[RunTraits], bool]


class Group(NamedTuple):
    """Charts that are shown together."""

    title: str
    only_with: Condition | None = None


class Curve(NamedTuple):
    """A metric's chart in a report."""

    title: str
    text: str  # what a person should look for
    is_log: bool = False


@dataclass(frozen=True)
class Metric:
    """One number over steps, or a family of them.

    Attributes:
        tag: its name in TensorBoard and metrics.jsonl; {braces} stand for what differs in a family.
        group: of charts on TensorBoard's page "custom scalars", and of rows in the documents.
        meaning: for the documents, with its unit; a sentence without its full stop.
        chart: title of the chart that shows it, perhaps with others; "{block}" makes one for each
            block; None = no chart.
        sum: what it is computed from, if it is summed over ranks.
        curve: its chart in a report; None = it has none.
        only_with: which runs have it, of those that have the group; None = all.
    """

    tag: str
    group: Group
    meaning: str
    chart: str | None = None
    sum: Sum | None = None
    curve: Curve | None = None
    only_with: Condition | None = None

    @property
    def conditions(self) -> list[Condition]:
        """What a run must have to have this metric."""
        return [one for one in (self.group.only_with, self.only_with) if one is not None]
