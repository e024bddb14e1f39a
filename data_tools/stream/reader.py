"""Read any samples of the data sets that a run trains on, by their ids.

A sample is read by one preadv where all that is needed of it lies together, by two otherwise; its
headers are checked and its label parsed for a whole batch at once.
"""

import os
import resource
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import lru_cache, partial

import numpy as np
import torch

from data_tools.errors import ConfigError
from data_tools.shards.records import DamagedRecordError
from data_tools.stream.shard_store import ShardStore, numbered
from data_tools.stream.training_data import DataPart, TrainingData

NUM_INDEXES = 256  # of tars of others that are kept in memory, 24 bytes a sample
_SPARE_DESCRIPTORS = 256  # of the process for everything else


class SampleReader:
    """Reads samples by their ids; used by one thread."""

    def __init__(
        self,
        data: TrainingData,
        stores: list[ShardStore],
        open_shard: Callable[[int], int] | None = None,
        num_open_shards: int = 16,
    ) -> None:
        """Prepare; files are opened when first needed.

        Args:
            stores: of its parts.
            open_shard: returns a descriptor of the n-th shard of all; None = the stores' own.
            num_open_shards: that samples are drawn from at a time; as many may be open at least
                if the system allows it.
        """
        first_id = np.concatenate(([0], np.cumsum(data.shard_sizes)))
        counts = [len(part.manifest.shards) for part in data.parts]
        first_shard = np.cumsum([0, *counts])[:-1]
        self._first_part_id = first_id[first_shard]
        self._shards, self._open_shard = numbered(stores), open_shard or self._open_in_store
        self.num_open_shards = _allowed_descriptors(num_open_shards)
        self._last_shard = -1  # that was asked for
        # Descriptors by shard, the least recently used first.
        self.opened: OrderedDict[int, int] = OrderedDict()
        self._parts = [
            PartReader(part, store, partial(self._descriptor, first))
            for part, store, first in zip(data.parts, stores, first_shard.tolist(), strict=True)
        ]

    def read(self, ids: np.ndarray, use_flip: np.ndarray, out: torch.Tensor) -> np.ndarray:
        """Read samples.

        Args:
            ids: int64 (N,).
            use_flip: bool (N,), read the mirrored image's array.
            out: (N, *shape) of the data's dtype, contiguous, filled.

        Returns:
            classes, int64 (N,).
        """
        arrays = out.numpy().reshape(len(ids), -1).view(np.uint8)  # the same memory as `out`
        if len(self._parts) == 1:
            return self._parts[0].read(ids, use_flip, arrays, np.arange(len(ids)))
        classes = np.empty(len(ids), np.int64)
        parts = np.searchsorted(self._first_part_id, ids, side="right") - 1
        for part in np.unique(parts).tolist():
            places = np.flatnonzero(parts == part)
            own = ids[places] - self._first_part_id[part]
            classes[places] = self._parts[part].read(own, use_flip[places], arrays, places)
        return classes

    def keep(self, shards: Iterable[int]) -> None:
        """Close all other shards: an open file cannot be evicted from a cache."""
        for shard in self.opened.keys() - set(shards):
            os.close(self.opened.pop(shard))

    def close(self) -> None:
        """Close all files."""
        while self.opened:
            os.close(self.opened.popitem()[1])

    def _descriptor(self, first: int, shard: int) -> int:
        """Return the descriptor of a shard of the part whose first shard is `first`."""
        shard = self._last_shard = shard + first
        descriptor = self.opened.get(shard)
        if descriptor is None:
            descriptor = self.opened[shard] = self._open_shard(shard)
            if len(self.opened) > self.num_open_shards:
                os.close(self.opened.popitem(last=False)[1])
        self.opened.move_to_end(shard)
        return descriptor

    def _open_in_store(self, shard: int) -> int:
        store, own = self._shards[shard]
        return store.open(own)

    def describe_last(self) -> str:
        """Name the shard that was asked for last; empty before the first. Any thread may ask."""
        if self._last_shard < 0:
            return ""
        store, own = self._shards[self._last_shard]
        return store.describe(own)


def _allowed_descriptors(wanted: int) -> int:
    """Return how many files a reader may hold open, after asking for more where that helps."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 3 * wanted + _SPARE_DESCRIPTORS  # a store holds two windows' shards as well
    if soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, (soft - _SPARE_DESCRIPTORS) // 3)


class PartReader:
    """Reads the samples of one data set by their ids in it."""

    def __init__(
        self, part: DataPart, store: ShardStore, descriptor_of: Callable[[int], int]
    ) -> None:
        """Prepare; `descriptor_of` returns that of the n-th shard of the data set."""
        manifest = part.manifest
        self.part, self.store, self._descriptor_of = part, store, descriptor_of
        sizes = [shard.num_samples for shard in manifest.shards]
        self.first_id = np.concatenate(([0], np.cumsum(sizes)))
        self.is_indexed = manifest.is_indexed
        latent = manifest.latent
        self.layout = latent.indexed_layout if self.is_indexed else latent.record_layout
        self._index_of = lru_cache(NUM_INDEXES)(store.open_index)
        self._heads = np.empty((0, self.layout.head_bytes), np.uint8)
        self._head_views: list[memoryview] = []

    def read(
        self, ids: np.ndarray, use_flip: np.ndarray, arrays: np.ndarray, places: np.ndarray
    ) -> np.ndarray:
        """Read the i-th of `ids` (N,) into row places[i] of `arrays`; return classes (N,)."""
        order = np.argsort(ids, kind="stable")  # as they lie on the disk
        ids, use_flip = ids[order], use_flip[order]
        shards = np.searchsorted(self.first_id, ids, side="right") - 1
        rows = ids - self.first_id[shards]
        row_list, flip_list = rows.tolist(), use_flip.tolist()
        heads, head_views = self._heads_for(len(ids))
        flat, size = memoryview(arrays.reshape(-1)), self.layout.array_bytes
        views = [flat[place * size : (place + 1) * size] for place in places[order].tolist()]
        labels = np.empty(len(ids), np.int64)
        cuts = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(ids)]
        for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
            shard, these = int(shards[start]), slice(start, stop)
            try:
                descriptor = self._descriptor_of(shard)
                if not self.is_indexed:
                    asked = row_list[these], flip_list[these]
                else:
                    index = self._index_of(shard)[rows[these]]
                    labels[these] = index[:, 2]
                    asked = (np.where(use_flip[these], index[:, 1], index[:, 0]),)
                self.layout.read_rows(descriptor, *asked, head_views[these], views[these])
            except DamagedRecordError as err:
                raise self.store.problem(shard, str(err)) from err
            except OSError as err:
                what = f"cannot be read ({err.strerror})"
                raise self.store.problem(shard, what) from err
        try:
            labels = self._check(heads, use_flip, labels)
        except DamagedRecordError:
            raise self._find_damage(shards, heads, use_flip, labels) from None
        # On a GPU a label beyond the embedding table ends the process without naming anything.
        num_labels = len(self.part.class_of_label)
        for i in np.flatnonzero((labels < 0) | (labels >= num_labels))[:1]:
            what = f"holds label {labels[i]}, dataset.json has labels below {num_labels}"
            raise self.store.problem(int(shards[i]), what)
        classes = np.empty_like(labels)
        classes[order] = self.part.class_of_label[labels]
        return classes

    def _check(self, heads: np.ndarray, use_flip: np.ndarray, labels: np.ndarray) -> np.ndarray:
        if self.is_indexed:
            self.layout.check(heads)
            return labels
        return self.layout.check(heads, use_flip)

    def _heads_for(self, count: int) -> tuple[np.ndarray, list[memoryview]]:
        """Return memory for the headers of a batch, that of the last one used again."""
        if len(self._heads) < count:
            self._heads = np.empty((count, self.layout.head_bytes), np.uint8)
            self._head_views = [memoryview(row) for row in self._heads]
        return self._heads[:count], self._head_views[:count]

    def _find_damage(
        self, shards: np.ndarray, heads: np.ndarray, use_flip: np.ndarray, labels: np.ndarray
    ) -> ConfigError:
        """Name the shard whose sample did not pass the check of the whole batch."""
        for i, shard in enumerate(shards.tolist()):
            one = slice(i, i + 1)
            try:
                self._check(heads[one], use_flip[one], labels[one])
            except DamagedRecordError as err:
                return self.store.problem(shard, str(err))
        raise AssertionError("a batch fails its check and none of its samples does")
