"""Choose what a stop signal does to a process that cannot stop at a step yet, or any more."""

import signal
from types import FrameType

from data_tools.exit_codes import CRASH_EXIT_CODE
from data_tools.process.leaving import leave

# Of a terminal, of a terminal or connection that closes, of a batch system, which lets people
# choose (Slurm's --signal).
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def unignored_signals() -> list[signal.Signals]:
    """List the signals to stop at; nohup and others have a process ignore some from its start."""
    ignored = (signal.SIG_IGN, None)
    return [number for number in STOP_SIGNALS if signal.getsignal(number) not in ignored]


def end_early_on_signals() -> None:
    """Let a signal end this process with the lowest exit code until it is handled otherwise.

    An entry point calls this before it imports torch, which takes seconds. srun ends all ranks when
    one leaves and reports the highest exit code: a signal's would hide that the first one met a
    mistake of the user's, which is not to be tried again.
    """
    end_on_signals_with(CRASH_EXIT_CODE)


def end_on_signals_with(exit_code: int) -> None:
    """Let the next signal but Ctrl-C end this process with an exit code."""

    def end(_number: int, _frame: FrameType | None) -> None:
        leave(exit_code)

    for number in unignored_signals():
        if number != signal.SIGINT:
            signal.signal(number, end)


def ignore_signals() -> None:
    """Ignore whatever a launcher sends from now on, but for Ctrl-C."""
    for number in STOP_SIGNALS:
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_IGN)
