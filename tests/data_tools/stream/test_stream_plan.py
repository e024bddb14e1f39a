"""Streams and mixtures: every sample once per epoch of its part, for any ranks and any resume."""

import numpy as np
import pytest

from data_tools.stream.order import ORDER_VERSION, StreamOrder
from data_tools.stream.plan import BLOCK, StreamPlan

NUM_TRIALS = 25
EXPECTED_OF_VERSION_1 = {
    "streams": [0, 10, 4, 7, 2, 1, 3, 5, 9, 8, 6, 11],
    "mixture": [6, 4, 5, 1, 2, 3, 4, 6, 3, 5, 0, 1],
}


def random_sets(rng, num_sets, least):
    """Uneven shards, some empty, at least `least` samples in each set."""
    sets = []
    for _ in range(num_sets):
        sizes = rng.integers(0, 30, rng.integers(1, 12)).tolist()
        sizes[rng.integers(len(sizes))] += least
        sets.append(sizes)
    return sets


def random_weights(rng, num_sets):
    cuts = np.sort(rng.choice(np.arange(1, BLOCK), num_sets - 1, replace=False))
    return tuple(np.diff([0, *cuts, BLOCK]).tolist())


class Case:
    """A job drawn at random from a number."""

    def __init__(self, number):
        rng = np.random.default_rng(number)
        self.rng = rng
        self.num_streams = int(rng.choice([1, 1, 2, 3, 4, 6]))
        self.chunk = int(rng.choice([4, 12, 24]))
        self.G = self.chunk * self.num_streams
        self.sets = random_sets(rng, int(rng.choice([1, 1, 2, 3])), self.num_streams)
        self.settings = {
            "seed": int(rng.integers(1 << 62)),
            "window": int(rng.integers(1, 8)),
            "global_batch_size": self.G,
            "num_streams": self.num_streams,
            "weights": random_weights(rng, len(self.sets)),
        }

    def plan(self):
        return StreamPlan(self.sets, **self.settings)

    def stream(self, ids, stream):
        """Keep what one stream holds of consecutive global batches."""
        return ids.reshape(-1, self.num_streams, self.chunk)[:, stream].ravel()


@pytest.mark.parametrize("number", range(NUM_TRIALS))
def test_each_sample_occurs_once_per_epoch_of_its_set_and_stream(number):
    case = Case(number)
    first = np.cumsum([0, *(sum(sizes) for sizes in case.sets)])
    plan = case.plan()
    longest = max(
        2 * sum(sizes) * BLOCK // weight
        for sizes, weight in zip(case.sets, case.settings["weights"], strict=True)
    )
    steps = min(longest // case.G + BLOCK // case.chunk + 2, 12_000 // case.G)
    ids = plan.sample_ids(0, steps * case.G)
    for low, high in zip(first[:-1], first[1:], strict=True):
        parts = []
        for stream in range(case.num_streams):
            own = case.stream(ids, stream)
            own = own[(own >= low) & (own < high)]
            number_of_samples = len(set(own.tolist()))
            parts.append(number_of_samples)
            for start in range(0, len(own) - number_of_samples + 1, number_of_samples):
                epoch = own[start : start + number_of_samples]
                assert len(set(epoch.tolist())) == number_of_samples, "repeats within an epoch"
        shares = {
            (c + 1) * (high - low) // case.num_streams - c * (high - low) // case.num_streams
            for c in range(case.num_streams)
        }
        if steps * case.G > longest:  # every part was read to its end
            assert sum(parts) == high - low, "a sample lies in no part, or in two"
            assert set(parts) <= shares, "parts differ by more than one sample"


@pytest.mark.parametrize("number", range(NUM_TRIALS))
def test_any_ranks_accumulation_and_resume_read_the_same_stream(number):
    case = Case(number)
    rng, G, num_steps = case.rng, case.G, 8
    expected = case.plan().sample_ids(0, num_steps * G)
    found = np.full(num_steps * G, -1)
    step = 0
    while step < num_steps:  # every turn is a job that is resumed with other ranks
        stop = min(num_steps, step + int(rng.integers(1, 6)))
        world_size = int(rng.choice([w for w in range(1, 13) if G % w == 0]))
        own = G // world_size
        micro = int(rng.choice([m for m in range(1, own + 1) if own % m == 0]))
        for rank in rng.permutation(world_size):
            plan = case.plan()
            for start in range(step * G, stop * G, G):
                for position in range(start + rank * own, start + (rank + 1) * own, micro):
                    ids = plan.sample_ids(position, position + micro)
                    found[position : position + micro] = ids
        step = stop
    np.testing.assert_array_equal(found, expected)


def test_blocks_of_a_mixture_hold_exactly_its_weights():
    sets, weights = [[50], [20, 7], [900]], (700, 299, 1)
    plan = StreamPlan(sets, seed=1, window=2, global_batch_size=100, weights=weights)
    owners = np.searchsorted([50, 77], plan.sample_ids(0, 5 * BLOCK), side="right")
    for block in owners.reshape(5, BLOCK):
        assert np.bincount(block, minlength=3).tolist() == list(weights)
    assert (owners[:BLOCK] != owners[BLOCK : 2 * BLOCK]).any(), "every block is dealt anew"


def test_one_set_in_one_stream_has_the_order_of_the_set():
    sizes = [13, 0, 40, 27, 5]
    plan = StreamPlan([sizes], seed=3, window=2, global_batch_size=10)
    expected = StreamOrder(sizes, 3, 2).sample_ids(0, 200)
    np.testing.assert_array_equal(plan.sample_ids(0, 200), expected)


def test_the_plan_never_changes_within_a_version():
    assert ORDER_VERSION == 1, "give the new version its own expected numbers"
    streams = StreamPlan([[3, 5, 4]], seed=1, window=2, global_batch_size=4, num_streams=2)
    mixture = StreamPlan([[3], [4]], seed=1, window=2, global_batch_size=4, weights=(400, 600))
    assert streams.sample_ids(0, 12).tolist() == EXPECTED_OF_VERSION_1["streams"]
    assert mixture.sample_ids(0, 12).tolist() == EXPECTED_OF_VERSION_1["mixture"]


@pytest.mark.parametrize("number", range(NUM_TRIALS))
def test_shards_are_announced_a_window_ahead(number):
    case = Case(number)
    plan, ahead = case.plan(), case.plan()
    shard_ends = np.cumsum([size for sizes in case.sets for size in sizes])
    announced = set()
    for start in range(0, 10 * case.G, case.G):
        ids = plan.sample_ids(start, start + case.G)
        needed = set(np.searchsorted(shard_ends, ids, side="right").tolist())
        pairs = ahead.windows(start, start + case.G)
        assert len(pairs) <= case.num_streams * len(case.sets)
        in_use = {shard for pair in pairs for shard in pair[0]}
        assert needed <= in_use
        if start > 0 and case.chunk < min(map(min, filter(any, case.sets))):
            assert in_use <= announced, "a window was not announced before it was in use"
        announced |= {shard for pair in pairs for shards in pair for shard in shards}
    ((in_use, ahead),) = ahead.windows(start, start + 1)
    assert max(len(in_use), len(ahead)) <= case.settings["window"]


def test_a_node_with_its_streams_reads_only_their_parts():
    sizes = [100] * 64
    plan = StreamPlan([sizes], seed=0, window=4, global_batch_size=64, num_streams=8)
    ids = plan.sample_ids(0, 40 * 6400).reshape(-1, 8, 8)
    for node in range(4):  # each trains two of the eight chunks
        shards = set((ids[:, 2 * node : 2 * node + 2] // 100).ravel().tolist())
        assert len(shards) <= 64 // 4 + 2
    for stream in range(8):
        assert len(set(ids[:, stream].ravel().tolist())) == 800


def test_a_far_position_of_large_sets_is_found_directly():
    sets = [[2048] * 625 + [1167], [1000] * 3000]
    plan = StreamPlan(
        sets, seed=0, window=16, global_batch_size=4096, weights=(800, 200), num_streams=8
    )
    ids = plan.sample_ids(10**12, 10**12 + 512)
    assert len(set(ids.tolist())) == 512
    assert ids.min() >= 0 and ids.max() < sum(map(sum, sets))
