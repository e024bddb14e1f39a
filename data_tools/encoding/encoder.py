"""Encode images into shards of raw latents, reading ahead so that the VAE does not wait.

The shard is the unit of work. Which images form a shard, and which of them form a batch, follows
from the settings alone; so an interrupted run that is repeated, or several processes that share
the shards, end with the same bytes as one run (on equal machines with equal numbers of threads:
these decide the order in which floating-point sums are taken).

Threads read and decode images some batches ahead, also into the next shard; the calling thread
feeds the VAE; one thread per open shard turns moments into records, hashes and writes them.

N batch, C latent channels, H W latent size.
"""

import contextlib
import hashlib
import math
import os
import queue
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from data_tools.encoding.device import BusyClock, EncodedBatch, is_out_of_memory
from data_tools.encoding.output import finished_sidecar, shard_name
from data_tools.encoding.settings import EncodingSettings
from data_tools.errors import ConfigError, os_errors_as
from data_tools.files import replace_file
from data_tools.permutations import permutation
from data_tools.shards.manifest import Shard
from data_tools.shards.records import Sample, sample_key
from data_tools.shards.sidecar import SIDECAR, ShardTotals, Sidecar, add_samples
from data_tools.sources.images import BadImageError, decode_image
from data_tools.sources.source import ImageSource
from data_tools.vae.autoencoder import Vae, encode_moments

SPLIT = 3  # key of the permutation that deals images to shards
_WRITTEN_BEHIND = 2  # batches encoded and not written yet, per shard
_READ_AHEAD = 2  # batches, at least; and at least two images per reading thread
_OPEN_SHARDS = 2  # one is being flushed to the disk while the next one is filled
_PUT_SEC = 0.1  # between looks whether the writing thread has failed


@dataclass
class Batch:
    """Images that are encoded together."""

    index: int  # of their shard
    is_last: bool  # of the shard
    places: np.ndarray  # (N,), in the source
    pixels: Tensor  # uint8 (N, size, size, 3), filled by the futures
    read: list[Future]  # each None, or the BadImageError


@dataclass
class _OpenShard:
    """A shard that a thread is writing."""

    index: int
    batches: queue.Queue = field(default_factory=lambda: queue.Queue(_WRITTEN_BEHIND))
    skipped: list[str] = field(default_factory=list)
    sidecar: Future | None = None

    def put(self, item: tuple[list[int], EncodedBatch] | None | Exception) -> None:
        """Hand a batch to the thread; None after the last, an exception to give up."""
        while True:
            if self.sidecar.done():
                if not isinstance(item, Exception):
                    self.sidecar.result()  # raises what ended the thread
                return
            with contextlib.suppress(queue.Full):
                self.batches.put(item, timeout=_PUT_SEC)
                return

    def take(self) -> Iterator[tuple[list[int], EncodedBatch]]:
        """Go through the batches, in the thread."""
        while (item := self.batches.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item


class AbandonedError(Exception):
    """Another part of the encoder failed, so the shard is not finished."""


@dataclass(eq=False)
class ShardEncoder:
    """Encodes the shards of one data set into a folder."""

    source: ImageSource  # all images of the data set
    vae: Vae  # encodes them, on its device and in its type
    settings: EncodingSettings  # of this run and of the shards already in `output`
    output: Path  # an existing folder
    _: KW_ONLY
    is_strict: bool = False  # stop at the first image that cannot be decoded; else it is skipped
    num_threads: int = 1  # that read and decode images
    # Called with the name of a skipped image and what is wrong with it.
    on_damage: Callable[[str], object] = lambda text: None
    stated: dict[str, str] = field(default_factory=dict)  # sha256 in a finished set, by shard

    def __post_init__(self) -> None:
        self.device = next(self.vae.model.parameters()).device
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # whose stream the events below are recorded in
        self.clock, self.wall_sec = BusyClock(self.device), 0.0
        order = permutation(len(self.source), self.settings.seed, SPLIT)
        self.order = order.astype(np.uint32)  # half the memory

    @property
    def busy_share(self) -> float:
        """Which part of the time spent encoding the VAE computed, 0 to 1."""
        return self.clock.sec / max(self.wall_sec, 1e-9)

    def encode(self, index: int) -> Sidecar:
        """Write one shard and its sidecar, each whole or not at all, over what may be there."""
        (sidecar,) = self.encode_all(iter([index]))
        return sidecar

    def encode_all(
        self,
        indices: Iterator[int],
        on_images: Callable[[int, int], object] = lambda index, count: None,
    ) -> Iterator[Sidecar]:
        """Write shards as `encode`, yielding each sidecar; close the generator if it is left early.

        Args:
            indices: asked for the next shard when the last one's images have all been read.
            on_images: called with a shard's index and the number of image files just finished.
        """
        started, sec_before = time.perf_counter(), self.wall_sec
        depth = max(_READ_AHEAD, math.ceil(2 * self.num_threads / self.settings.batch_size))
        ahead: deque[Batch] = deque()
        open_shards: deque[_OpenShard] = deque()
        readers = ThreadPoolExecutor(self.num_threads, thread_name_prefix="image")
        writers = ThreadPoolExecutor(_OPEN_SHARDS, thread_name_prefix="shard")
        try:
            batches = self._batches(indices, readers)
            while True:
                while len(ahead) <= depth and (batch := next(batches, None)) is not None:
                    ahead.append(batch)
                if not ahead:
                    break
                batch = ahead.popleft()
                if not open_shards or open_shards[-1].index != batch.index:
                    while len(open_shards) >= _OPEN_SHARDS:
                        yield open_shards.popleft().sidecar.result()
                    open_shards.append(_OpenShard(batch.index))
                    shard = open_shards[-1]
                    shard.sidecar = writers.submit(self._write, shard)
                self._encode_batch(batch, open_shards[-1])
                on_images(batch.index, len(batch.places))
                self.wall_sec = sec_before + time.perf_counter() - started
                while open_shards[0].sidecar.done() and len(open_shards) > 1:
                    yield open_shards.popleft().sidecar.result()
            while open_shards:
                yield open_shards.popleft().sidecar.result()
            self.clock.collect(is_last=True)
            self.wall_sec = sec_before + time.perf_counter() - started
        finally:
            for shard in open_shards:
                shard.put(AbandonedError())
            readers.shutdown(cancel_futures=True)
            writers.shutdown()

    def _batches(self, indices: Iterator[int], readers: ThreadPoolExecutor) -> Iterator[Batch]:
        settings, pinned = self.settings, self.device.type == "cuda"
        size, side = settings.batch_size, settings.image.size
        for index in indices:
            files = self.order[index * settings.shard_size : (index + 1) * settings.shard_size]
            for start in range(0, len(files), size):
                places = files[start : start + size]
                shape = (len(places), side, side, 3)
                pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
                rows = zip(places.tolist(), pixels.numpy(), strict=True)
                read = [readers.submit(self._read, place, row) for place, row in rows]
                yield Batch(index, start + size >= len(files), places, pixels, read)

    def _read(self, place: int, row: np.ndarray) -> BadImageError | None:
        try:
            row[:] = decode_image(self.source.read(place), len(row))
        except BadImageError as err:
            return err
        return None

    def _encode_batch(self, batch: Batch, shard: _OpenShard) -> None:
        good = []
        for row, (place, future) in enumerate(zip(batch.places, batch.read, strict=True)):
            name = self.source.name(place)
            problem = f"--input {self.source.text}: {name} cannot be read"
            with os_errors_as(problem, "make it readable and run the same command again"):
                damage = future.result()
            if damage is None:
                good.append(row)
                continue
            if self.is_strict:
                raise ConfigError(
                    f"--strict: {name}: {damage}; repair the file or move it away, or leave "
                    "--strict out."
                )
            shard.skipped.append(name)
            self.on_damage(f"{name}: {damage}")
        if good:
            # What is left of a batch stays together: the next batches must not depend on it.
            pixels = batch.pixels if len(good) == len(batch.read) else batch.pixels[good]
            with self.clock.measure():
                encoded = self.encode_pixels(pixels)
            shard.put((batch.places[good].tolist(), encoded))
        if batch.is_last:
            shard.put(None)

    def encode_pixels(self, pixels: Tensor) -> EncodedBatch:
        """Start encoding uint8 (N, size, size, 3), and the mirrored images where they are stored.

        Raises:
            ConfigError: out of memory.
        """
        try:
            pixels = pixels.to(self.device, non_blocking=True)
            flips = encode_moments(self.vae, pixels.flip(2)) if self.settings.latent.flip else None
            return EncodedBatch(encode_moments(self.vae, pixels), flips)
        except RuntimeError as err:
            if not is_out_of_memory(err):
                raise
            raise ConfigError(
                f"--batch-size {self.settings.batch_size}: out of memory on {self.device}; end "
                "what else uses it, or begin a new --output with a smaller one."
            ) from err

    def _write(self, shard: _OpenShard) -> Sidecar:
        tar, layout = self.output / shard_name(shard.index), self.settings.latent.record_layout
        totals, keys, digest = ShardTotals(), [], hashlib.sha256()
        num_bytes = 0

        def samples() -> Iterator[Sample]:
            for places, encoded in shard.take():
                moments, flips = encoded.arrays()
                parts = [moments] if flips is None else [moments, flips]
                if not all(np.isfinite(part).all() for part in parts):
                    raise ConfigError(
                        f"--vae {self.vae.id}: its moments do not fit into float16 (--precision "
                        f"{self.settings.latent.precision}); use another VAE or precision."
                    )
                labels = self.source.labels[places].tolist()
                add_samples(totals, labels, moments)
                keys.extend(map(sample_key, places))
                mirrored = [None] * len(places) if flips is None else flips
                yield from map(Sample, places, labels, moments, mirrored)

        def write(file: IO[bytes]) -> None:
            nonlocal num_bytes
            layout.write(_Hashing(file, digest), samples())
            num_bytes = file.tell()
            # A finished data set stays what it is: runs and checkpoints know it by its content.
            if self.stated.get(tar.name, digest.hexdigest()) != digest.hexdigest():
                raise ConfigError(
                    f"--output {self.output}: its {tar.name} is missing or damaged, and encoding "
                    "it again gives other bytes than dataset.json says (another machine, version "
                    "or image); copy it again from another copy of the data set, or see "
                    "verify_shards.py --repair."
                )

        # A name of its own: another process may write the same shard, to the same bytes.
        temporary = tar.with_name(f"{tar.name}.{os.getpid()}-{uuid.uuid4().hex}.tmp")
        try:
            replace_file(tar, write, temporary)
            record = Shard(
                name=tar.name,
                num_samples=len(keys),
                bytes=num_bytes,
                sha256=digest.hexdigest(),
                stride=layout.stride,
                index_sha256="",
                first_key=keys[0] if keys else "",
                skipped=sorted(shard.skipped),
            )
            sidecar = Sidecar(record, totals)
            SIDECAR.write(self.output / record.sidecar, sidecar)
            return sidecar
        except FileNotFoundError:
            # Others believed this process dead, wrote the shard, and removed its temporary file.
            finished = finished_sidecar(self.output, shard.index)
            if finished is None:
                raise
            return finished


class _Hashing:
    """A file for writing that hashes what passes."""

    def __init__(self, file: IO[bytes], digest: "hashlib._Hash") -> None:
        self.file, self.digest = file, digest

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)
