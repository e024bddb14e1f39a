"""Combine the orders of several data sets and several streams into one.

Three rules, one inside the other, each a pure function of the stream position:

- Streams. A global batch of G is cut into C equal chunks. Chunk c takes the samples of part c of
  the data, which has epochs and windows of its own (stream/order.py). So a node that trains on some
  chunks needs only their parts on its disk.
- Mixture. Within a stream, each block of 1,000 positions holds exactly each set's weight in
  thousandths, dealt by a permutation of (seed, stream, block).
- Order. The n-th position of a set in a stream is the n-th of the order of that part of the set. So
  every set has its own exact epochs.

With one stream and one set this is that set's order.
"""

from collections.abc import Iterator
from itertools import count

import numpy as np

from data_tools.permutations import derived_seed, permutation
from data_tools.stream.order import StreamOrder

BLOCK = 1000  # positions that hold exactly the weights of a mixture
_SET, _MIXTURE = 5, 6  # keep what is drawn apart, from stream/order.py's kinds too


def micro_batches(
    *,
    start_position: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
) -> Iterator[int]:
    """List without end where the micro-batches of a rank start.

    Rank r of W takes the r-th contiguous slice of each global batch, so that it meets as few
    streams as there can be; its micro-steps are the pieces of that slice.
    """
    own = global_batch_size // world_size
    assert own * world_size == global_batch_size, "the ranks do not divide the global batch"
    assert own % micro_batch_size == 0, "not micro x ranks x accumulation"
    assert 0 <= rank < world_size, f"no rank {rank} of {world_size}"
    assert start_position >= 0 and start_position % global_batch_size == 0, "not between two steps"
    for step in count(start_position, global_batch_size):
        yield from range(step + rank * own, step + (rank + 1) * own, micro_batch_size)


class StreamPlan:
    """Which sample stands at which stream position of the whole job; used by one thread.

    Sample ids and shards count through the sets in their order.
    """

    def __init__(
        self,
        sets: list[list[int]],
        *,
        seed: int,
        window: int,
        global_batch_size: int,
        weights: tuple[int, ...] = (BLOCK,),
        num_streams: int = 1,
    ) -> None:
        """Prepare the plan.

        Args:
            sets: samples in each shard of each set.
            window: shards of a set and stream that are shuffled together.
            global_batch_size: samples per optimizer step over all ranks.
            weights: of the sets, in thousandths.
            num_streams: must divide the global batch; at most the samples of the smallest set.
        """
        assert len(weights) == len(sets) and sum(weights) == BLOCK and min(weights) > 0
        assert global_batch_size % num_streams == 0, "the streams do not divide the global batch"
        self.num_streams, self.global_batch_size = num_streams, global_batch_size
        self.weights, self._seed = np.array(weights), seed
        self._first_id = np.cumsum([0, *(sum(sizes) for sizes in sets)])
        self._first_shard = np.cumsum([0, *(len(sizes) for sizes in sets)])
        seeds = (
            [seed] if len(sets) == 1 else [derived_seed(seed, _SET, i) for i in range(len(sets))]
        )
        self._orders = [
            [
                StreamOrder(sizes, set_seed, window, stream, num_streams)
                for sizes, set_seed in zip(sets, seeds, strict=True)
            ]
            for stream in range(num_streams)
        ]
        self._block = (-1, -1)  # the stream and block that the cache below is of
        self._owners = np.empty(0, np.int64)

    def sample_ids(self, start: int, stop: int) -> np.ndarray:
        """Return the ids of the samples at positions [start, stop), int64 (stop - start,)."""
        assert 0 <= start <= stop, f"not a range of stream positions: [{start}, {stop})"
        ids, done = np.empty(stop - start, np.int64), 0
        for stream, first, length in self._in_streams(start, stop):
            chunk = ids[done : done + length]
            for number, position, places in self._in_sets(stream, first, length):
                order = self._orders[stream][number]
                found = order.sample_ids(position, position + len(places))
                chunk[places] = found + self._first_id[number]
            done += length
        return ids

    def windows(self, start: int, stop: int) -> list[tuple[list[int], list[int]]]:
        """List the shards that positions [start, stop) need, and those that will follow.

        Returns:
            for every stream and set met: the shards of the windows in use, and of the next one.
        """
        in_use: dict[tuple[int, int], dict[int, None]] = {}  # the inner ones are ordered sets
        following: dict[tuple[int, int], int] = {}
        for stream, first, length in self._in_streams(start, stop):
            for number, position, places in self._in_sets(stream, first, length):
                pair, last = (stream, number), position + len(places)
                while position < last:
                    shards, position = self._orders[stream][number].window_at(position)
                    shards = (shards + self._first_shard[number]).tolist()
                    in_use.setdefault(pair, {}).update(dict.fromkeys(shards))
                following[pair] = position
        found = []
        for (stream, number), position in following.items():
            ahead, _ = self._orders[stream][number].window_at(position)
            offset = self._first_shard[number]
            found.append((list(in_use[stream, number]), (ahead + offset).tolist()))
        return found

    def _in_streams(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Cut positions into runs: the stream, the first position in it, how many."""
        chunk = self.global_batch_size // self.num_streams
        if self.num_streams == 1:
            yield 0, start, stop - start
            return
        while start < stop:
            step, place = divmod(start, self.global_batch_size)
            stream, offset = divmod(place, chunk)
            length = min(stop - start, chunk - offset)
            yield stream, step * chunk + offset, length
            start += length

    def _in_sets(
        self, stream: int, first: int, length: int
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """Cut a run of a stream by sets: the set, the first position in it, places in the run."""
        if len(self.weights) == 1:
            yield 0, first, np.arange(length)
            return
        done = 0
        while done < length:
            block, slot = divmod(first + done, BLOCK)
            self._enter_block(stream, block)
            owners = self._owners[slot : slot + length - done]
            before = np.bincount(self._owners[:slot], minlength=len(self.weights))
            for number, weight in enumerate(self.weights.tolist()):
                places = np.flatnonzero(owners == number)
                if len(places):
                    yield number, block * weight + int(before[number]), done + places
            done += len(owners)

    def _enter_block(self, stream: int, block: int) -> None:
        if self._block == (stream, block):
            return
        dealt = permutation(BLOCK, self._seed, _MIXTURE, stream, block)
        self._owners = np.repeat(np.arange(len(self.weights)), self.weights)[dealt]
        self._block = (stream, block)
