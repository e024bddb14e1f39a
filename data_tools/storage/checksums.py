"""Check files against their sha256, once per node as long as a file stays the same."""

import errno
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from data_tools.storage.locks import lock

_CHUNK_BYTES = 1 << 20
_State = tuple[int, int, int, int]  # device, inode, size, time of change
# The last: a limit on the size of files (ulimit -f), or of the file system.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def descriptor_sha256(descriptor: int) -> str:
    """Return the sha256 of an open file; its offset is neither used nor changed."""
    digest, buffer, offset = hashlib.sha256(), bytearray(_CHUNK_BYTES), 0
    while count := os.preadv(descriptor, [buffer], offset):
        digest.update(memoryview(buffer)[:count])
        offset += count
    return digest.hexdigest()


class RememberedChecksums:
    """Checks files against sha256 sums, and remembers on this node which ones were right.

    A file is read again if its inode, size or time of change is another one, and after the machine
    was started again: what a crash left in it is unknown. Several processes may use the folder;
    a file is read by one of them while the others wait.
    """

    def __init__(self, folder: Path) -> None:
        """Remember in files below `folder`, which exists and belongs to the user alone."""
        self._folder = folder / "verified"
        # So that a second look opens no file.
        self._known: dict[Path, tuple[_State, str]] = {}

    def matches(
        self, path: Path, descriptor: int, sha256: str, stop: threading.Event | None = None
    ) -> bool:
        """Say whether an open file has this sha256.

        Args:
            path: of the file, absolute or not; what is remembered is remembered under it.
            sha256: expected, hexadecimal.
            stop: when set, waiting for another process that reads it ends with StoppedError.
        """
        state = _state(descriptor)
        if self._known.get(path) == (state, sha256):
            return True
        mark = _mark(state, sha256)
        with self._locked_mark(path, stop) as file:
            if file is None or os.pread(file, len(mark) + 1, 0) != mark:
                is_right = descriptor_sha256(descriptor) == sha256
                if not is_right or _state(descriptor) != state:  # changed while it was read
                    return False
                if file is not None:
                    _write(file, mark)
        self._known[path] = (state, sha256)
        return True

    def remember(self, path: Path, descriptor: int, sha256: str) -> None:
        """Note that an open file, which will be at `path`, was found to have this sha256."""
        with self._locked_mark(path) as file:
            if file is not None:
                _write(file, _mark(_state(descriptor), sha256))

    def forget(self, path: Path) -> None:
        """Drop what is remembered of a file that is being deleted."""
        self._known.pop(path, None)
        self._mark_path(path).unlink(missing_ok=True)

    def _mark_path(self, path: Path) -> Path:
        return self._folder / hashlib.sha256(os.fsencode(path.absolute())).hexdigest()

    @contextmanager
    def _locked_mark(self, path: Path, stop: threading.Event | None = None) -> Iterator[int | None]:
        """Open the file that remembers; None on a full disk, where nothing can be remembered."""
        path = self._mark_path(path)
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as err:
            if err.errno not in DISK_FULL:
                raise
            yield None
            return
        try:
            lock(file, path, stop=stop)
            yield file
        finally:
            os.close(file)


def _write(file: int, mark: bytes) -> None:
    # Killed in between, the mark is shorter than it should be and counts as none.
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, mark, 0)
    except OSError as err:
        # Without room for the mark the file will be read again, which is slow but right.
        if err.errno not in DISK_FULL:
            raise


def _state(descriptor: int) -> _State:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _mark(state: _State, sha256: str) -> bytes:
    return json.dumps([*state, sha256, _boot_id()]).encode()


@cache
def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:  # not Linux: a crash of the machine goes unnoticed
        return ""
