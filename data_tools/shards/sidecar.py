"""Sidecars: 00012.json beside the shard 00012.tar, with sums over its samples.

Encoding adds them up as it writes a shard, verification as it reads one; both must come to the same
last digit, so that a lost sidecar can be written anew from its shard, byte for byte.

N samples, C latent channels, H W latent size.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from data_tools.files import FIRST
from data_tools.formats import Format
from data_tools.shards.manifest import ChannelStatistics, Shard
from models.latents import LOG_VARIANCE_MAX, LOG_VARIANCE_MIN


@dataclass
class ShardTotals:
    """Sums over a shard's samples from which the data set's statistics follow."""

    # Label in digits: samples.
    class_counts: dict[str, int] = field(default_factory=dict, metadata=FIRST)
    # Per channel, of posterior means and of mean^2 + variance.
    channel_sum: list[float] = field(default_factory=list, metadata=FIRST)
    channel_square_sum: list[float] = field(default_factory=list, metadata=FIRST)


@dataclass(frozen=True)
class Sidecar:
    """The content of the file; its presence means that the shard is complete."""

    shard: Shard
    totals: ShardTotals


SIDECAR = Format(newest=1, kind=Sidecar)


def add_samples(
    totals: ShardTotals, labels: list[int], arrays: np.ndarray, kind: str = "moments"
) -> None:
    """Add samples to the totals, one after another: how they are batched makes no difference.

    Args:
        totals: changed.
        labels: (N,).
        arrays: (N, 2C, H, W) mean | log-variance, or (N, C, H, W) draws; any float type.
        kind: "moments" or "latents", as the manifest says.
    """
    for label in map(str, labels):
        totals.class_counts[label] = totals.class_counts.get(label, 0) + 1
    # In C order: how an array lies in memory decides in which order numpy adds.
    values = arrays.astype(np.float64, order="C")
    if kind == "moments":
        mean, log_variance = np.split(values, 2, axis=1)
        variance = np.exp(log_variance.clip(LOG_VARIANCE_MIN, LOG_VARIANCE_MAX))
    else:
        mean, variance = values, 0.0
    sums, square_sums = mean.sum(axis=(2, 3)), (mean**2 + variance).sum(axis=(2, 3))  # (N, C)
    before = totals.channel_sum or [0.0] * mean.shape[1]
    square_before = totals.channel_square_sum or [0.0] * mean.shape[1]
    # cumsum adds in order, where sum would add in pairs.
    totals.channel_sum = np.cumsum(np.vstack([before, sums]), axis=0)[-1].tolist()
    totals.channel_square_sum = np.cumsum(np.vstack([square_before, square_sums]), axis=0)[
        -1
    ].tolist()


def label_counts(totals: Iterable[ShardTotals]) -> Counter[int]:
    """Count the samples of each label in all shards."""
    counts: Counter[int] = Counter()
    for part in totals:
        counts.update({int(label): count for label, count in part.class_counts.items()})
    return counts


def statistics_of(
    totals: list[ShardTotals], num_samples: int, num_positions: int
) -> ChannelStatistics:
    """Mean and standard deviation (C,) of posterior draws over all samples and positions.

    Args:
        totals: of all shards, in order.
        num_positions: H x W.
    """
    filled = [part for part in totals if part.channel_sum]
    count = num_samples * num_positions
    mean = np.sum([part.channel_sum for part in filled], axis=0) / count
    square = np.sum([part.channel_square_sum for part in filled], axis=0) / count
    std = np.sqrt(np.maximum(square - mean**2, 0.0))
    return ChannelStatistics(mean.round(6).tolist(), std.round(6).tolist())
