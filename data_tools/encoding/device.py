"""Copy results from the encoding device, measure how busy it is, and tell when it is full."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def is_out_of_memory(err: RuntimeError) -> bool:
    """Tell a lack of memory from other failures of torch."""
    return isinstance(err, torch.OutOfMemoryError) or "can't allocate memory" in str(err)


class EncodedBatch:
    """Moments on their way from the device; a GPU may still be computing them."""

    def __init__(self, moments: Tensor, flips: Tensor | None) -> None:
        """Start copying float16 (N, 2C, H, W) moments, of mirrored images too, to the host."""
        self._events = None
        self._parts = [part for part in (moments, flips) if part is not None]
        if moments.is_cuda:
            host = [torch.empty(p.shape, dtype=p.dtype, pin_memory=True) for p in self._parts]
            for target, part in zip(host, self._parts, strict=True):
                target.copy_(part, non_blocking=True)
            self._parts = host
            self._events = torch.cuda.Event()
            self._events.record()

    def arrays(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Wait, and return the moments and those of the mirrored images."""
        if self._events is not None:
            self._events.synchronize()
        moments, *flips = [part.numpy() for part in self._parts]
        return moments, flips[0] if flips else None


class BusyClock:
    """Measures for how long the VAE computed; on a GPU by the GPU's own clock."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda, self.sec = device.type == "cuda", 0.0
        self._running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        """Count what is computed, or launched, inside."""
        if not self.is_cuda:
            started = time.perf_counter()
            yield
            self.sec += time.perf_counter() - started
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._running.append((begin, end))
        self.collect()

    def collect(self, is_last: bool = False) -> None:
        """Add up the batches that a GPU has finished; all of them at the end."""
        while self._running and (is_last or self._running[0][1].query()):
            begin, end = self._running.popleft()
            end.synchronize()
            self.sec += begin.elapsed_time(end) / 1000
