"""Fetch files from a location: try again on failure, resume where possible, always check."""

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from data_tools.errors import ConfigError, OutageError, count_of
from data_tools.storage.byte_stream import (
    Patience,
    ProcessStream,
    RefusalError,
    Stream,
    TransferError,
)
from data_tools.storage.checksums import descriptor_sha256
from data_tools.storage.http_stream import open_http
from data_tools.storage.locations import Location
from data_tools.storage.locks import StoppedError, opened
from data_tools.storage.object_stores import open_object
from data_tools.storage.server_answers import instead_of_file
from data_tools.user_files.place_names import PIPE

_MAX_BACKOFF_SEC = 30.0
_MIN_BYTES_PER_SEC = 1024  # a server that trickles is stalled, too
_JITTER = random.SystemRandom()  # leaves the seeded generators alone
_Result = TypeVar("_Result")


class MissingFileError(ConfigError):
    """There is no such file at the location."""


class _WrongContentError(TransferError):
    """All bytes came and they are not the right ones."""

    max_times = 2  # once more, in case a proxy or the network was at fault
    is_lasting = True


def read_small(
    location: Location,
    name: str,
    limit_bytes: int,
    *,
    patience: Patience | None = None,
    on_failure: Callable[[str], object] = lambda text: None,
) -> bytes:
    """Return the content of a small file.

    Args:
        limit_bytes: most that it may have.
        patience: with the other side; default from the environment.
        on_failure: called with a sentence before each pause.

    Raises:
        MissingFileError: there is none.
        OutageError: the server failed until the last attempt.
        ConfigError: it cannot be read, or has more than limit_bytes.
    """
    if location.folder is not None:
        return _read_local(location.path(name), limit_bytes)
    patience = patience or Patience.from_environment()
    what = location.describe(name)

    def attempt() -> bytes:
        parts, count = [], 0
        with closing(_open_stream(location.url(name), 0, "", patience)) as stream:
            for chunk in _chunks(stream, name, patience.stall_sec):
                parts.append(chunk)
                count += len(chunk)
                if count > limit_bytes:
                    raise ConfigError(_too_large(what, limit_bytes))
            if stream.length not in (None, count):
                raise TransferError(f"the connection ended at byte {count} of {stream.length}")
        return b"".join(parts)

    return _persist(attempt, what, patience, threading.Event(), on_failure)


def fetch(
    location: Location,
    name: str,
    path: Path,
    *,
    num_bytes: int,
    sha256: str,
    patience: Patience | None = None,
    cancel: threading.Event | None = None,
) -> None:
    """Bring a file of known size and checksum to `path`.

    What is at `path` already is taken for the file's beginning. After a failure it stays there, for
    the next try; bytes that are known to be wrong are removed.

    Args:
        location: remote.
        path: where it goes; created if need be.
        sha256: that it has, hexadecimal.
        patience: with the other side; default from the environment.
        cancel: when set, the fetch stops with StoppedError.

    Raises:
        OutageError: after the last attempt, the server failed; it may come back by itself.
        ConfigError: the same of what a person must correct: no such file, no permission, other
            bytes. Both name the URL, the attempts and the last cause.
        OSError: `path` cannot be written.
    """
    patience, cancel = patience or Patience.from_environment(), cancel or threading.Event()
    url, validator = location.url(name), ""

    def attempt() -> None:
        nonlocal validator
        start = os.fstat(file).st_size
        if start < num_bytes:
            with closing(_open_stream(url, start, validator, patience)) as stream:
                start, validator = stream.start, stream.validator
                os.ftruncate(file, start)
                chunks = _chunks(stream, name, patience.stall_sec)
                if stream.length not in (None, num_bytes):
                    os.ftruncate(file, 0)
                    next(chunks, b"")  # which may tell what came instead
                    found = f"it has {stream.length} bytes there"
                    raise RefusalError(f"{found}, dataset.json says {num_bytes}")
                _copy(chunks, start, file, num_bytes, cancel)
        if os.fstat(file).st_size != num_bytes or descriptor_sha256(file) != sha256:
            os.ftruncate(file, 0)
            if start:  # two versions may have met
                raise TransferError("its parts did not fit together")
            raise _WrongContentError("its sha256 is not that of dataset.json")

    with opened(path, os.O_RDWR | os.O_CREAT) as file:
        _persist(attempt, location.describe(name), patience, cancel)


def _open_stream(url: str, start: int, validator: str, patience: Patience) -> Stream:
    """Open a URL of Location.url from byte `start` on, if it is still the same version.

    Raises:
        TransferError: the attempt failed.
        ConfigError: the program that reads such URLs is not installed.
    """
    if url.startswith(PIPE):
        return ProcessStream(["/bin/sh", "-c", url.removeprefix(PIPE)], 0, patience)
    if urlsplit(url).scheme in ("http", "https"):
        return open_http(url, start, validator, patience)
    return open_object(url, start, patience)


def _chunks(stream: Stream, name: str, stall_sec: float) -> Iterator[bytes]:
    """Yield what comes, unless it is a page or a message in the file's place, or a trickle."""
    is_beginning = stream.start == 0
    since, count = time.monotonic(), 0
    while chunk := stream.read():
        count += len(chunk)
        seconds = time.monotonic() - since
        if seconds >= stall_sec:  # no time-out for a single byte notices a server that trickles
            if count < _MIN_BYTES_PER_SEC * seconds:
                raise TransferError(f"only {count} bytes came in {seconds:.1f} s")
            since, count = time.monotonic(), 0
        if is_beginning and (wrong := instead_of_file(chunk, name, stream.origin)):
            raise _WrongContentError(wrong)
        is_beginning = False
        yield chunk


def _copy(
    chunks: Iterator[bytes], position: int, file: int, num_bytes: int, cancel: threading.Event
) -> None:
    for chunk in chunks:
        if cancel.is_set():
            raise StoppedError
        if position + len(chunk) > num_bytes:
            os.ftruncate(file, 0)
            raise RefusalError(f"it has more than the {num_bytes} bytes of dataset.json")
        rest = memoryview(chunk)
        while rest:  # a disk that becomes full takes a part
            written = os.pwrite(file, rest, position)
            position, rest = position + written, rest[written:]
    if position != num_bytes:
        raise TransferError(f"the connection ended at byte {position} of {num_bytes}")


def _persist(
    attempt: Callable[[], _Result],
    what: str,
    patience: Patience,
    cancel: threading.Event,
    on_failure: Callable[[str], object] = lambda text: None,
) -> _Result:
    """Call attempt() until it succeeds; pause longer after each failure, and never in step.

    Thousands of processes that lost the same server must not come back at the same moment.
    """
    times: Counter[type[TransferError]] = Counter()
    while True:
        if cancel.is_set():
            raise StoppedError
        try:
            return attempt()
        except TransferError as err:
            times[type(err)] += 1
            if times.total() >= patience.attempts or times[type(err)] >= err.max_times:
                lasting = MissingFileError if err.is_missing else ConfigError
                tried = count_of(times.total(), "attempt")
                raise (lasting if err.is_lasting else OutageError)(
                    f"{what}: could not be fetched in {tried}, the last time because {err}; see to "
                    "it that it can be read, then start again."
                ) from err
            pause = patience.backoff_sec * 2 ** min(times.total() - 1, 16)
            pause = min(pause, _MAX_BACKOFF_SEC) * _JITTER.uniform(0.5, 1.5)
            pause = max(pause, min(err.retry_after_sec, _MAX_BACKOFF_SEC))
            most = min(patience.attempts, err.max_times)
            on_failure(
                f"{what}: attempt {times.total()} of {most} failed ({err}); the next in "
                f"{pause:.1f} s"
            )
            if cancel.wait(pause):
                raise StoppedError from err


def _read_local(path: Path, limit_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(limit_bytes + 1)
    except FileNotFoundError as err:
        raise MissingFileError(f"{path}: is missing; see to it that it is there.") from err
    except OSError as err:
        raise ConfigError(
            f"{path}: cannot be read ({err.strerror}); see to it that it can."
        ) from err
    if len(content) > limit_bytes:
        raise ConfigError(_too_large(str(path), limit_bytes))
    return content


def _too_large(what: str, limit_bytes: int) -> str:
    return (
        f"{what}: has more than {limit_bytes} bytes, too many for what it should be; see that it "
        "is the right file."
    )
