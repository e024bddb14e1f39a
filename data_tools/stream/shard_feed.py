"""Prepare shards ahead of their use, in threads: fetch, check, and read them into memory."""

import os
import threading

from data_tools.storage.locks import StoppedError
from data_tools.stream.shard_store import ShardStore, numbered

NUM_THREADS = 4  # shards that are fetched or checked at a time


class ShardFeed:
    """Prepares the shards that are wanted, in their order, and lets go of all others.

    Shards are numbered through all stores. An error in a thread is raised by `open` of its shard.
    """

    def __init__(self, stores: list[ShardStore], reads_ahead: bool) -> None:
        """Start the threads.

        Args:
            reads_ahead: ask the system to read local shards whole before they are needed, which
                pays where this process reads a good part of each.
        """
        self._stores, self._reads_ahead = stores, reads_ahead
        self._shards = numbered(stores)
        self._wanted: list[int] = []
        self._begun: set[int] = set()
        self._ready: set[int] = set()
        self._failures: dict[int, BaseException] = {}
        self._changed = threading.Condition()
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"shards-{i}", daemon=True)
            for i in range(NUM_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def want(self, shards: list[int]) -> None:
        """Prepare these, the first of them first; what was wanted before and is not now may go."""
        if shards == self._wanted:
            return
        with self._changed:
            self._wanted = shards
            past = self._ready - set(shards)
            self._ready -= past
            self._begun -= past
            self._changed.notify_all()
        for shard in past:
            self._release(shard)

    def open(self, shard: int) -> int:
        """Return a descriptor, which the caller closes, as soon as the shard is ready."""
        with self._changed:
            assert shard in self._wanted, f"nobody wanted shard {shard}"
            self._changed.wait_for(
                lambda: shard in self._ready or shard in self._failures or self._is_closed
            )
            if shard in self._failures:
                raise self._failures[shard]
            if self._is_closed:
                raise StoppedError("the feed is closed")
        store, own = self._shards[shard]
        return store.open(own)

    def close(self, timeout_sec: float) -> None:
        """Stop the threads; one that waits for a server is left behind after a while."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for store in self._stores:
            store.close()
        for thread in self._threads:
            thread.join(timeout_sec / NUM_THREADS)

    def _release(self, shard: int) -> None:
        store, own = self._shards[shard]
        store.release(own)

    def _next(self) -> int | None:
        """Wait for something to do; None means the end."""
        with self._changed:
            while not self._is_closed:
                for shard in self._wanted:
                    if shard not in self._begun and shard not in self._failures:
                        self._begun.add(shard)
                        return shard
                self._changed.wait()
        return None

    def _work(self) -> None:
        while (shard := self._next()) is not None:
            failure = None
            try:
                self._prepare(shard)
            except BaseException as err:  # noqa: BLE001 -- not handled here: open() raises it
                failure = err
            with self._changed:
                is_wanted = shard in self._wanted
                if failure is not None:
                    self._failures[shard] = failure
                elif is_wanted:
                    self._ready.add(shard)
                if failure is not None or not is_wanted:
                    self._begun.discard(shard)
                self._changed.notify_all()
            if failure is None and not is_wanted:
                self._release(shard)

    def _prepare(self, shard: int) -> None:
        store, own = self._shards[shard]
        store.prepare(own)
        if self._reads_ahead and store.location.folder is not None:
            descriptor = store.open(own)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)
