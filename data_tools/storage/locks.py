"""Lock files between the processes of a node, with flocks, which end with their process."""

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_tools.errors import ConfigError

_POLL_SEC = 0.02
_NEVER = threading.Event()
AT_ONCE = threading.Event()  # a stop that is set: take a lock without waiting
AT_ONCE.set()
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class StoppedError(Exception):
    """Waiting for a lock or a transfer was stopped from outside."""


def try_lock(descriptor: int, path: Path, is_shared: bool = False) -> bool:
    """Take a lock that lasts until the descriptor is closed; False if another one has it."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as err:
        if err.errno not in _NO_LOCKS:
            raise
        raise ConfigError(
            f"--data-cache {path.parent}: this file system has no locks (flock: {err.strerror}), "
            "which processes that share a cache need; name a folder on the node's own disk."
        ) from err
    return True


def lock(
    descriptor: int, path: Path, is_shared: bool = False, stop: threading.Event | None = None
) -> None:
    """Wait for a lock; polling, because a blocked flock could not be stopped."""
    while not try_lock(descriptor, path, is_shared):
        if (stop or _NEVER).wait(_POLL_SEC):
            raise StoppedError


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Open a file that is no link, as a descriptor; one that is made is for this user alone."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def lock_file(path: Path, stop: threading.Event | None = None) -> Iterator[None]:
    """Hold the lock of a file that exists only for it and is removed at the end."""
    while True:
        with opened(path, os.O_RDWR | os.O_CREAT) as descriptor:
            lock(descriptor, path, stop=stop)
            if _is_at(path, descriptor):  # else the one who held it has removed it
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
