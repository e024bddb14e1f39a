"""The node's cache and the store above it: several processes, limits, damage, full disks, kills."""

import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_tools.errors import ConfigError
from data_tools.storage.byte_stream import Patience
from data_tools.storage.cache import ShardCache, default_cache_folder, open_cache
from data_tools.storage.locations import parse_location
from data_tools.storage.locks import StoppedError
from data_tools.stream.shard_store import ShardStore
from tests.support.http_server import HttpServer
from tests.support.launch import wait_until
from tests.support.synthetic import make_dataset

ROOT = Path(__file__).resolve().parents[3]
FAST = Patience(connect_sec=30, stall_sec=30, attempts=3, backoff_sec=0.01)
NUM_BYTES = 1000


@pytest.fixture(autouse=True)
def own_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("SWITCH_DIT_CACHE", str(tmp_path / "default-cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def served(tmp_path):
    """A data set of four shards and a server of its folder."""
    manifest = make_dataset(tmp_path / "data", [3, 2, 4, 1])
    with HttpServer(manifest.folder) as server:
        yield manifest, server


def remote_store(manifest, server, cache, **options) -> ShardStore:
    location = parse_location(server.url, "--data")
    return ShardStore(manifest, location=location, cache=cache, patience=FAST, **options)


def local_store(manifest, **options) -> ShardStore:
    return ShardStore(manifest, location=parse_location(str(manifest.folder), "--data"), **options)


def content_of(descriptor: int) -> bytes:
    with open(descriptor, "rb") as file:
        return file.read()


def item(index: int) -> tuple[str, bytes]:
    """Return a file's checksum and content."""
    content = random.Random(index).randbytes(NUM_BYTES)
    return hashlib.sha256(content).hexdigest(), content


def put(cache: ShardCache, index: int) -> int:
    """Open a file in the cache, whatever it takes."""
    sha256, content = item(index)
    return cache.open(sha256, NUM_BYTES, lambda path: path.write_bytes(content))


def kept(cache: ShardCache, *indices: int) -> list[bool]:
    return [(cache.folder / f"{item(index)[0]}.tar").exists() for index in indices]


def files_in(folder: Path) -> set[str]:
    return {path.suffix for path in folder.iterdir() if path.is_file()}


def test_every_shard_comes_once_and_is_the_right_one(served, tmp_path):
    manifest, server = served
    store = remote_store(manifest, server, ShardCache(tmp_path / "cache"))

    for _ in range(2):
        for i, shard in enumerate(manifest.shards):
            store.prepare(i)
            expected = (manifest.folder / shard.name).read_bytes()
            assert content_of(store.open(i)) == expected
    store.close()
    another = remote_store(manifest, server, ShardCache(tmp_path / "cache"))
    os.close(another.open(0))

    assert (store.num_downloads, another.num_downloads) == (4, 0)
    assert len(server.requests) == 4
    assert files_in(tmp_path / "cache") == {".tar"}, "locks or parts were left"


# Without the manifest, whose imports take seconds.
_PROCESS = """
import json, hashlib, os, sys
from pathlib import Path
from data_tools.storage.cache import ShardCache
from data_tools.storage.locations import parse_location
from data_tools.storage.fetch import fetch

location, cache = parse_location(sys.argv[1], "--data"), ShardCache(Path(sys.argv[2]))
downloads = 0
print("ready", flush=True)
sys.stdin.readline()
for name, num_bytes, sha256 in json.loads(sys.argv[3]):
    def bring(path):
        global downloads
        downloads += 1
        fetch(location, name, path, num_bytes=num_bytes, sha256=sha256)
    with open(cache.open(sha256, num_bytes, bring), "rb") as file:
        assert hashlib.sha256(file.read()).hexdigest() == sha256
print(downloads, flush=True)
"""


def start(manifest, server, cache: Path, *numbers: int, program: str = _PROCESS):
    """Start a process that opens these shards when it is told to."""
    shards = [(s.name, s.bytes, s.sha256) for s in (manifest.shards[i] for i in numbers)]
    return subprocess.Popen(
        [sys.executable, "-c", program, server.url, cache, json.dumps(shards)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def go(*processes: subprocess.Popen) -> None:
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()


@pytest.mark.processes
def test_three_processes_download_each_shard_once(served, tmp_path):
    manifest, server = served
    orders = [(0, 1, 2, 3), (0, 1, 2, 3), (3, 2, 1, 0)]
    processes = [start(manifest, server, tmp_path / "cache", *order) for order in orders]
    go(*processes)
    downloads = [int(process.communicate()[0]) for process in processes]

    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sum(downloads) == 4
    assert sorted(request.name for request in server.requests) == [s.name for s in manifest.shards]
    assert files_in(tmp_path / "cache") == {".tar"}


@pytest.mark.processes
def test_a_killed_process_leaves_a_part_that_the_one_waiting_continues(served, tmp_path):
    manifest, server = served
    name, half = manifest.shards[0].name, manifest.shards[0].bytes // 2
    server.spoil(name, "stall")
    killed, waiting = (start(manifest, server, tmp_path / "cache", 0) for _ in range(2))
    go(killed)
    wait_until(lambda: any(p.stat().st_size == half for p in (tmp_path / "cache").glob("*.part")))
    go(waiting)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()

    assert waiting.communicate()[0] == "1\n"
    assert server.ranges(name) == [None, f"bytes={half}-"]
    assert files_in(tmp_path / "cache") == {".tar"}


def test_the_least_recently_used_goes_first(tmp_path):
    cache = ShardCache(tmp_path / "cache", 3 * NUM_BYTES)
    for index in (0, 1, 2, 0):
        os.close(put(cache, index))
    os.close(put(cache, 3))
    assert kept(cache, 0, 1, 2, 3) == [True, False, True, True]
    os.close(put(cache, 4))
    assert kept(cache, 0, 1, 2, 3, 4) == [True, False, False, True, True]


def test_what_is_held_stays_and_can_be_read(tmp_path):
    cache = ShardCache(tmp_path / "cache", 2 * NUM_BYTES)
    held = put(cache, 0)
    for index in (1, 2, 3):
        os.close(put(ShardCache(cache.folder, cache.limit_bytes), index))

    assert kept(cache, 0, 1, 2, 3) == [True, False, False, True]
    assert content_of(held) == item(0)[1]
    os.close(put(cache, 1))
    os.close(put(cache, 2))
    assert kept(cache, 0) == [False]


def test_a_limit_below_what_is_in_use_is_one_sentence(tmp_path):
    cache = ShardCache(tmp_path / "cache", 2 * NUM_BYTES, wait_sec=0.2)
    held = [put(cache, 0), put(cache, 1)]

    with pytest.raises(ConfigError, match=f"^--data-cache-gib .* would need {NUM_BYTES} bytes"):
        put(cache, 2)
    os.close(held.pop())
    os.close(put(cache, 2))
    with pytest.raises(ConfigError, match="--data-cache-gib"):
        put(ShardCache(cache.folder, NUM_BYTES - 1, wait_sec=1000), 3)


def test_a_full_cache_waits_until_another_lets_go(tmp_path):
    cache = ShardCache(tmp_path / "cache", NUM_BYTES)
    held, results = put(cache, 0), []
    thread = threading.Thread(target=lambda: results.append(put(cache, 1)))
    thread.start()
    wait_until((cache.folder / f"{item(1)[0]}.lock").exists)
    os.close(held)
    thread.join()

    assert content_of(*results) == item(1)[1]


def test_two_that_want_the_last_place_do_not_wait_for_each_other(tmp_path):
    """Neither counts what the other has not been granted."""
    cache = ShardCache(tmp_path / "cache", NUM_BYTES)
    threads = [threading.Thread(target=lambda i=i: os.close(put(cache, i))) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sum(kept(cache, *range(6))) == 1
    assert files_in(cache.folder) == {".tar"}


def test_a_stale_part_counts_and_is_evicted_but_one_in_work_is_not(tmp_path):
    cache = ShardCache(tmp_path / "cache", 2 * NUM_BYTES, wait_sec=0.2)
    stale = cache.folder / f"{'0' * 64}.{NUM_BYTES}.part"
    stale.write_bytes(b"some")
    os.close(put(cache, 0))
    assert stale.exists()
    os.close(put(cache, 1))
    assert not stale.exists() and kept(cache, 0, 1) == [True, True]

    stale.write_bytes(b"some")
    with (cache.folder / f"{'0' * 64}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.close(put(cache, 2))
        assert stale.exists() and kept(cache, 0, 1, 2) == [False, False, True]


def test_parts_that_nobody_continued_for_a_week_are_removed(tmp_path):
    cache = ShardCache(tmp_path / "cache")
    os.close(put(cache, 0))
    old, new = (cache.folder / f"{digit * 64}.{NUM_BYTES}.part" for digit in "12")
    for path in (old, new, cache.folder / f"{item(0)[0]}.tar"):
        path.touch()
        if path != new:
            os.utime(path, (0, 0))
    ShardCache(cache.folder)

    assert (old.exists(), new.exists(), *kept(cache, 0)) == (False, True, True)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "replaced", "removed", "a link"])
def test_a_damaged_file_in_the_cache_is_fetched_again(damage, tmp_path):
    cache = ShardCache(tmp_path / "cache")
    os.close(put(cache, 0))
    sha256, content = item(0)
    path = cache.folder / f"{sha256}.tar"
    if damage == "truncated":
        os.truncate(path, NUM_BYTES - 1)
    elif damage == "flipped":
        with path.open("r+b") as file:
            file.write(bytes([content[0] ^ 1]))
    elif damage == "replaced":
        (tmp_path / "other").write_bytes(bytes(NUM_BYTES))
        os.replace(tmp_path / "other", path)
    else:
        path.unlink()
        if damage == "a link":
            (tmp_path / "elsewhere").write_bytes(content)
            path.symlink_to(tmp_path / "elsewhere")
    calls = []

    def fetch(part):
        calls.append(part)
        part.write_bytes(content)

    for opened in (cache, ShardCache(cache.folder), cache):
        assert content_of(opened.open(sha256, NUM_BYTES, fetch)) == content
    assert len(calls) == 1
    assert not path.is_symlink()


def test_a_wrong_checksum_leaves_nothing_behind(served, tmp_path):
    manifest, server = served
    server.spoil(manifest.shards[0].name, *["flip"] * 9)
    store = remote_store(manifest, server, ShardCache(tmp_path / "cache", 1 << 20))

    with pytest.raises(ConfigError, match=r"in 2 attempts, .* its sha256 is not that of"):
        store.prepare(0)

    assert [path.stat().st_size for path in (tmp_path / "cache").glob("*.part")] == [0]
    assert not list((tmp_path / "cache").glob("*.tar"))


_LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"


@pytest.mark.processes
def test_a_file_that_cannot_be_written_is_one_sentence_and_leaves_nothing(served, tmp_path):
    """A limit on the size of files stands for a full disk: it needs no privilege."""
    manifest, server = served
    assert manifest.shards[0].bytes > 4096
    process = start(manifest, server, tmp_path / "cache", 0, program=_LIMITED + _PROCESS)
    go(process)
    message = process.communicate()[1]

    assert process.returncode == 1
    sentence = message.splitlines()[-1]
    assert "File too large); free space or name another folder, then start again." in sentence
    assert f"--data-cache {tmp_path / 'cache'}: a file of {manifest.shards[0].bytes} by" in sentence
    assert files_in(tmp_path / "cache") == set()
    store = remote_store(manifest, server, ShardCache(tmp_path / "cache"))
    os.close(store.open(0))


_ON_A_SMALL_DISK = """
import os, sys, subprocess
from pathlib import Path
options = "size=256k,mode=700"
subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", sys.argv[1]], check=True)
sys.path.insert(0, "")
import hashlib
from data_tools.storage.cache import ShardCache
from data_tools.errors import ConfigError

cache, size = ShardCache(Path(sys.argv[1])), 100_000
def put(i):
    content = bytes([i]) * size
    def fetch(path):
        with path.open("ab", buffering=0) as file:
            while rest := content[file.tell():]:
                file.write(rest)
    return cache.open(hashlib.sha256(content).hexdigest(), size, fetch)
for i in range(6):
    os.close(put(i))  # evicts, because the disk is full
held = [put(5), put(4)]
try:
    put(9)
except ConfigError as err:
    print(err)
print(sorted(path.suffix for path in cache.folder.iterdir() if path.is_file()))
os.close(held.pop())
os.close(put(9))
print("continued")
"""


@pytest.mark.processes
def test_on_a_full_disk_others_are_evicted_and_then_it_is_one_sentence(tmp_path):
    """A file system of 256 KiB, which an unprivileged user may mount in a name space of his own."""
    command = [shutil.which("unshare") or "unshare", "--user", "--map-root-user", "--mount"]
    try:
        usable = subprocess.run(
            [*command, "mount", "-t", "tmpfs", "none", tmp_path], capture_output=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("there is no program unshare")
    if usable.returncode:
        pytest.skip("this machine allows no user name spaces")
    (tmp_path / "disk").mkdir()
    result = subprocess.run(
        [*command, sys.executable, "-c", _ON_A_SMALL_DISK, tmp_path / "disk"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 0, result.stderr
    sentence, left, last = result.stdout.splitlines()
    assert "a file of 100000 bytes cannot be kept there (No space left on device)" in sentence
    assert left == "['.tar', '.tar']"
    assert last == "continued"


def test_nothing_in_a_manifest_leads_out_of_the_cache(served, tmp_path):
    manifest, server = served
    cache = ShardCache(tmp_path / "cache")
    for sha256 in ("../../x", "a" * 63, "A" * 64, "", "/" + "a" * 63):
        with pytest.raises(ConfigError, match="is none; correct the dataset.json"):
            cache.open(sha256, 1, Path.touch)
    evil = replace(manifest, shards=[replace(manifest.shards[0], name="../data/00000.tar")])
    with pytest.raises(ConfigError, match="is no plain file name"):
        remote_store(evil, server, cache).open(0)

    assert files_in(cache.folder) <= {".part"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data"]


def test_the_folder_is_private(tmp_path):
    cache = open_cache(None, 1.5)
    assert cache.folder == default_cache_folder() == tmp_path / "default-cache"
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    assert cache.limit_bytes == 3 << 29
    cache.folder.chmod(0o770)
    with pytest.raises(ConfigError, match="^--data-cache .*: others can write there; "):
        open_cache(None, None)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is no folder"):
        open_cache(str(tmp_path / "file"), None)
    with pytest.raises(ConfigError, match="cannot be made"):
        open_cache(str(tmp_path / "file" / "x"), None)
    for wrong in (0, -1, float("nan")):
        with pytest.raises(ConfigError, match="^--data-cache-gib "):
            open_cache(None, wrong)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path):
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", 12345, 12345)
    with pytest.raises(ConfigError, match="others can write there"):
        open_cache(str(tmp_path / "theirs"), None)


def test_a_file_system_without_locks_is_one_sentence(tmp_path, monkeypatch):
    """No such file system is at hand, so flock answers as it does there."""
    cache = ShardCache(tmp_path / "cache")

    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ConfigError, match=r"^--data-cache .*has no locks \(flock: No locks"):
        put(cache, 0)


def test_closing_a_store_stops_those_that_wait(served, tmp_path):
    manifest, server = served
    server.spoil(manifest.shards[0].name, *["500"] * 9)
    cache, results = ShardCache(tmp_path / "cache"), []
    patience = Patience(backoff_sec=1000)
    location = parse_location(server.url, "--data")
    store = ShardStore(manifest, location=location, cache=cache, patience=patience)

    def prepare():
        try:
            store.prepare(0)
        except StoppedError as err:
            results.append(err)

    threads = [threading.Thread(target=prepare) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: server.requests)
    store.close()
    for thread in threads:
        thread.join()

    assert len(results) == 3 and len(server.requests) == 1


def test_prepared_shards_stay_until_they_are_released(served, tmp_path):
    manifest, server = served
    limit_bytes = sum(shard.bytes for shard in manifest.shards[:3:2])
    cache = ShardCache(tmp_path / "cache", limit_bytes, wait_sec=0.1)
    store = remote_store(manifest, server, cache)
    for shard in (0, 2):
        store.prepare(shard)
        store.prepare(shard)
    with pytest.raises(ConfigError, match="lower --shuffle-window"):
        store.prepare(1)
    store.release(0)
    store.release(0)
    store.prepare(1)

    assert store.num_downloads == 3
    assert content_of(store.open(2)) == (manifest.folder / manifest.shards[2].name).read_bytes()
    store.close()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "is missing"),
        ("truncated", "bytes, dataset.json says"),
        ("flipped", "its sha256 is not that of dataset.json"),
        ("folder", "is no file"),
        ("fifo", "is no file"),
    ],
)
def test_a_damaged_local_shard_is_named(damage, message, tmp_path):
    manifest = make_dataset(tmp_path / "data", [3, 2])
    path = manifest.folder / manifest.shards[1].name
    store = local_store(manifest)
    store.prepare(1)
    if damage == "truncated":
        os.truncate(path, 100)
    elif damage == "flipped":
        content = path.read_bytes()
        path.write_bytes(content[:-1] + b"x")
    else:
        path.unlink()
        if damage == "folder":
            path.mkdir()
        elif damage == "fifo":
            os.mkfifo(path)
    os.close(store.open(0))

    for opened in (store, local_store(manifest)):
        with pytest.raises(ConfigError) as caught:
            opened.open(1)
        assert str(caught.value).startswith(f"{path}: ")
        assert message in str(caught.value)
        command = f"python data_tools/verify_shards.py --data {manifest.folder}, it says"
        assert command in str(caught.value)
    if damage == "flipped":
        os.close(local_store(manifest, check="size").open(1))


def test_a_local_shard_is_read_in_full_once_per_node(tmp_path):
    manifest = make_dataset(tmp_path / "data", [3])
    path = manifest.folder / manifest.shards[0].name
    os.close(local_store(manifest).open(0))
    status = path.stat()
    with path.open("r+b") as file:
        file.write(b"x")
    # A flipped bit under the same time of change is what remembering cannot see, so this shows
    # that the second look read nothing.
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.close(local_store(manifest).open(0))
    os.utime(path)

    with pytest.raises(ConfigError, match="sha256"):
        local_store(manifest).open(0)


def test_a_half_written_memory_counts_as_none(tmp_path):
    manifest = make_dataset(tmp_path / "data", [3])
    cache = open_cache(None, None)
    os.close(local_store(manifest, cache=cache).open(0))
    (mark,) = (cache.folder / "verified").iterdir()
    whole = mark.read_bytes()
    mark.write_bytes(whole[:-5])
    os.close(local_store(manifest, cache=open_cache(None, None)).open(0))

    assert mark.read_bytes() == whole


def with_index(manifest, index: bytes):
    """Say in the manifest that shard 0 has this index, and put it beside the tar."""
    (manifest.folder / "00000.index.npy").write_bytes(index)
    sha256 = hashlib.sha256(index).hexdigest()
    return replace(manifest, shards=[replace(manifest.shards[0], index_sha256=sha256)])


def npy(array: np.ndarray, path: Path) -> bytes:
    np.save(path, array, allow_pickle=True)
    return path.read_bytes()


def test_an_index_comes_from_either_place(served, tmp_path):
    manifest, server = served
    index = np.arange(9).reshape(3, 3)
    manifest = with_index(manifest, npy(index, tmp_path / "x.npy"))
    store = remote_store(manifest, server, ShardCache(tmp_path / "cache"))

    for opened in (local_store(manifest), store, store):
        assert np.array_equal(opened.open_index(0), index)
    assert server.ranges("00000.index.npy") == [None]


def test_a_wrong_index_is_named_and_no_pickle_is_loaded(tmp_path):
    manifest = make_dataset(tmp_path / "data", [20])
    pickled = np.empty((1, 1), object)
    pickled[0, 0] = {}
    for wrong, message in (
        (npy(np.zeros((20, 2), int), tmp_path / "x.npy"), r"holds int64 \(20, 2\)"),
        (npy(np.zeros((20, 3), np.int32), tmp_path / "x.npy"), r"holds int32 \(20, 3\)"),
        (npy(pickled, tmp_path / "x.npy"), r"is no array \(Object arrays cannot be loaded"),
        (b"nonsense", "is no array"),
    ):
        with pytest.raises(ConfigError, match=message):
            local_store(with_index(manifest, wrong)).open_index(0)
    other = with_index(manifest, npy(np.zeros((20, 3), int), tmp_path / "x.npy"))
    (manifest.folder / "00000.index.npy").write_bytes(b"x")
    with pytest.raises(ConfigError, match="is not the one of dataset.json"):
        local_store(other).open_index(0)


def test_remote_data_needs_a_cache(served):
    manifest, server = served
    with pytest.raises(ConfigError, match="name a folder with --data-cache"):
        remote_store(manifest, server, None)
