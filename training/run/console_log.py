"""Log what a run prints: to the terminal as it is, with times to log.txt and, older, log.txt.1, ...

A logger has three handlers: INFO is for the standard output, WARNING for the standard error, and
the files get both, and DEBUG, which is for them alone. The two standard streams are replaced, so
that what libraries print, and the traceback of a thread, reach the logger as well. What C code
writes by itself goes past it.
"""

import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from training.ranks.agreement import RunError

LOG_FILE = "log.txt"
MAX_BYTES = 8 << 20
NUM_OLDER = 3
LOG = logging.getLogger("switch-dit")


class _Timed(logging.Formatter):
    """Lines, each with the time in UTC."""

    converter = time.gmtime

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 -- logging calls it so
        """Keep of a bar what a terminal shows in the end."""
        lines = []
        for line in record.message.split("\n"):
            record.message = line.rpartition("\r")[2]
            lines.append(super().formatMessage(record))
        return "\n".join(lines)


class _LogFile(RotatingFileHandler):
    """Files of bounded size; a full disk costs lines of the log, not the training."""

    def __init__(self, run_dir: Path, terminal: TextIO) -> None:
        super().__init__(
            run_dir / LOG_FILE,
            maxBytes=MAX_BYTES,
            backupCount=NUM_OLDER,
            encoding="utf-8",
            delay=True,
            errors="backslashreplace",  # names of files may hold any bytes
        )
        self.setFormatter(_Timed("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%SZ"))
        self._terminal, self._has_warned = terminal, False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 -- logging calls it so
        """Say so once; the next line may fit again."""
        if not self._has_warned:
            self._has_warned = True
            reason = sys.exc_info()[1]
            self._terminal.write(f"warning: {self.baseFilename}: lines are missing ({reason})\n")


class _Console(logging.StreamHandler):
    """A stream of the terminal, on which a bar steps aside for whole lines."""

    def __init__(self, stream: TextIO, terminal: TextIO, level: int) -> None:
        super().__init__(stream)
        self._terminal = terminal
        self.addFilter(lambda record: record.levelno == level)

    def handle(self, record: logging.LogRecord) -> bool:
        """Write lines; tqdm.write would know a bar on this very stream only.

        Tqdm's lock is taken before the handler's, as by a bar that ends and logs its last line.
        """
        if not self.filter(record):
            return False
        with tqdm.external_write_mode(self._terminal):
            return bool(super().handle(record))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 -- logging calls it so
        """Lose what the terminal does not take."""


class _LoggedStream:
    """A text stream whose whole lines are logged, those of one text together."""

    def __init__(self, stream: TextIO, level: int) -> None:
        self._stream, self._level, self._rest = stream, level, ""

    def write(self, text: str) -> int:
        lines, line_end, self._rest = (self._rest + text).rpartition("\n")
        if line_end:  # at once: the terminal has all of a report before a disk can hang
            LOG.log(self._level, lines)
        return len(text)

    def end_line(self) -> None:
        if self._rest:
            self.write("\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def log_to(run_dir: Path, is_quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Log what this process prints to the files of a run. Only rank 0 calls this.

    A disk that is full, or away, costs the lines of that time. If it is quiet, what goes to the
    standard output is written to the files only.

    Yields:
        What adds a line to the files only.
    """
    terminal = sys.stderr
    # The files last: a disk that hangs must not keep a line from the terminal.
    handlers = [_Console(sys.stderr, terminal, logging.WARNING), _LogFile(run_dir, terminal)]
    if not is_quiet:
        handlers.insert(0, _Console(sys.stdout, terminal, logging.INFO))
    LOG.setLevel(logging.DEBUG)
    LOG.propagate = False
    with ExitStack() as stack:
        for handler in handlers:
            LOG.addHandler(handler)
            stack.callback(handler.close)
            stack.callback(LOG.removeHandler, handler)
        try:
            with (
                _logged(redirect_stdout, sys.stdout, logging.INFO),
                _logged(redirect_stderr, sys.stderr, logging.WARNING),
            ):
                yield LOG.debug
        except RunError as err:
            LOG.debug(f"error: {err}")
            raise
        except BaseException:
            LOG.debug(traceback.format_exc().rstrip())
            raise


@contextmanager
def _logged(redirect: type, stream: TextIO, level: int) -> Iterator[None]:
    logged = _LoggedStream(stream, level)
    with redirect(logged):
        try:
            yield
        finally:
            logged.end_line()
