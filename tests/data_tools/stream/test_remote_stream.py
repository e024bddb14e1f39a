"""Training on data sets that a web server has: the same batches, and a quick end in any state."""

import re
import shutil
import threading
import time

import pytest
import torch

from data_tools.errors import ConfigError, OutageError, exit_on_config_error
from data_tools.storage.cache import ShardCache
from data_tools.stream.loader import LatentStream
from data_tools.stream.training_data import open_data
from tests.support.http_server import HttpServer
from tests.support.synthetic import make_dataset

SIZES = [9, 14, 5, 0, 11, 8]
SETTINGS = {"seed": 3, "window": 2, "global_batch_size": 12, "micro_batch_size": 6}
RANKS = {"rank": 1, "world_size": 2}


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("SWITCH_DIT_FETCH_BACKOFF_SEC", "0.01")
    make_dataset(tmp_path / "data", SIZES)
    with HttpServer(tmp_path / "data") as server:
        yield server


def stream(location, cache=None, **changes):
    return LatentStream(open_data(location), cache=cache, **(SETTINGS | RANKS | changes))


def tars(server):
    return [request.name for request in server.requests if request.name.endswith(".tar")]


def test_remote_shards_give_the_batches_of_local_ones(server, tmp_path):
    cache = ShardCache(tmp_path / "cache")
    with stream(str(tmp_path / "data")) as local, stream(server.url, cache) as remote:
        for _ in range(40):
            assert all(map(torch.equal, next(remote), next(local)))
    assert sorted(tars(server)) == sorted(set(tars(server))), "a shard was fetched twice"
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "data").mkdir()


def test_a_small_cache_is_enough_for_the_shards_in_use(server, tmp_path):
    """Three windows fit; the data set does not."""
    largest = max(path.stat().st_size for path in (tmp_path / "data").glob("*.tar"))
    cache = ShardCache(tmp_path / "cache", 3 * largest)
    with (
        stream(str(tmp_path / "data"), window=1) as local,
        stream(server.url, cache, window=1) as remote,
    ):
        for _ in range(40):
            assert all(map(torch.equal, next(remote), next(local)))
    assert len(tars(server)) > len(set(tars(server))), "nothing was ever evicted"


def test_faults_that_pass_leave_the_stream_as_it_is(server, tmp_path):
    for number, fault in enumerate(("reset", "500", "flip", "short")):
        server.spoil(f"{number:05d}.tar", fault)
    with (
        stream(str(tmp_path / "data")) as local,
        stream(server.url, ShardCache(tmp_path / "cache")) as remote,
    ):
        for _ in range(20):
            assert all(map(torch.equal, next(remote), next(local)))


def test_faults_that_stay_reach_the_consumer(server, tmp_path, monkeypatch):
    monkeypatch.setenv("SWITCH_DIT_FETCH_ATTEMPTS", "2")
    for number in range(len(SIZES)):
        server.spoil(f"{number:05d}.tar", *["500"] * 20)
    with stream(server.url, ShardCache(tmp_path / "cache")) as remote:
        for _ in range(2):
            with pytest.raises(ConfigError, match=r"http://127\.0\.0\.1.*\.tar"):
                next(remote)


@pytest.mark.parametrize(
    ("fault", "exit_code"),
    [("500", 1), ("reset", 1), ("silent", 1), ("404", 2), ("flip", 2), ("other-length", 2)],
)
def test_only_what_may_pass_by_itself_is_worth_another_start(
    server, tmp_path, monkeypatch, fault, exit_code, capsys
):
    monkeypatch.setenv("SWITCH_DIT_FETCH_ATTEMPTS", "3")
    monkeypatch.setenv("SWITCH_DIT_FETCH_STALL_SEC", "0.2")
    for number in range(len(SIZES)):
        server.spoil(f"{number:05d}.tar", *[fault] * 20)

    with (
        stream(server.url, ShardCache(tmp_path / "cache")) as remote,
        pytest.raises(SystemExit) as exit_info,
        exit_on_config_error(),
    ):
        next(remote)

    assert exit_info.value.code == exit_code
    assert re.fullmatch(
        r"error: http://127\.0\.0\.1\S+\.tar: could not be fetched in [23] attempts, the last time "
        r"because .*\.\n",
        capsys.readouterr().err,
    )


def test_a_server_that_is_away_at_the_start_is_an_outage_too(server, monkeypatch):
    monkeypatch.setenv("SWITCH_DIT_FETCH_ATTEMPTS", "2")
    server._server.server_close()
    with pytest.raises(OutageError, match=r"dataset\.json: could not .*in 2 attempts, .* refused"):
        open_data(server.url)


def test_closing_does_not_wait_for_a_server_that_stalls(server, tmp_path):
    for number in range(len(SIZES)):
        server.spoil(f"{number:05d}.tar", "silent")
    remote = stream(server.url, ShardCache(tmp_path / "cache"))
    while not tars(server):
        threading.Event().wait(0.01)
    started = time.monotonic()
    remote.close()
    assert time.monotonic() - started < 10, "the server says nothing for much longer"
    assert not remote._thread.is_alive()


def test_a_web_folder_without_a_data_set_is_named(server, tmp_path):
    (tmp_path / "data" / "dataset.json").unlink()
    with pytest.raises(ConfigError, match=r"^--data http.*there is no dataset\.json"):
        open_data(server.url)
