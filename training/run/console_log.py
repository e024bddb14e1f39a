"""What a run printed, with times, in files of bounded size: log.txt and, older, log.txt.1, ..."""

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from logging import Formatter, LogRecord, makeLogRecord
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from training.ranks.process_group import RunError

LOG_FILE = "log.txt"
MAX_BYTES = 8 << 20
NUM_OLDER = 3


class _File(RotatingFileHandler):
    """Lose the log rather than the training."""

    def __init__(self, path: Path, terminal: TextIO) -> None:
        super().__init__(
            path,
            maxBytes=MAX_BYTES,
            backupCount=NUM_OLDER,
            encoding="utf-8",
            delay=True,
            errors="backslashreplace",  # names of files may hold any bytes
        )
        self.setFormatter(Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%SZ"))
        self.formatter.converter = time.gmtime
        self.terminal, self._has_warned = terminal, False

    def note(self, line: str) -> None:
        """Add a line."""
        self.emit(makeLogRecord({"msg": line}))

    def handleError(self, record: LogRecord) -> None:  # noqa: N802 -- logging calls it so
        """Say so once; the next line may fit again."""
        if not self._has_warned:
            self._has_warned = True
            reason = sys.exc_info()[1]
            self.terminal.write(f"warning: {self.baseFilename}: lines are missing ({reason})\n")


class _Tee:
    """A text stream whose lines go to the log too, or only there."""

    def __init__(self, stream: TextIO, file: _File, is_muted: bool = False) -> None:
        self._stream, self._file, self._is_muted = stream, file, is_muted
        self._line, self._unseen = "", ""  # what is not yet in the log, and on the terminal

    def write(self, text: str) -> int:
        if not self._is_muted:
            whole, newline, self._unseen = (self._unseen + text).rpartition("\n")
            if newline:
                self._show(whole + newline)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._file.note(line.rpartition("\r")[2])
        return len(text)

    def flush(self) -> None:
        if self._unseen:
            self._show(self._unseen)
            self._unseen = ""
        self._stream.flush()

    def _show(self, text: str) -> None:
        with tqdm.external_write_mode(self._file.terminal):  # a bar steps aside, for whole lines
            self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def log_to(run_dir: Path, is_quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Copy what this process prints to the log of a run. Only rank 0 calls this.

    A disk that is full, or away, costs the lines of that time.

    Args:
        run_dir: of the run.
        is_quiet: what goes to the standard output is written to the log only.

    Yields:
        What adds a line to the log only.
    """
    file = _File(run_dir / LOG_FILE, sys.stderr)
    with ExitStack() as stack:
        stack.callback(file.close)
        for redirect, tee in (
            (redirect_stdout, _Tee(sys.stdout, file, is_quiet)),
            (redirect_stderr, _Tee(sys.stderr, file)),
        ):
            stack.callback(tee.flush)
            stack.enter_context(redirect(tee))
        try:
            yield file.note
        except RunError as err:
            file.note(f"error: {err}")
            raise
        except BaseException:
            file.note(traceback.format_exc().rstrip())
            raise
