"""Open the shards of one data set, wherever they lie, after checking them with dataset.json."""

import hashlib
import io
import os
import stat
import threading
from pathlib import Path

import numpy as np

from data_tools.errors import ConfigError
from data_tools.shards.foreign_tar import index_name
from data_tools.shards.manifest import Manifest
from data_tools.shards.records import npy_bytes
from data_tools.storage.byte_stream import Patience
from data_tools.storage.cache import ShardCache, default_cache_folder
from data_tools.storage.fetch import fetch, read_small
from data_tools.storage.locations import Location

CHECKS = ("sha256", "size")
INDEX_COLUMNS = 3  # offsets of the array and of the mirrored one (-1: none), label


class ShardStore:
    """Checked access to shards, by their place in the manifest; safe for several threads."""

    def __init__(
        self,
        manifest: Manifest,
        *,
        location: Location,
        index_location: Location | None = None,
        check: str = "sha256",
        cache: ShardCache | None = None,
        patience: Patience | None = None,
    ) -> None:
        """Prepare; nothing is opened or fetched yet.

        Args:
            index_location: where the indexes of tars of others lie; default there too.
            check: of local shards before their first use: "sha256", or "size" alone. What is
                fetched is always checked in full.
            cache: keeps what is fetched, and remembers which local shards were checked; for these
                alone, that of the node by default.
            patience: with the other side; default from the environment.
        """
        assert check in CHECKS
        if location.folder is None and cache is None:
            raise ConfigError(
                f"--data {location.text}: is not on this machine; name a folder with --data-cache."
            )
        self.manifest, self.location, self.check = manifest, location, check
        self.num_downloads = 0  # files that this object had to fetch
        self._index_location = index_location or location
        if cache is None and check == "sha256":
            cache = ShardCache(default_cache_folder())
        self._cache = cache
        self._patience = patience or Patience.from_environment()
        is_local = location.folder is not None
        self._paths = [location.path(shard.name) for shard in manifest.shards if is_local]
        self._held: dict[int, int] = {}  # shard to a descriptor that keeps it in the cache
        self._mutex, self._closing = threading.Lock(), threading.Event()

    def prepare(self, shard: int) -> None:
        """Fetch and check a shard, and keep it, so that open() returns at once.

        Blocks; several threads may prepare different shards.

        Raises:
            ConfigError: it cannot be had, or is not what dataset.json says.
            StoppedError: close() was called.
        """
        descriptor = self.open(shard)
        if self.location.folder is None:
            with self._mutex:
                if shard not in self._held and not self._closing.is_set():
                    self._held[shard], descriptor = descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def release(self, shard: int) -> None:
        """Let the cache evict a prepared shard; does nothing for one that was not prepared.

        Descriptors from open() keep it until they are closed.
        """
        with self._mutex:
            descriptor = self._held.pop(shard, -1)
        if descriptor >= 0:
            os.close(descriptor)

    def open(self, shard: int) -> int:
        """Return a descriptor for reading, which the caller closes; fetches if need be."""
        entry = self.manifest.shards[shard]
        if self.location.folder is None:
            return self._open_remote(self.location, entry.name, entry.sha256, entry.bytes)
        path = self._paths[shard]
        try:
            # Without O_NONBLOCK a named pipe in the place of a shard would block for ever.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError as err:
            raise self.problem(shard, "is missing") from err
        except OSError as err:
            raise self.problem(shard, f"cannot be read ({err.strerror})") from err
        try:
            self._check_local(shard, path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def open_index(self, shard: int) -> np.ndarray:
        """Return where the samples of a tar written by others lie.

        Returns:
            int64 (n, 3): offset of the array, of the mirrored one or -1, label.
        """
        entry = self.manifest.shards[shard]
        name = index_name(entry.name)
        # Its size follows from its shape.
        num_bytes = len(npy_bytes(np.zeros((entry.num_samples, INDEX_COLUMNS), np.int64)))
        if self._index_location.folder is None:
            descriptor = self._open_remote(
                self._index_location, name, entry.index_sha256, num_bytes
            )
            with open(descriptor, "rb") as file:
                content = file.read(num_bytes)
        else:
            content = read_small(self._index_location, name, num_bytes)
        if hashlib.sha256(content).hexdigest() != entry.index_sha256:
            raise self.problem(shard, f"its index {name} is not the one of dataset.json")
        try:
            index = np.load(io.BytesIO(content), allow_pickle=False)
        except ValueError as err:
            raise self.problem(shard, f"its index {name} is no array ({err})") from err
        if index.dtype != np.int64 or index.shape != (entry.num_samples, INDEX_COLUMNS):
            raise self.problem(shard, f"its index {name} holds {index.dtype} {index.shape}")
        return index

    def describe(self, shard: int) -> str:
        """Name a shard in a message: its path or URL."""
        return self.location.describe(self.manifest.shards[shard].name)

    def problem(self, shard: int, what: str) -> ConfigError:
        """Make the error for a shard that cannot be used."""
        return ConfigError(
            f"{self.describe(shard)}: {what}; run python data_tools/verify_shards.py --data "
            f"{self.location.text}, it says what to do."
        )

    def close(self) -> None:
        """Stop what is being fetched and let go of what was prepared."""
        self._closing.set()
        for shard in list(self._held):
            self.release(shard)

    def _check_local(self, shard: int, path: Path, descriptor: int) -> None:
        entry, status = self.manifest.shards[shard], os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise self.problem(shard, "is no file")
        if status.st_size != entry.bytes:
            found = f"has {status.st_size} bytes"
            raise self.problem(shard, f"{found}, dataset.json says {entry.bytes} bytes")
        if self.check == "size":
            return
        try:
            is_right = self._cache.checksums.matches(path, descriptor, entry.sha256, self._closing)
        except OSError as err:
            raise self.problem(shard, f"cannot be read ({err.strerror})") from err
        if not is_right:
            raise self.problem(shard, "its sha256 is not that of dataset.json")

    def _open_remote(self, location: Location, name: str, sha256: str, num_bytes: int) -> int:
        def bring(path: Path) -> None:
            with self._mutex:
                self.num_downloads += 1
            fetch(
                location,
                name,
                path,
                num_bytes=num_bytes,
                sha256=sha256,
                patience=self._patience,
                cancel=self._closing,
            )

        return self._cache.open(sha256, num_bytes, bring, self._closing)


def numbered(stores: list[ShardStore]) -> list[tuple[ShardStore, int]]:
    """Number the shards through all stores: the store of each, and its place there."""
    return [(store, own) for store in stores for own in range(len(store.manifest.shards))]
