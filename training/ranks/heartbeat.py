"""Heartbeat: what this rank is doing, and in which collective it waits.

The training loop notes each phase that it enters, which costs nothing: no message is sent, and no
device is asked. Only when the watchdog wants to know, the stack of the main thread is searched for
a collective.
"""

import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor

COLLECTIVES_FILE = "torch/distributed/distributed_c10d.py"
TENSOR_NAMES = ("tensor", "output_tensor", "output", "input_tensor", "input")  # of its functions


class Phase(NamedTuple):
    """A part of the work.

    Attributes:
        text: its name in a sentence, such as "reading data".
        warn_after: multiple of COLLECTIVE_TIMEOUT_SEC after which to warn.
        end_after: multiple of COLLECTIVE_TIMEOUT_SEC after which the rank counts as hung. A rank
            that reads or writes gets more time: a slow disk or server is not a lost rank.
        is_on_device: if there is a GPU, the host only waits for it in this phase.
    """

    text: str
    warn_after: float = 0.2
    end_after: float = 1.0
    is_on_device: bool = False


LONGEST_END_AFTER = 6.0
STARTING = Phase("starting", 1.0, LONGEST_END_AFTER)
READING = Phase("reading data", end_after=LONGEST_END_AFTER)
FORWARD = Phase("in the forward pass", is_on_device=True)
BACKWARD = Phase("in the backward pass", is_on_device=True)
UPDATING = Phase("in the optimizer's step", is_on_device=True)
AGREEING = Phase("between two steps", is_on_device=True)
FIRST_STEP = Phase("in its first step", 1.0, LONGEST_END_AFTER, True)  # it may be compiling
COMPUTING = (FORWARD, BACKWARD, UPDATING)
LOGGING = Phase("writing metrics", end_after=LONGEST_END_AFTER)
SAVING = Phase("saving a checkpoint", end_after=LONGEST_END_AFTER)
SAMPLING = Phase("drawing samples", 1.0, LONGEST_END_AFTER)
LEAVING = Phase("leaving")
PHASES = {
    phase.text: phase
    for phase in (
        *(STARTING, READING, *COMPUTING, FIRST_STEP, AGREEING, LOGGING, SAVING, SAMPLING, LEAVING),
    )
}


class Beat(NamedTuple):
    """Where a rank was at one moment; ranks publish this.

    Attributes:
        number: counts the beats; a rank whose number stops growing does not answer.
        phase: text of the phase.
        step: the step in work, from 1; 0 before the first.
        stuck_sec: seconds since the rank entered the phase.
        waits_in: the collective or device that it waits for; empty if it works.
        detail: what the phase is busy with, such as a shard; may be empty.
    """

    number: int
    phase: str
    step: int
    stuck_sec: float
    waits_in: str
    detail: str


class Heartbeat:
    """The phase that the main thread is in; any thread may ask for it.

    Args:
        device: of the training.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type != "cpu"
        self._now = (STARTING, 0, time.monotonic())
        self._details: dict[Phase, Callable[[], str]] = {}
        self._first_step = 0
        self._main_thread = threading.get_ident()
        self._number = 0

    def enter(self, phase: Phase, step: int) -> None:
        """Note that a phase of a step begins; only the main thread calls this."""
        if phase in COMPUTING and step == self._first_step:
            phase = FIRST_STEP
        self._now = (phase, step, time.monotonic())

    def begin(self, step: int) -> None:
        """Note that a training begins with this step."""
        self._first_step = step
        self.enter(STARTING, step)

    def explain(self, phase: Phase, detail: Callable[[], str]) -> None:
        """Have `detail` called for what a phase is busy with, whenever the watchdog asks."""
        self._details[phase] = detail

    def stuck_sec(self) -> float:
        """Return the time since the last phase was entered."""
        return time.monotonic() - self._now[2]

    def limit(self, timeout_sec: float) -> float:
        """Return how many seconds of this phase to wait for a silent rank 0."""
        return timeout_sec * self._now[0].end_after

    def beat(self, is_asked: bool) -> Beat:
        """Say where the main thread is; search its stack only if `is_asked`."""
        phase, step, since = self._now
        self._number += 1
        waits_in = detail = ""
        if is_asked:
            waits_in = _collective_of(sys._current_frames().get(self._main_thread))
            if not waits_in and self._on_device and phase.is_on_device:
                waits_in = "its GPU"
            if not waits_in and phase in self._details:
                detail = self._details[phase]()
        return Beat(self._number, phase.text, step, time.monotonic() - since, waits_in, detail)


def _collective_of(frame: FrameType | None) -> str:
    """Name the collective on a stack, with the tensor that it works on; empty if there is none."""
    name = ""
    while frame is not None:
        code = frame.f_code
        if code.co_filename.endswith(COLLECTIVES_FILE):
            found = (frame.f_locals.get(key) for key in TENSOR_NAMES)
            tensor = next((value for value in found if isinstance(value, Tensor)), None)
            if tensor is None or code.co_name.endswith("_object"):
                name = code.co_name
            else:
                kind = str(tensor.dtype).removeprefix("torch.")
                name = f"{code.co_name} of {tensor.numel()} {kind}"
        elif not name and code.co_name == "wait" and "torch" in code.co_filename:
            name = "a collective begun before"
        frame = frame.f_back
    return name
