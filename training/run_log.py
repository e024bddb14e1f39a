"""What a run printed, with times, in files of bounded size: log.txt and, older, log.txt.1, ..."""

import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from logging import Formatter, LogRecord, makeLogRecord
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, TextIO

from training.processes import RunError

LOG_FILE = "log.txt"
MAX_BYTES = 8 << 20
NUM_OLDER = 3


class _File(RotatingFileHandler):
    """Lose the log rather than the training."""

    def __init__(self, path: Path, terminal: TextIO) -> None:
        super().__init__(
            path, maxBytes=MAX_BYTES, backupCount=NUM_OLDER, encoding="utf-8", delay=True
        )
        self.setFormatter(Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%SZ"))
        self.formatter.converter = time.gmtime
        self._terminal, self._has_warned = terminal, False

    def handleError(self, record: LogRecord) -> None:  # noqa: N802 -- logging calls it so
        """Say so once; the next line may fit again."""
        if not self._has_warned:
            self._has_warned = True
            reason = sys.exc_info()[1]
            self._terminal.write(f"warning: {self.baseFilename}: lines are missing ({reason})\n")


class _Tee:
    """A text stream whose lines go to the log too."""

    def __init__(self, stream: TextIO, file: _File) -> None:
        self._stream, self._file, self._line = stream, file, ""

    def write(self, text: str) -> int:
        count = self._stream.write(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._file.emit(makeLogRecord({"msg": line.rpartition("\r")[2]}))
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def log_to(run_dir: Path) -> Iterator[None]:
    """Copy what this process prints to the log of a run. Only rank 0 calls this.

    A disk that is full, or away, costs the lines of that time.
    """
    file = _File(run_dir / LOG_FILE, sys.stderr)
    with ExitStack() as stack:
        stack.callback(file.close)
        stack.enter_context(redirect_stdout(_Tee(sys.stdout, file)))
        stack.enter_context(redirect_stderr(_Tee(sys.stderr, file)))
        try:
            yield
        except RunError as err:
            file.emit(makeLogRecord({"msg": f"error: {err}"}))
            raise
        except BaseException:
            file.emit(makeLogRecord({"msg": traceback.format_exc().rstrip()}))
            raise
