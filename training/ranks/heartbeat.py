"""What this rank is doing: a note that costs nothing, and a look at the main thread's stack.

The training loop notes each phase that it enters; nothing is sent, and no device is asked. Only
when somebody wants to know (ranks/watchdog.py), the stack says in which collective the main thread
waits.
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
        text: follows "rank 3 has been".
        warn_after: fraction of COLLECTIVE_TIMEOUT_SEC after which its lasting is worth a warning.
        end_after: multiple of COLLECTIVE_TIMEOUT_SEC after which it counts as hung. What reads or
            writes, and lives, gets longer: a slow disk or server is not a lost rank.
        is_on_device: with a GPU, the host only waits for it here.
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
    """Where a rank was at a moment; what it publishes.

    Attributes:
        number: of the beat; one that does not grow any more is of a rank that does not answer.
        phase: its text.
        step: being worked on, from 1; 0 before the first.
        stuck_sec: since it entered the phase.
        waits_in: the collective, or device, that it waits for; empty if it does something itself.
        detail: what the phase is busy with, such as a shard; may be empty.
    """

    number: int
    phase: str
    step: int
    stuck_sec: float
    waits_in: str
    detail: str


class Heartbeat:
    """The phase that the main thread is in; any thread may look.

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
        """Note that a training begins, whose first step this will be."""
        self._first_step = step
        self.enter(STARTING, step)

    def explain(self, phase: Phase, detail: Callable[[], str]) -> None:
        """Have `detail` say what a phase is busy with, whenever somebody asks."""
        self._details[phase] = detail

    def stuck_sec(self) -> float:
        """Return the time since the last phase was entered."""
        return time.monotonic() - self._now[2]

    def limit(self, timeout_sec: float) -> float:
        """Return after how many seconds in this phase a silent rank 0 is lost."""
        return timeout_sec * self._now[0].end_after

    def beat(self, is_asked: bool) -> Beat:
        """Say where the main thread is; look at its stack only if somebody asked for it."""
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
    """Name the collective that a stack is in, with what it works on; empty if it is in none."""
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
