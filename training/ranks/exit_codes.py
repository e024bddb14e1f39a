"""Exit codes that launchers and job scripts act on. Imports nothing that takes time."""

import os
import signal
from types import FrameType

from data_tools.errors import CONFIG_ERROR_EXIT_CODE
from data_tools.process.entry_point import STOP_SIGNALS, minded_signals

SAVED_EXIT_CODE = 75  # EX_TEMPFAIL: stopped by a signal, saved, and to be started again
CRASH_EXIT_CODE = 1  # also: ended before there was anything to save


def end_early_on_signals() -> None:
    """Let a signal end this process with an exit code of its own until it minds them otherwise.

    An entry point calls this before it imports torch, which takes seconds. srun ends all ranks when
    one leaves and reports the highest exit code: a signal's would hide that the first one met a
    mistake of the user's, which is not to be tried again.
    """
    assert CRASH_EXIT_CODE < CONFIG_ERROR_EXIT_CODE < SAVED_EXIT_CODE
    end_on_signals_with(CRASH_EXIT_CODE)


def end_on_signals_with(exit_code: int) -> None:
    """Let the next signal but Ctrl-C end this process with an exit code."""

    def end(_number: int, _frame: FrameType | None) -> None:
        os._exit(exit_code)

    for number in minded_signals():
        if number != signal.SIGINT:
            signal.signal(number, end)


def ignore_signals() -> None:
    """Be deaf to whatever a launcher sends from now on, but for Ctrl-C."""
    for number in STOP_SIGNALS:
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_IGN)
