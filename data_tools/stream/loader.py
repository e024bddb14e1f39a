"""Read the batches that training consumes, ahead of their use.

Batch composition is arithmetic on the stream position (stream/order.py, stream/plan.py); samples
are read by preadv at known offsets (stream/reader.py). One thread reads batches ahead, a few others
make shards ready before they are needed (stream/shard_feed.py): preadv, sockets and checksums
release the interpreter, and a thread needs no fork beside DeepSpeed, NCCL or MPI.

N micro-batch, C latent channels, H W latent size.
"""

import queue
import threading
import time
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from data_tools.errors import ConfigError
from data_tools.process.accelerator import has_gpu
from data_tools.storage.cache import ShardCache
from data_tools.stream.plan import micro_batches
from data_tools.stream.reader import SampleReader
from data_tools.stream.shard_feed import ShardFeed
from data_tools.stream.training_data import TrainingData
from models.randomness import Stream, uniform

QUEUE_DEPTH = 4  # micro-batches ready ahead of the consumer
FLIP_PROBABILITY = 0.5
# If more ranks than this share a stream, each reads too little of a shard to read all of it ahead.
_MAX_SHARING_RANKS = 8
_CLOSE_POLL_SEC = 0.1  # how long the thread may take to notice close()
_CLOSE_SEC = 2.0  # how long close() waits for threads that wait for a server


class Batch(NamedTuple):
    """One micro-batch, on the CPU; raw latents are pinned where CUDA is available."""

    raw_latents: Tensor  # (N, 2C, H, W) mean | log-variance, or (N, C, H, W) frozen; unscaled
    labels: Tensor  # (N,) int64; 0 where the data set has no classes
    positions: Tensor  # (N,) int64 stream positions, which seed all randomness of a sample


class BatchReader:
    """Reads the batch at a stream position; used by one thread."""

    def __init__(
        self,
        data: TrainingData,
        *,
        seed: int,
        window: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_streams: int = 1,
        horizontal_flip: bool = True,
        check: str = "sha256",
        cache: ShardCache | None = None,
    ) -> None:
        """Start preparing shards as soon as the first batch is asked for.

        Args:
            seed: of the order and of the flips.
            window: shards that are shuffled together.
            global_batch_size: samples per optimizer step over all ranks.
            num_streams: canonical streams; must divide the global batch.
            horizontal_flip: replace half of the samples by their mirror images.
            check: of local shards before their first use: "sha256" or "size".
            cache: of this node, for shards that are fetched and for what was checked.
        """
        if horizontal_flip and not data.manifest.has_flip:
            raise ConfigError(
                f"--horizontal-flip: {data.parts[0].location.text} holds no latents of "
                "mirrored images; pass --no-horizontal-flip, or encode again without --no-flip."
            )
        self.data, self.seed, self.horizontal_flip = data, seed, horizontal_flip
        self.plan = data.plan(
            seed=seed, window=window, global_batch_size=global_batch_size, num_streams=num_streams
        )
        self._dtype = getattr(torch, data.manifest.latent.dtype)
        self._global_batch_size, self._own = global_batch_size, global_batch_size // world_size
        self._first = rank * self._own
        self._step = -1
        stores = data.stores(check, cache)
        self.feed = ShardFeed(stores, world_size <= _MAX_SHARING_RANKS * num_streams)
        pairs = self.plan.windows(self._first, self._first + self._own)
        self.reader = SampleReader(data, stores, self.feed.open, len(pairs) * window)

    def read(self, start: int, count: int) -> Batch:
        """Read `count` samples from position `start` on, within this rank's slice of a step."""
        self._announce(start // self._global_batch_size)
        ids = self.plan.sample_ids(start, start + count)
        positions = torch.arange(start, start + count)
        use_flip = np.zeros(count, bool)
        if self.horizontal_flip:
            drawn = uniform(self.seed, Stream.FLIP, positions, 1)[:, 0]
            use_flip = (drawn < FLIP_PROBABILITY).numpy()
        raw_latents = torch.empty(
            (count, *self.data.manifest.latent.shape),
            dtype=self._dtype,
            pin_memory=has_gpu(),
        )
        labels = self.reader.read(ids, use_flip, raw_latents)
        return Batch(raw_latents, torch.from_numpy(labels), positions)

    def close(self) -> None:
        """Stop preparing shards and close the files."""
        self.feed.close(_CLOSE_SEC)
        self.reader.close()

    def _announce(self, step: int) -> None:
        """Have the shards of this step's windows prepared, then those of the windows to come."""
        if step == self._step:
            return
        self._step = step
        start = step * self._global_batch_size + self._first
        pairs = self.plan.windows(start, start + self._own)
        parts = [*(now for now, _ in pairs), *(later for _, later in pairs)]
        wanted = list(dict.fromkeys(shard for shards in parts for shard in shards))
        self.reader.keep(wanted)
        self.feed.want(wanted)


class LatentStream:
    """An endless iterator of this rank's micro-batches, from any stream position on.

    Which these are, says `micro_batches`: the union over ranks and micro-steps is the global batch
    whatever the number of ranks, and resuming needs the position alone.
    """

    def __init__(
        self,
        data: TrainingData,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        start_position: int = 0,
        **settings: Any,
    ) -> None:
        """Start reading ahead.

        Args:
            micro_batch_size: samples per batch of this stream.
            start_position: samples consumed so far by the whole job.
            settings: the other arguments of BatchReader.
        """
        ranks = {"global_batch_size": global_batch_size, "rank": rank, "world_size": world_size}
        self._starts = micro_batches(
            start_position=start_position, micro_batch_size=micro_batch_size, **ranks
        )
        self.micro_batch_size = micro_batch_size
        self.batches = BatchReader(data, **ranks, **settings)
        self.wait_sec = 0.0  # time the consumer has waited for data
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(QUEUE_DEPTH)
        self._failure: BaseException | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._prefetch, name="latents", daemon=True)
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._failure is not None:
            raise self._failure
        assert not self._closing.is_set(), "the stream is closed"
        started = time.perf_counter()
        item = self._ready.get()
        self.wait_sec += time.perf_counter() - started
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        return item

    def awaits(self) -> str:
        """Name the shard that is being read, or waited for; any thread may ask."""
        return self.batches.reader.describe_last()

    def close(self) -> None:
        """Stop the threads and close the files; calling it again does nothing."""
        if self._closing.is_set():
            return
        self._closing.set()
        self.batches.feed.close(_CLOSE_SEC)  # wakes the thread, should it wait for a shard
        self._thread.join()
        self.batches.reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prefetch(self) -> None:
        try:
            for start in self._starts:
                self._put(self.batches.read(start, self.micro_batch_size))
                if self._closing.is_set():
                    return
        except BaseException as err:  # noqa: BLE001 -- not handled here: the consumer raises it
            self._put(err)

    def _put(self, item: Batch | BaseException) -> None:
        while not self._closing.is_set():
            try:
                self._ready.put(item, timeout=_CLOSE_POLL_SEC)
                return
            except queue.Full:
                continue
