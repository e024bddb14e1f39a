"""End a process at once: say why, flush what is written, exit without Python's teardown.

The teardown waits for threads that may hang, and takes C++ libraries apart while their own threads
still run: gloo's can abort a process whose work is all saved. `leave` is the one way out, and the
only caller of os._exit in the project.
"""

import _thread
import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

PATIENCE_SEC = 1.0  # for words, and for files: the disk below them may be lost

_flushes: list[Callable[[], object]] = []
_is_teardown_skipped = threading.Event()


def leave(exit_code: int, text: str = "", patience_sec: float = PATIENCE_SEC) -> NoReturn:
    """End this process, from any thread or a signal's handler, whatever its other threads do.

    Args:
        exit_code: one of data_tools/exit_codes.py.
        text: whole lines for the standard error.
        patience_sec: seconds to wait for the text, and again for all that is flushed.
    """
    say(text, patience_sec)
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream]  # None: it was closed
    _try([*(stream.flush for stream in streams), *_flushes], patience_sec)
    os._exit(exit_code)


def say(text: str, patience_sec: float = PATIENCE_SEC) -> None:
    """Write whole lines to the standard error, but wait no longer than `patience_sec` for it."""

    def write() -> None:
        sys.stderr.write(text)
        sys.stderr.flush()

    if text and sys.stderr:
        _try([write], patience_sec)


@contextmanager
def flushed_when_leaving(flush: Callable[[], object]) -> Iterator[None]:
    """Have `leave` call `flush`, from whatever thread, as long as this context lasts."""
    _flushes.append(flush)
    try:
        yield
    finally:
        _flushes.remove(flush)


def skip_teardown() -> None:
    """Have this process leave by `leave` when its command has ended: it has met other ranks."""
    _is_teardown_skipped.set()


@contextmanager
def without_teardown_if_asked() -> Iterator[None]:
    """End the process at the end of this context, if `skip_teardown` was called inside.

    Threads are joined and atexit's functions run before, as Python does it: children end, and
    shared memory and temporary folders are removed. What is raised passes, but for SystemExit.
    """
    exit_code = None
    try:
        yield
    except SystemExit as err:
        exit_code = err.code
        if not _is_teardown_skipped.is_set():
            raise
    if _is_teardown_skipped.is_set():
        assert exit_code is None or isinstance(exit_code, int), "we exit with numbers only"
        threading._shutdown()  # both calls: as multiprocessing ends its own children
        atexit._run_exitfuncs()
        leave(exit_code or 0)


def _try(calls: Sequence[Callable[[], object]], patience_sec: float) -> None:
    """Make calls that may fail or hang, and go on after a while in any case.

    With the lowest layer of threads, because the handler of a signal may have interrupted the
    main thread while it holds the locks of the layer above.
    """
    done = _thread.allocate_lock()
    done.acquire()

    def make_them() -> None:
        for call in calls:
            with contextlib.suppress(OSError, ValueError):  # a full disk; a stream that is closed
                call()
        done.release()

    with contextlib.suppress(RuntimeError):  # there is no memory for a thread
        _thread.start_new_thread(make_them, ())
        done.acquire(timeout=patience_sec)
