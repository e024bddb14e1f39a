"""Measure which part of a step communication takes, and how much of it nothing hides.

Now and then one step runs under torch's profiler. On a GPU communication is NCCL's kernels and
computation whatever else the device does; on a CPU they are gloo's collectives, from their call to
their end, and torch's operators in the thread that trains. Waiting for slower ranks is part of a
collective. Each rank measures alone: nothing is exchanged, and nothing computed changes.
"""

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.autograd import profiler

from training.monitoring.event_files import Monitor

FIRST_STEP = 10  # of a process: no kernel is compiled, no buffer allocated for the first time
MAX_COST = 0.001  # of the time since the first step
STEP_NAME = "training step"
GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
NCCL_PREFIX = "nccl"
GLOO_PREFIXES = ("gloo:", "c10d::")
OPERATOR_PREFIX = "aten::"

Interval = tuple[int, int]  # start and end, ns


class Shares(NamedTuple):
    """What communication takes of a step, in percent of its time."""

    share_pct: float  # a collective was under way
    exposed_pct: float  # one was, and nothing was computed meanwhile


def shares(step: Interval, communication: list[Interval], computation: list[Interval]) -> Shares:
    """Relate a step's communication to its length.

    Args:
        step: from its beginning to its end; what lies outside does not count.
        communication: may overlap one another and the computation.
        computation: may overlap, too.
    """
    length = step[1] - step[0]
    under_way, computing = union_length(communication, step), union_length(computation, step)
    exposed = union_length([*communication, *computation], step) - computing
    return Shares(100.0 * under_way / length, 100.0 * exposed / length)


def union_length(intervals: Iterable[Interval], within: Interval) -> int:
    """Return how long the union of intervals lasts `within` another one."""
    total, reached = 0, within[0]
    for start, end in sorted(intervals):
        end = min(end, within[1])
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


def shares_of(events: Iterable[Any], is_on_gpu: bool) -> Shares | None:
    """Find the shares in what torch's profiler recorded.

    Args:
        events: of the profiler; one of them is the annotation STEP_NAME.
        is_on_gpu: whether the device computed, rather than this thread.

    Returns:
        None if nothing was computed, as when another tool holds the GPU's counters, or if this
        torch does not say what an event is.
    """
    step, thread = None, 0
    found: list[tuple[str, int, Interval]] = []  # name, thread
    for event in events:
        kind, name = kind_of(event), event.name()
        interval = event.start_ns(), event.end_ns()
        if kind == "user_annotation" and name == STEP_NAME:
            step, thread = interval, event.start_thread_id()
        elif is_on_gpu == (kind in GPU_WORK):
            found.append((name, event.start_thread_id(), interval))
    if is_on_gpu:
        communication = [i for name, _, i in found if name.startswith(NCCL_PREFIX)]
        computation = [i for name, _, i in found if not name.startswith(NCCL_PREFIX)]
    else:
        communication = [i for name, _, i in found if name.startswith(GLOO_PREFIXES)]
        # Collectives copy with operators too, inside their calls or in threads of their own.
        calls = sorted(i for name, _, i in found if name.startswith("c10d::"))
        computation = _outside(
            [i for name, t, i in found if t == thread and name.startswith(OPERATOR_PREFIX)], calls
        )
    if step is None or not computation:
        return None
    return shares(step, communication, computation)


def kind_of(event: Any) -> str:
    """Return the kind of an event of the profiler; empty before torch 2.13, which says none."""
    return event.activity_type() if hasattr(event, "activity_type") else ""


def _outside(intervals: list[Interval], calls: list[Interval]) -> list[Interval]:
    """Leave out the intervals that lie in one of the calls of the same thread."""
    outside, i = [], 0
    for start, end in sorted(intervals):
        while i < len(calls) and calls[i][1] <= start:
            i += 1
        if i == len(calls) or not calls[i][0] <= start or not end <= calls[i][1]:
            outside.append((start, end))
    return outside


class CommunicationWatch:
    """Looks at single steps of the main rank.

    Args:
        monitor: that takes the shares.
        device: of the training.
        every: steps from one look to the next, at least.
        is_wanted: False on ranks that do not look, or where there is nobody to communicate with.
        first: step of this process that is looked at first, from 1.
    """

    def __init__(
        self,
        monitor: Monitor,
        device: torch.device,
        every: int,
        is_wanted: bool,
        first: int = FIRST_STEP,
    ) -> None:
        self._monitor, self._every, self._is_wanted = monitor, every, is_wanted
        self._is_on_gpu, self._device = device.type == "cuda", device
        self._num_steps, self._next_step = 0, first
        self._started, self.cost_sec = 0.0, 0.0
        if is_wanted:  # else the profiler's library notes each look on the standard error
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Run one training step inside; `number` counts from 1."""
        if not self._is_due():
            yield
            return
        began = time.monotonic()
        self._synchronise()
        device = "cuda" if self._is_on_gpu else None
        with profiler.profile(use_kineto=True, use_device=device) as recorded:
            step_began = time.monotonic()
            with profiler.record_function(STEP_NAME):
                yield
                self._synchronise()
            step_sec = time.monotonic() - step_began
        found = shares_of(recorded.kineto_results.events(), self._is_on_gpu)
        if found is not None:
            self._monitor.extra(number, "comm/share_pct", found.share_pct)
            self._monitor.extra(number, "comm/exposed_pct", found.exposed_pct)
        self.cost_sec += time.monotonic() - began - step_sec
        self._next_step = self._num_steps + self._every

    def _is_due(self) -> bool:
        """Count a step; tell whether it is one to look at."""
        if not self._is_wanted:
            return False
        self._num_steps += 1
        if self._num_steps == 1:
            self._started = time.monotonic()
        if self._num_steps < self._next_step:
            return False
        if self.cost_sec > MAX_COST * (time.monotonic() - self._started):
            return False
        # Two profilers at a time lose each other's records, and may crash the process.
        return not profiler._is_profiler_enabled

    def _synchronise(self) -> None:
        if self._is_on_gpu:
            torch.cuda.synchronize(self._device)
