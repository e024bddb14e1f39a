"""The node's cache of fetched shards, shared by all processes on it.

A file's name is the sha256 of its content. So copies of a data set share it, and nothing that a
manifest or a URL says decides where it lies. All locks are flocks, which end with the process:

    SHA.tar         a whole file; shared lock: in use, exclusive lock: being evicted
    SHA.BYTES.part  what has arrived of a file that will have BYTES, which are counted as taken
    SHA.lock        exclusive lock: the right to fetch that file
    cache.lock      exclusive lock: the right to count and to evict
"""

import errno
import os
import re
import stat
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from data_tools.errors import ConfigError, os_errors_as
from data_tools.storage.checksums import RememberedChecksums
from data_tools.storage.locks import AT_ONCE, StoppedError, lock, lock_file, opened, try_lock
from data_tools.user_files.paths import expand

_FLAG = "--data-cache"
_GIB = 1 << 30
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ENTRY = re.compile(r"([0-9a-f]{64})(?:\.tar|\.(\d+)\.part)")
_POLL_SEC = 0.1
_STALE_SEC = 7 * 86400  # so long, a part waits for the run that began it to be started again


class _Entry(NamedTuple):
    used_ns: int  # the sort key: least recently used first
    path: Path
    num_bytes: int


def default_cache_folder() -> Path:
    """Return $SWITCH_DIT_CACHE, or a folder of this user in the node's temporary folder."""
    if folder := os.environ.get("SWITCH_DIT_CACHE"):
        return Path(expand(folder, "SWITCH_DIT_CACHE"))
    return Path(tempfile.gettempdir()) / f"switch-dit-cache-{os.getuid()}"


def open_cache(data_cache: str | None, data_cache_gib: float | None) -> "ShardCache":
    """Make the cache that the options ask for.

    Args:
        data_cache: folder; None for default_cache_folder().
        data_cache_gib: most that its files may take; None for no limit.
    """
    if data_cache_gib is not None and not 0 < data_cache_gib < float("inf"):
        raise ConfigError(
            f"{_FLAG}-gib {data_cache_gib}: is no size; name the GiB that the cache may take."
        )
    limit_bytes = None if data_cache_gib is None else int(data_cache_gib * _GIB)
    return ShardCache(Path(data_cache) if data_cache else default_cache_folder(), limit_bytes)


class ShardCache:
    """Whole, checked files under a limit; the least recently used one goes first.

    A file that some process holds open is never evicted.
    """

    def __init__(
        self, folder: Path, limit_bytes: int | None = None, *, wait_sec: float = 60.0
    ) -> None:
        """Make or check the folder.

        Args:
            folder: of this user alone.
            limit_bytes: most that files and unfinished fetches may take; None for no limit.
            wait_sec: how long to wait for others to let go of files in a full cache.
        """
        self.folder, self.limit_bytes, self._wait_sec = folder, limit_bytes, wait_sec
        _make_private(folder)
        self._lock_path = folder / "cache.lock"
        self.checksums = RememberedChecksums(folder)
        for entry in self._entries():
            is_stale = time.time_ns() - entry.used_ns > _STALE_SEC * 1_000_000_000
            if entry.path.suffix == ".part" and is_stale:
                self._remove_part(entry.path)

    def open(
        self,
        sha256: str,
        num_bytes: int,
        fetch: Callable[[Path], None],
        cancel: threading.Event | None = None,
    ) -> int:
        """Return a descriptor of a file; until it is closed, the file stays.

        Args:
            sha256: of the content, hexadecimal.
            num_bytes: of the content.
            fetch: brings the content to a path, continuing what is there, and checks it; called by
                one process at a time, and only if the file is not here.
            cancel: when set, waiting for another process ends with StoppedError.
        """
        if not _SHA256.fullmatch(sha256):
            raise ConfigError(f"sha256 {sha256!r}: is none; correct the dataset.json that says so.")
        problem = f"{_FLAG} {self.folder}: a file of {num_bytes} bytes cannot be kept there"
        with os_errors_as(problem, "free space or name another folder, then start again"):
            while True:
                descriptor = self._open_whole(sha256, num_bytes, cancel)
                if descriptor is None:
                    descriptor = self._fill(sha256, num_bytes, fetch, cancel)
                if descriptor is not None:
                    return descriptor

    def _open_whole(
        self, sha256: str, num_bytes: int, cancel: threading.Event | None
    ) -> int | None:
        """Open and hold a file; None if it is not here or is damaged."""
        path = self.folder / f"{sha256}.tar"
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as err:
            if err.errno in (errno.ENOENT, errno.ELOOP):  # the latter: a link was put there
                return None
            raise
        try:
            lock(descriptor, path, is_shared=True, stop=cancel)
            status = os.fstat(descriptor)
            if (
                status.st_nlink  # else it was evicted before it was locked
                and status.st_size == num_bytes
                and self.checksums.matches(path, descriptor, sha256)
            ):
                # The time of access says when it was last used, whatever the mount options.
                os.utime(descriptor, ns=(time.time_ns(), status.st_mtime_ns))
                held, descriptor = descriptor, -1
                return held
            return None
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _fill(
        self,
        sha256: str,
        num_bytes: int,
        fetch: Callable[[Path], None],
        cancel: threading.Event | None,
    ) -> int | None:
        """Fetch a file and open it; None if it was evicted in between."""
        path = self.folder / f"{sha256}.tar"
        part = self.folder / f"{sha256}.{num_bytes}.part"
        with lock_file(self.folder / f"{sha256}.lock", cancel):
            descriptor = self._open_whole(sha256, num_bytes, cancel)
            if descriptor is not None:  # another process has just fetched it
                return descriptor
            self._reserve(part, num_bytes, cancel)
            while True:
                try:
                    fetch(part)
                    break
                except OSError as err:
                    if not self._free_disk(err, part, num_bytes, cancel):
                        part.unlink(missing_ok=True)
                        raise
            with opened(part) as descriptor:
                self.checksums.remember(path, descriptor, sha256)
            os.replace(part, path)
            return self._open_whole(sha256, num_bytes, cancel)

    def _reserve(self, part: Path, num_bytes: int, cancel: threading.Event | None) -> None:
        """Make room for a file; what is created here counts as taken from now on."""
        deadline = time.monotonic() + self._wait_sec
        while True:
            with lock_file(self._lock_path, cancel):
                missing = 0
                if self.limit_bytes is not None:
                    others = [entry for entry in self._entries() if entry.path != part]
                    taken = sum(entry.num_bytes for entry in others)
                    missing = self._evict(others, taken + num_bytes - self.limit_bytes)
                if missing <= 0:
                    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                    os.close(os.open(part, flags, 0o600))
                    return
            if time.monotonic() > deadline or num_bytes > self.limit_bytes:
                raise ConfigError(
                    f"{_FLAG}-gib {self.limit_bytes / _GIB:.4g}: {self.folder} would need "
                    f"{missing} bytes more for the files in use at once; allow more, or lower "
                    "--shuffle-window."
                )
            if (cancel or threading.Event()).wait(_POLL_SEC):
                raise StoppedError

    def _free_disk(
        self, err: OSError, part: Path, num_bytes: int, cancel: threading.Event | None
    ) -> bool:
        """Say whether a fetch that failed may go on, because files could be evicted for it."""
        if err.errno not in (errno.ENOSPC, errno.EDQUOT):
            return False
        with lock_file(self._lock_path, cancel):
            others = [entry for entry in self._entries() if entry.path != part]
            needed = num_bytes - part.stat().st_size
            return self._evict(others, needed) < needed

    def _entries(self) -> list[_Entry]:
        entries = []
        for item in os.scandir(self.folder):
            if match := _ENTRY.fullmatch(item.name):
                with suppress(FileNotFoundError):  # just evicted, or just finished
                    status = item.stat(follow_symlinks=False)
                    used_ns, num_bytes = status.st_atime_ns, status.st_size
                    if match[2]:
                        used_ns, num_bytes = status.st_mtime_ns, int(match[2])
                    entries.append(_Entry(used_ns, Path(item), num_bytes))
        return sorted(entries)

    def _evict(self, entries: list[_Entry], num_bytes: int) -> int:
        """Remove what nobody uses, in this order, until num_bytes are free; return the rest."""
        for entry in entries:
            if num_bytes <= 0:
                break
            remove = self._remove_part if entry.path.suffix == ".part" else self._remove_whole
            if remove(entry.path):
                num_bytes -= entry.num_bytes
        return num_bytes

    def _remove_whole(self, path: Path) -> bool:
        with suppress(FileNotFoundError), opened(path) as descriptor:
            if try_lock(descriptor, path):
                path.unlink(missing_ok=True)
                self.checksums.forget(path)
                return True
        return False

    def _remove_part(self, path: Path) -> bool:
        """Remove what a process that was killed has left."""
        lock_path = path.with_name(f"{path.name.partition('.')[0]}.lock")
        with suppress(StoppedError), lock_file(lock_path, AT_ONCE):
            path.unlink(missing_ok=True)
            return True
        return False  # another process fetches it


def _make_private(folder: Path) -> None:
    with os_errors_as(f"{_FLAG} {folder}: cannot be made", "name a folder on the node's disk"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        link, status = folder.lstat(), folder.stat()
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"{_FLAG} {folder}: is no folder; name another one.")
    # Whoever can write there, or can exchange the folder, decides what is trained on.
    if {link.st_uid, status.st_uid} != {os.geteuid()} or status.st_mode & 0o022:
        raise ConfigError(
            f"{_FLAG} {folder}: others can write there; name a folder of your own, with chmod 700."
        )
