"""The stream of batches that training consumes.

Batch composition is arithmetic on the stream position (order.py); samples are read by preadv at
fixed offsets (records.py). One thread prefetches: preadv releases the interpreter, and a thread
needs no fork beside DeepSpeed, NCCL or MPI.

N micro-batch, C latent channels, H W latent size.
"""

import os
import queue
import threading
import time
from collections import OrderedDict
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from data_tools.errors import ConfigError
from data_tools.manifest import DatasetManifest
from data_tools.order import StreamOrder
from data_tools.records import DamagedRecordError
from models.randomness import Stream, uniform

QUEUE_DEPTH = 4  # micro-batches ready ahead of the consumer
MAX_OPEN_SHARDS = 64  # descriptors are scarce, and an open file keeps its disk space
FLIP_PROBABILITY = 0.5
_CLOSE_POLL_SEC = 0.1  # how long the thread may take to notice close()


class Batch(NamedTuple):
    """One micro-batch, on the CPU; raw latents are pinned where CUDA is available."""

    raw_latents: Tensor  # (N, 2C, H, W) float16: mean | log-variance, unscaled
    labels: Tensor  # (N,) int64; 0 where the data set has no classes
    positions: Tensor  # (N,) int64 stream positions, which seed all randomness of a sample


class SampleReader:
    """Random access to the samples of a data set by sample id; used by one thread."""

    def __init__(self, manifest: DatasetManifest) -> None:
        """Prepare; files are opened when first needed."""
        self.manifest, self.layout = manifest, manifest.layout
        sizes = [shard.num_samples for shard in manifest.shards]
        self.first_id = np.concatenate(([0], np.cumsum(sizes)))
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def read(self, ids: np.ndarray, use_flip: np.ndarray, out: Tensor) -> np.ndarray:
        """Read samples.

        Args:
            ids: int64 (N,).
            use_flip: bool (N,), read the mirrored image's moments.
            out: float16 (N, 2C, H, W), contiguous, filled.

        Returns:
            labels, int64 (N,).
        """
        layout = self.layout
        labels = np.empty((len(ids), layout.label_bytes), np.uint8)
        headers = np.empty((len(ids), layout.header_bytes), np.uint8)
        arrays = out.numpy().reshape(len(ids), -1).view(np.uint8)  # the same memory as `out`
        shards = np.searchsorted(self.first_id, ids, side="right") - 1
        rows = ids - self.first_id[shards]
        for i in np.lexsort((rows, shards)).tolist():  # in the order of the disk
            shard = int(shards[i])
            try:
                layout.read(
                    self._descriptor(shard),
                    int(rows[i]),
                    label=labels[i],
                    header=headers[i],
                    array=arrays[i],
                    use_flip=bool(use_flip[i]),
                )
            except (DamagedRecordError, OSError) as err:
                raise self._error(shard, err) from err
        try:
            classes = layout.check(labels, headers, use_flip)
        except DamagedRecordError:
            raise self._find_damage(shards, labels, headers, use_flip) from None
        # On a GPU a label beyond the embedding table ends the process without naming anything.
        num_classes = max(1, self.manifest.num_classes)
        for i in np.flatnonzero((classes < 0) | (classes >= num_classes))[:1]:
            found = f"holds label {classes[i]}, dataset.json has labels below {num_classes}"
            raise self._error(int(shards[i]), DamagedRecordError(found))
        return classes

    def close(self) -> None:
        """Close all files."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _descriptor(self, shard: int) -> int:
        descriptor = self._descriptors.get(shard)
        if descriptor is None:
            path = self.manifest.folder / self.manifest.shards[shard].name
            descriptor = self._descriptors[shard] = os.open(path, os.O_RDONLY)
            if len(self._descriptors) > MAX_OPEN_SHARDS:
                os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors.move_to_end(shard)
        return descriptor

    def _find_damage(
        self, shards: np.ndarray, labels: np.ndarray, headers: np.ndarray, use_flip: np.ndarray
    ) -> ConfigError:
        """Name the shard whose sample did not pass the check of the whole batch."""
        for i, shard in enumerate(shards.tolist()):
            one = slice(i, i + 1)
            try:
                self.layout.check(labels[one], headers[one], use_flip[one])
            except DamagedRecordError as err:
                return self._error(shard, err)
        raise AssertionError("a batch fails its check and none of its samples does")

    def _error(self, shard: int, err: Exception) -> ConfigError:
        path = self.manifest.folder / self.manifest.shards[shard].name
        what = f"cannot be read ({err.strerror})" if isinstance(err, OSError) else str(err)
        return ConfigError(
            f"{path}: {what}; run python data_tools/verify_shards.py --data {path.parent}, it says "
            "what to do."
        )


class LatentStream:
    """An endless iterator of this rank's micro-batches, from any stream position on.

    Step s, micro-step m, rank r holds the positions s * G + m * W * n + r * n + [0, n), with global
    batch G, world size W and micro-batch n. So the union over ranks and micro-steps is the global
    batch at s * G whatever the number of ranks, and resuming needs the position alone.
    """

    def __init__(
        self,
        manifest: DatasetManifest,
        *,
        seed: int,
        window: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        start_position: int = 0,
        horizontal_flip: bool = True,
    ) -> None:
        """Start reading ahead.

        Args:
            manifest: of the data set.
            seed: of the order and of the flips.
            window: shards that are shuffled together.
            global_batch_size: samples per optimizer step over all ranks.
            micro_batch_size: samples per batch of this stream.
            rank: of this process.
            world_size: number of processes.
            start_position: samples consumed so far by the whole job.
            horizontal_flip: replace half of the samples by their mirror images.
        """
        if horizontal_flip and not manifest.has_flip:
            raise ConfigError(
                f"--horizontal-flip true: {manifest.folder} holds no latents of mirrored images; "
                "pass --horizontal-flip false, or encode again without --no-flip."
            )
        per_micro_step = micro_batch_size * world_size
        assert global_batch_size % per_micro_step == 0, "not micro x ranks x accumulation"
        assert 0 <= rank < world_size and start_position >= 0
        self.manifest, self.seed, self.horizontal_flip = manifest, seed, horizontal_flip
        self.micro_batch_size, self.per_micro_step = micro_batch_size, per_micro_step
        # A global batch is a whole number of micro-steps, so micro-steps follow without a gap.
        self.next_position = start_position + rank * micro_batch_size
        self.wait_sec = 0.0  # time the consumer has waited for data
        self.order = StreamOrder([s.num_samples for s in manifest.shards], seed, window)
        self.reader = SampleReader(manifest)
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

    def close(self) -> None:
        """Stop the thread and close the files; calling it again does nothing."""
        self._closing.set()
        self._thread.join()
        self.reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _prefetch(self) -> None:
        try:
            while not self._closing.is_set():
                self._put(self._read_batch(self.next_position))
                self.next_position += self.per_micro_step
        except BaseException as err:  # noqa: BLE001 -- not handled here: the consumer raises it
            self._put(err)

    def _put(self, item: Batch | BaseException) -> None:
        while not self._closing.is_set():
            try:
                self._ready.put(item, timeout=_CLOSE_POLL_SEC)
                return
            except queue.Full:
                continue

    def _read_batch(self, start: int) -> Batch:
        ids = self.order.sample_ids(start, start + self.micro_batch_size)
        positions = torch.arange(start, start + self.micro_batch_size)
        use_flip = np.zeros(len(ids), bool)
        if self.horizontal_flip:
            drawn = uniform(self.seed, Stream.FLIP, positions, 1)[:, 0]
            use_flip = (drawn < FLIP_PROBABILITY).numpy()
        raw_latents = torch.empty(
            (len(ids), *self.manifest.latent.shape),
            dtype=torch.float16,
            pin_memory=torch.cuda.is_available(),
        )
        labels = self.reader.read(ids, use_flip, raw_latents)
        return Batch(raw_latents, torch.from_numpy(labels), positions)
