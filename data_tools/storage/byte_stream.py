"""Read bytes from another machine and give up when they stall; here, from a command's output.

A stream is one attempt; storage/fetch.py repeats it.
"""

import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Protocol, Self

from data_tools.errors import ConfigError

CHUNK_BYTES = 1 << 20
_ENVIRONMENT_PREFIX = "SWITCH_DIT_FETCH_"
_TAIL_BYTES = 4096  # of what a command says, for its last line


class TransferError(Exception):
    """An attempt failed; the message is the cause, without the file's name."""

    max_times = sys.maxsize  # after so many of a kind, another attempt would not help
    is_lasting = False  # it does not pass by itself: a person must correct something
    is_missing = False  # there is no such file
    retry_after_sec = 0.0  # the server asked to be left alone for so long


class RefusalError(TransferError):
    """The other side said no: it will say so again, unless the file is being put there."""

    max_times = 3
    is_lasting = True


class AbsentError(RefusalError):
    """A store that is never behind says that there is no such file."""

    max_times = 1
    is_missing = True


class NoSuchPartError(TransferError):
    """The server does not have the rest of this version of the file."""


@dataclass(frozen=True)
class Patience:
    """How long to wait for the other side, and how often to try."""

    connect_sec: float = 10.0
    stall_sec: float = 30.0  # without a byte
    attempts: int = 10  # with the pauses between them, two minutes
    backoff_sec: float = 0.5  # before the second attempt; doubles up to 30 s

    @classmethod
    def from_environment(cls) -> Self:
        """Read SWITCH_DIT_FETCH_CONNECT_SEC, _STALL_SEC, _ATTEMPTS and _BACKOFF_SEC."""
        values = {}
        for field in fields(cls):
            name = _ENVIRONMENT_PREFIX + field.name.upper()
            if text := os.environ.get(name):
                try:
                    values[field.name] = type(field.default)(text)
                    is_good = 0 < values[field.name] < float("inf")
                except ValueError:
                    is_good = False
                if not is_good:
                    raise ConfigError(f"{name} {text}: is no positive number; correct or unset it.")
        return cls(**values)


class Stream(Protocol):
    """The bytes of a file from `start` on."""

    start: int  # what was asked for, or 0 if the other side can only begin at the beginning
    length: int | None  # of the whole file, where it is known
    validator: str  # ETag or date, by which a server recognises the same version of the file
    origin: str  # the type of content that the server announces, and where it redirected to; or ""

    def read(self) -> bytes:
        """Return the next bytes, none at the end; raises TransferError."""
        ...

    def close(self) -> None:
        """Let go of the connection or the process."""
        ...


class ProcessStream:
    """The standard output of a command, which has to end with exit code 0."""

    length = None
    validator = ""
    origin = ""

    def __init__(
        self,
        command: list[str],
        start: int,
        patience: Patience,
        failure: Callable[[str], type[TransferError]] = lambda said: TransferError,
    ) -> None:
        """Start a command that prints the file from `start` on; `failure` judges its last line."""
        self.start, self._stall_sec, self._failure = start, patience.stall_sec, failure
        # A file and no pipe: what the command leaves running may keep a pipe open for ever.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 -- close() closes it
        # A session of its own, so that ending it reaches what a shell has started.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )
        self._output = self._process.stdout.fileno()
        self._poll = select.poll()
        self._poll.register(self._output, select.POLLIN)

    def read(self) -> bytes:
        """Return what the command has printed; at the end, check how it ended."""
        if not self._poll.poll(self._stall_sec * 1000):
            raise TransferError(f"the command printed nothing for {self._stall_sec:g} s")
        chunk = os.read(self._output, CHUNK_BYTES)
        if not chunk:
            self._check_exit_code()
        return chunk

    def close(self) -> None:
        """End the command if it still runs."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _check_exit_code(self) -> None:
        try:
            code = self._process.wait(self._stall_sec)
        except subprocess.TimeoutExpired as err:
            raise TransferError("the command does not end") from err
        if code:
            self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = self._errors.read().decode(errors="replace").strip().splitlines()
            said = lines[-1] if lines else ""
            cause = f"the command ended with exit code {code}{said and f': {said}'}"
            raise self._failure(said)(cause)
