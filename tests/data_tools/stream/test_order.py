"""The order of samples: exactly once per epoch, a function of the position alone."""

import numpy as np
import pytest

from data_tools.permutations import permutation
from data_tools.stream.order import ORDER_VERSION, StreamOrder

MASK = (1 << 64) - 1
EXPECTED_OF_VERSION_1 = [4, 6, 8, 10, 7, 5, 9, 11, 3, 0, 2, 1]


def mix(value: int) -> int:
    """The finaliser of splitmix64 in Python's integers."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def slow_permutation(length: int, *key: int) -> list[int]:
    state = 0
    for number in key:
        state = mix(state ^ (number & MASK))
    return sorted(range(length), key=lambda i: mix(mix(i) ^ state))


def slow_epoch(shard_sizes, seed, window, epoch):
    """The whole order of one epoch, straight from the definition."""
    first = np.cumsum([0, *shard_sizes])
    shards = slow_permutation(len(shard_sizes), seed, 1, epoch)
    ids = []
    for number, start in enumerate(range(0, len(shards), window)):
        members = [i for s in shards[start : start + window] for i in range(first[s], first[s + 1])]
        ids += [members[i] for i in slow_permutation(len(members), seed, 2, epoch, number)]
    return ids


SETS = [
    ([5], 1),
    ([7, 3, 0, 9, 1], 2),
    ([4, 4, 4, 4], 16),
    ([1, 1, 1, 1, 1, 1], 1),
    ([13, 40, 27, 5, 31, 8, 22], 3),
]


@pytest.mark.parametrize(("shard_sizes", "window"), SETS)
def test_every_sample_occurs_exactly_once_in_every_epoch(shard_sizes, window):
    order = StreamOrder(shard_sizes, seed=7, window=window)
    N = sum(shard_sizes)
    for epoch in (0, 1, 2, 1000):
        ids = order.sample_ids(epoch * N, (epoch + 1) * N)
        assert sorted(ids.tolist()) == list(range(N))


@pytest.mark.parametrize(("shard_sizes", "window"), SETS)
@pytest.mark.parametrize("seed", [0, 123456789, -1])
def test_the_order_equals_its_definition(shard_sizes, window, seed):
    order = StreamOrder(shard_sizes, seed, window)
    N = sum(shard_sizes)
    expected = slow_epoch(shard_sizes, seed, window, 0) + slow_epoch(shard_sizes, seed, window, 1)
    assert order.sample_ids(0, 2 * N).tolist() == expected


def test_the_order_never_changes_within_a_version():
    assert ORDER_VERSION == 1, "give the new version its own expected numbers"
    ids = StreamOrder([3, 5, 4], seed=1, window=2).sample_ids(0, 12)
    assert ids.tolist() == EXPECTED_OF_VERSION_1


def test_ids_depend_on_the_position_and_not_on_how_they_are_asked_for():
    shard_sizes, N = [13, 40, 27, 5, 31, 8, 22], 146
    expected = StreamOrder(shard_sizes, seed=3, window=3).sample_ids(0, 4 * N)
    order = StreamOrder(shard_sizes, seed=3, window=3)
    for start, stop in [(0, 1), (N - 1, N + 1), (50, 3 * N), (5, 5), (2 * N, 2 * N + 9), (1, 4)]:
        np.testing.assert_array_equal(order.sample_ids(start, stop), expected[start:stop])


def test_epochs_and_seeds_have_different_orders():
    N = 100
    order = StreamOrder([25] * 4, seed=0, window=2)
    first, second = order.sample_ids(0, N), order.sample_ids(N, 2 * N)
    other_seed = StreamOrder([25] * 4, seed=1, window=2).sample_ids(0, N)
    assert (first != second).mean() > 0.8
    assert (first != other_seed).mean() > 0.8


def test_a_window_takes_its_samples_from_few_shards():
    order = StreamOrder([10] * 12, seed=5, window=3)
    for window in range(4):
        ids = order.sample_ids(window * 30, (window + 1) * 30)
        assert len(set((ids // 10).tolist())) == 3


def test_a_permutation_is_uniform_enough():
    places = np.zeros((6, 6))
    for key in range(6000):
        places[np.arange(6), permutation(6, key)] += 1
    # Chi-squared with 25 degrees of freedom: 60 is exceeded with probability 1e-4.
    assert ((places - 1000) ** 2 / 1000).sum() < 60


def test_a_far_epoch_of_a_large_set_is_found_directly():
    shard_sizes = [2048] * 625 + [1167]
    order = StreamOrder(shard_sizes, seed=0, window=16)
    position = 10**9 * order.num_samples + 900_000
    ids = order.sample_ids(position, position + 256)
    assert len(set(ids.tolist())) == 256
    assert ids.min() >= 0 and ids.max() < order.num_samples
