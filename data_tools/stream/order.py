"""The order in which training sees samples: a pure function of the stream position.

The stream is endless: position g lies in epoch g // N at place g % N. In every epoch the shards are
permuted; each run of `window` consecutive shards forms a window, and the samples of a window are
permuted together. So every sample occurs exactly once per epoch whatever the shards' sizes, only
`window` shards are in use at a time, any position is found without walking to it, and the state of
a job is one integer.

For several streams the data is cut into equal parts, each with such an order of its own. What is
cut is the row of shards in a seeded order, and a cut may fall inside a shard.
"""

import numpy as np

from data_tools.permutations import derived_seed, permutation

ORDER_VERSION = 1  # part of what a checkpoint means: any change of the order needs a new number

_SHARDS, _WINDOW, _SPLIT, _PART = 1, 2, 3, 4  # keep what is drawn apart


class StreamOrder:
    """Which sample stands at which stream position.

    A sample id counts samples through the shards in the manifest's order. One object is used by
    one thread: the current epoch and window are cached.
    """

    def __init__(
        self, shard_sizes: list[int], seed: int, window: int, part: int = 0, num_parts: int = 1
    ) -> None:
        """Prepare the order.

        Args:
            shard_sizes: samples in each shard; a shard may be empty.
            window: shards whose samples are shuffled together.
            part: which of the equal parts (up to one sample) of the data this is the order of.
            num_parts: how many there are; at most one per sample.
        """
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.first_id = np.concatenate(([0], np.cumsum(self.sizes)))[:-1]
        self.shards = np.arange(len(self.sizes))  # of the pieces that sizes and first_id are of
        self.seed, self.window = seed, window
        if num_parts > 1:
            self._keep_part(part, num_parts)
            self.seed = derived_seed(seed, _PART, part)
        self.num_samples = int(self.sizes.sum())  # of this part
        assert self.num_samples > 0 and window > 0, "an order needs samples and a positive window"
        self._known_windows: list[tuple[int, int, np.ndarray]] = []  # the last two asked for
        self._epoch = self._window = -1  # what the caches below hold
        self._pieces = self._window_ids = self._window_starts = np.empty(0, np.int64)

    def _keep_part(self, part: int, num_parts: int) -> None:
        """Cut the data, its shards in a seeded order, and keep a part's pieces of shards."""
        dealt = permutation(len(self.sizes), self.seed, _SPLIT)
        ends = np.cumsum(self.sizes[dealt])
        starts, num_samples = ends - self.sizes[dealt], int(self.sizes.sum())
        low, high = part * num_samples // num_parts, (part + 1) * num_samples // num_parts
        kept = dealt[(ends > low) & (starts < high) & (ends > starts)]
        starts_of = np.empty_like(starts)
        starts_of[dealt] = starts
        self.shards = np.sort(kept)
        starts, sizes = starts_of[self.shards], self.sizes[self.shards]
        first, last = np.maximum(starts, low), np.minimum(starts + sizes, high)
        self.first_id, self.sizes = self.first_id[self.shards] + first - starts, last - first

    def sample_ids(self, start: int, stop: int) -> np.ndarray:
        """Return the ids of the samples at positions [start, stop), int64 (stop - start,)."""
        assert 0 <= start <= stop, f"not a range of stream positions: [{start}, {stop})"
        parts = [np.empty(0, np.int64)]
        while start < stop:
            window, offset = self._find(start)
            self._enter_window(window)
            parts.append(self._window_ids[offset : offset + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts)

    def window_at(self, position: int) -> tuple[np.ndarray, int]:
        """Return the shards of the window that holds a position, and where the next one starts."""
        for start, stop, shards in self._known_windows:
            if start <= position < stop:
                return shards, stop
        window, offset = self._find(position)
        pieces = self._window_pieces(window)
        start = position - offset
        known = (start, start + int(self.sizes[pieces].sum()), self.shards[pieces])
        self._known_windows = [*self._known_windows[-1:], known]
        return known[2], known[1]

    def _find(self, position: int) -> tuple[int, int]:
        """Enter the epoch of a position; return the window that holds it and its place there."""
        epoch, place = divmod(position, self.num_samples)
        self._enter_epoch(epoch)
        window = int(np.searchsorted(self._window_starts, place, side="right")) - 1
        return window, place - int(self._window_starts[window])

    def _enter_epoch(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        self._pieces = permutation(len(self.sizes), self.seed, _SHARDS, epoch)
        window_of = np.arange(len(self.sizes)) // self.window
        window_sizes = np.zeros(window_of[-1] + 1, np.int64)
        np.add.at(window_sizes, window_of, self.sizes[self._pieces])
        self._window_starts = np.concatenate(([0], np.cumsum(window_sizes)[:-1]))
        self._epoch, self._window = epoch, -1

    def _window_pieces(self, window: int) -> np.ndarray:
        return self._pieces[window * self.window : (window + 1) * self.window]

    def _enter_window(self, window: int) -> None:
        if window == self._window:
            return
        ids = np.concatenate(
            [
                np.arange(self.first_id[piece], self.first_id[piece] + self.sizes[piece])
                for piece in self._window_pieces(window)
            ]
        )
        self._window_ids = ids[permutation(len(ids), self.seed, _WINDOW, self._epoch, window)]
        self._window = window
