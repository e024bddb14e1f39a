"""Stop all ranks at the same step, whichever of them receives a signal or cannot go on."""

import signal
from types import FrameType

import torch

from data_tools.process.signals import unignored_signals

RANK_FAILED = 1000  # as a stop signal: a rank cannot go on; above every signal number


class StopSignal:
    """A signal to stop on any rank becomes one decision of all ranks at a step boundary.

    SIGINT and SIGTERM always do; SIGHUP, SIGUSR1 and SIGUSR2 unless they are ignored already, as
    nohup has it.

    What is posted before a step is read before the next one, when the device has long computed it:
    reading what was posted just now would wait for everything queued before.
    """

    def __init__(self, device: torch.device) -> None:
        # The stop signal, and whether a checkpoint is due.
        is_on_gpu = device.type == "cuda"
        self._flag = torch.zeros(2, dtype=torch.int32, device=device)
        self._own = torch.zeros(2, dtype=torch.int32, pin_memory=is_on_gpu)
        self._on_host = torch.zeros(2, dtype=torch.int32, pin_memory=is_on_gpu)
        self._copied: torch.cuda.Event | None = None
        self._received = 0
        numbers = {signal.SIGINT, signal.SIGTERM, *unignored_signals()}
        self._previous = {number: signal.signal(number, self._on_signal) for number in numbers}

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        # A launcher often repeats the signal while the checkpoint is being written.
        self._received = number

    def is_received(self) -> bool:
        """Tell whether this rank has received a signal; others may not know it yet."""
        return self._received != 0

    def post(self, has_failed: bool = False, is_save_due: bool = False) -> None:
        """Send what this rank received to all ranks. All ranks must call this.

        Args:
            has_failed: this rank cannot go on; then all ranks read RANK_FAILED.
            is_save_due: by this rank's clock a checkpoint is due; then it is for all ranks.
        """
        self._wait()  # what was posted last has left the buffer
        # Not into the flag itself: the host waits when it sets a number of the device.
        self._own[0] = RANK_FAILED if has_failed else self._received
        self._own[1] = int(is_save_due)
        self._flag.copy_(self._own, non_blocking=True)
        torch.distributed.all_reduce(self._flag, op=torch.distributed.ReduceOp.MAX)
        self._on_host.copy_(self._flag, non_blocking=True)
        if self._flag.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> int:
        """Return what any rank had received at the last `post`, 0 if nothing; all get the same."""
        self._wait()
        return int(self._on_host[0])

    def is_save_due(self) -> bool:
        """Tell whether by any rank's clock a checkpoint was due at the last `post`."""
        self._wait()
        return bool(self._on_host[1])

    def _wait(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()

    def restore(self) -> None:
        """Give the signals back to the handlers that had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
