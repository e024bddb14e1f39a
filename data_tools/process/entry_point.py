"""Run a command: output that may fail, signals that stop it, mistakes in one sentence.

Output that fails must not end the work. If the terminal is gone, the disk of the log is full, a
reader such as `head` has left, or a stream is closed, what cannot be written is lost and the work
goes on. A character that the terminal's encoding lacks is written as an escape.
"""

import contextlib
import errno
import io
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TextIO

from data_tools.errors import ConfigError, exit_on_config_error
from data_tools.exit_codes import CRASH_EXIT_CODE, SIGNAL_EXIT_CODE
from data_tools.process.launcher import read_place_on_node
from data_tools.process.leaving import leave, without_teardown_if_asked
from data_tools.process.signals import unignored_signals
from data_tools.process.versions import untried

REPEAT_SEC = 2.0  # a launcher repeats the signal that its whole process group has received
SLOW_READER_SEC = 10.0  # for what a command has printed before a signal
GONE = (errno.EPIPE, errno.EIO)  # nobody reads any more, so nobody misses anything


class StopRequest(KeyboardInterrupt):
    """A signal asks this process to stop."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class _LossyFile(io.FileIO):
    """A file that loses what cannot be written."""

    def __init__(self, descriptor: int, name: str) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.name, self.error = name, None  # why something was lost, the first time

    def write(self, data: "bytes | memoryview") -> int:
        """Write all of it, or nothing more after an error."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest:
                written = super().write(rest)
                if written is None:  # another program has made the terminal non-blocking
                    select.select([], [self], [])
                else:
                    rest = rest[written:]
        except OSError as err:
            self.error = self.error or err
        return size


def enter(
    main: Callable[[], object],
    when_stopped: str = "run the same command again",
    prints_result: bool = False,
) -> None:
    """Run a command's main function; every entry point does it by this function.

    Args:
        main: takes its arguments from the command line.
        when_stopped: what to advise after a signal has ended it.
        prints_result: its output is all that it makes, so that it fails if a part is lost.
    """
    _read_names_as_utf8()
    output = protect_output()
    if is_reporter() and (remark := untried()):
        sys.stderr.write(f"warning: {remark}\n")
    with without_teardown_if_asked():
        with exit_on_config_error(), _leaving_on_signals(when_stopped):
            main()
        sys.stdout.flush()
        error = None if output is None else output.error
        if error is not None and error.errno not in GONE:
            sys.stderr.write(f"warning: a part of the output is lost ({error.strerror}).\n")
            if prints_result:
                sys.exit(CRASH_EXIT_CODE)


def _read_names_as_utf8() -> None:
    """Start over in Python's UTF-8 mode where the locale has another encoding.

    Libraries take the names of files for UTF-8: TensorBoard would fail, or write elsewhere. What is
    printed keeps the encoding of the terminal.
    """
    if sys.getfilesystemencoding() == "utf-8" or not sys.executable:
        return
    encoding = "utf-8" if sys.stdout is None else sys.stdout.encoding
    os.environ.setdefault("PYTHONIOENCODING", f"{encoding}:backslashreplace")
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def protect_output() -> _LossyFile | None:
    """Let neither standard stream raise from now on; return the first one's file, if any."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file that is opened would get what is printed
            os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(descriptor, True)
    output, sys.stdout = _protected(sys.stdout, "<stdout>")
    _, sys.stderr = _protected(sys.stderr, "<stderr>")
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    return output


def _protected(stream: TextIO | None, name: str) -> tuple[_LossyFile | None, TextIO]:
    """Return a stream that writes where another one does, and the file below it."""
    if stream is None:  # it was closed when the process began
        file = _LossyFile(os.open(os.devnull, os.O_WRONLY), name)
        return file, io.TextIOWrapper(file, "utf-8", "backslashreplace", write_through=True)
    if not isinstance(stream, io.TextIOWrapper):  # of a notebook: it sees to itself
        return None, stream
    is_strict = stream.errors in ("strict", "surrogateescape")
    errors = "backslashreplace" if is_strict else stream.errors
    with contextlib.suppress(OSError):
        # Whoever has taken hold of the old stream must not end by a character either.
        stream.reconfigure(errors=errors)
        stream.flush()
    file = _LossyFile(stream.fileno(), name)
    return file, io.TextIOWrapper(
        file if stream.write_through else io.BufferedWriter(file),
        stream.encoding,
        errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def is_reporter() -> bool:
    """Tell whether this process prints for all that a launcher started with it."""
    try:
        return read_place_on_node().rank == 0
    except ConfigError:  # said where the place decides something
        return True


@contextmanager
def _leaving_on_signals(when_stopped: str) -> Iterator[None]:
    """Turn signals into one line and an exit; what is open is closed first."""
    last_sec = -REPEAT_SEC

    def stop(number: int, _frame: FrameType | None) -> None:
        nonlocal last_sec
        is_repeated, last_sec = time.monotonic() - last_sec < REPEAT_SEC, time.monotonic()
        if not is_repeated:
            raise StopRequest(number)

    for number in unignored_signals():
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt as err:
        number = err.number if isinstance(err, StopRequest) else signal.SIGINT
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        start = "\n" if sys.stderr.isatty() else ""  # behind ^C, or a bar
        text = f"{start}stopped by {name}; {when_stopped}\n" if is_reporter() else ""
        leave(SIGNAL_EXIT_CODE + number, text, SLOW_READER_SEC)
