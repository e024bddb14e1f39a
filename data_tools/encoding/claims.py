"""Claim pieces of work, so that processes on several machines divide it without a server.

A claim is a file that one process created (O_CREAT | O_EXCL is atomic on NFS too). A thread renews
it. A claim is stale when its process is dead, which the same machine sees at once, or when it was
not renewed for LEASE_SEC, by the clock of the file server alone. Two processes may hold one claim
for a moment, after a machine was suspended or while both take over a stale one; so the work must be
such that doing it twice is harmless.
"""

import json
import os
import shutil
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_tools.files import MalformedError, from_json, parse_json

LEASE_SEC = 60.0
RENEW_SEC = 10.0
_SUFFIX = ".lock"
_MAX_BYTES = 4096


@dataclass(frozen=True)
class Owner:
    """Who holds a claim, and how far it is."""

    host: str  # for people
    machine: str  # one boot of one kernel and its namespace of process numbers
    pid: int  # valid on that machine
    started: int  # in ticks since boot; a pid is used again, this is not
    token: str  # of this object's process
    done: int  # units of work done on the piece


def _start_of(pid: int) -> int | None:
    """Return when a process started; None if there is none, or only its remains."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name before may hold anything
    return None if fields[0] in "ZX" else int(fields[19])


class Claims:
    """The claims of one process in a folder; use as a context manager, which gives them back."""

    def __init__(
        self, folder: Path, lease_sec: float = LEASE_SEC, renew_sec: float = RENEW_SEC
    ) -> None:
        """Make the folder and start renewing.

        Args:
            folder: holds nothing but claims.
            lease_sec: after this long without renewal, a claim of another machine is stale. Above
                renew_sec by enough for a slow file server.
            renew_sec: between renewals.
        """
        self.folder, self.lease_sec, self.renew_sec = folder, lease_sec, renew_sec
        self.token = uuid.uuid4().hex
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        self.machine = f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
        self._started = _start_of(os.getpid()) or 0
        self._done: dict[str, int] = {}  # of each claim held
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="claims", daemon=True)
        self._now()  # the folder, and a file in it that keeps others from removing it
        self._thread.start()

    def __enter__(self) -> "Claims":
        return self

    def __exit__(self, *_: object) -> None:
        """Give all claims back and leave no trace; the folder goes with the last process."""
        self._is_over.set()
        self._thread.join()
        for name in list(self._done):
            self.release(name)
        self._probe.unlink(missing_ok=True)
        with suppress(OSError):  # others still work here
            self.folder.rmdir()

    def sweep(self) -> None:
        """Remove all claims, and what killed processes left, once there is no work any more."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _probe(self) -> Path:
        return self.folder / f"clock-{self.token}"

    def _open(self, path: Path, flags: int) -> int:
        """Open a file of the folder, which the last of other processes may just have removed."""
        while True:
            self.folder.mkdir(exist_ok=True)
            with suppress(FileNotFoundError):
                return os.open(path, flags | os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o666)

    def _path(self, name: str) -> Path:
        return self.folder / (name + _SUFFIX)

    def _owner(self, name: str) -> bytes:
        pid, done = os.getpid(), self._done.get(name, 0)
        owner = Owner(socket.gethostname(), self.machine, pid, self._started, self.token, done)
        return json.dumps(asdict(owner)).encode().ljust(512)  # one length: rewritten in place

    def take(self, name: str) -> bool:
        """Claim a piece of work; False if another process, or this one, holds it."""
        with self._lock:
            if self._create(name):
                return True
            if name in self._done or not self._is_stale(name):
                return False
            # Of several that take over, one renames; the others' rename fails.
            grave = self.folder / f"{name}.{uuid.uuid4().hex}.stale"
            try:
                os.rename(self._path(name), grave)
            except FileNotFoundError:
                return False
            grave.unlink(missing_ok=True)
            return self._create(name)

    def _create(self, name: str) -> bool:
        path = self._path(name)
        try:
            descriptor = self._open(path, os.O_EXCL)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, self._owner(name))
        except OSError:  # a full disk: a claim without an owner would wait for its lease
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        self._done[name] = 0
        return True

    def note(self, name: str, done: int) -> None:
        """Say how much of a piece is done; others learn it with the next renewal."""
        if name in self._done:
            self._done[name] = done

    def release(self, name: str) -> None:
        """Give a claim back."""
        with self._lock:
            self._done.pop(name, None)
            if self._is_own(name):
                self._path(name).unlink(missing_ok=True)

    def is_live(self, name: str) -> bool:
        """Tell whether some process, perhaps this one, holds a claim."""
        return name in self._done or (self._path(name).exists() and not self._is_stale(name))

    def held(self) -> Iterator[tuple[str, int]]:
        """Go through all claims that processes hold: name, units done; this one's are exact."""
        yield from list(self._done.items())
        for path in self.folder.glob("*" + _SUFFIX):
            name = path.name.removesuffix(_SUFFIX)
            if name not in self._done and (owner := self._read(name)[1]) is not None:
                yield name, owner.done

    def age_sec(self, path: Path) -> float:
        """Return how long ago a file was written, by the file server's clock."""
        return self._now() - path.stat().st_mtime

    def _now(self) -> float:
        """Ask the file server for the time: it stamps a file of our own."""
        descriptor = self._open(self._probe, 0)
        try:
            os.utime(descriptor)
            return os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)

    def _read(self, name: str) -> tuple[float | None, Owner | None]:
        """Return a claim's time (None: there is no claim) and owner (None: not written yet)."""
        try:
            # Opening makes an NFS client ask the server: a bare stat may be a minute old.
            with self._path(name).open("rb") as file:
                content: Any = file.read(_MAX_BYTES)
                modified = os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return None, None
        try:
            return modified, from_json(Owner, parse_json(content))
        except (ValueError, MalformedError):
            return modified, None

    def _is_stale(self, name: str) -> bool:
        modified, owner = self._read(name)
        if modified is None:
            return False
        if owner is not None and owner.machine == self.machine:
            return _start_of(owner.pid) != owner.started
        return self._now() - modified > self.lease_sec

    def _is_own(self, name: str) -> bool:
        """Tell whether no other process believes this one dead and does the work again."""
        _, owner = self._read(name)
        return owner is not None and owner.token == self.token

    def _renew(self) -> None:
        while not self._is_over.wait(self.renew_sec):
            with self._lock:
                for name in list(self._done):
                    # Fails where the claim was taken over, or the server is away for a moment.
                    with suppress(OSError):
                        if self._is_own(name):
                            with self._path(name).open("r+b", buffering=0) as file:
                                file.write(self._owner(name))
                                os.utime(file.fileno())
