"""Data in buckets: a real server, and the ways in which people reach it."""

import socket

import boto3
import pytest
from moto.server import ThreadedMotoServer

from data_tools.errors import ConfigError, OutageError
from data_tools.storage.byte_stream import Patience
from data_tools.storage.fetch import MissingFileError, fetch, read_small
from data_tools.storage.locations import parse_location
from data_tools.stream.training_data import open_data
from tests.support.synthetic import make_dataset

pytestmark = pytest.mark.processes

PATIENCE = Patience(connect_sec=60, stall_sec=60, attempts=2, backoff_sec=0.01)
ODD = "set one/größe #1?, [v1] 50%25 {a}=x"
KEYS = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Serve a bucket with one data set, under an ordinary prefix and under an odd one."""
    folder = tmp_path_factory.mktemp("set")
    manifest = make_dataset(folder, [3, 2])
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    client = boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id="k",
        aws_secret_access_key="s",
    )
    client.create_bucket(Bucket="bucket")
    for path in folder.iterdir():
        for prefix, options in (("open", {"ACL": "public-read"}), (ODD, {}), ("closed", {})):
            client.upload_file(str(path), "bucket", f"{prefix}/{path.name}", ExtraArgs=options)
    yield url, manifest
    server.stop()


@pytest.fixture(autouse=True)
def environment(store, tmp_path, monkeypatch):
    """A user with keys, and nothing of the machine's own configuration."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", store[0])
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("SWITCH_DIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_a_set_is_read_from_a_bucket_whatever_letters_are_in_its_key(store, tmp_path):
    location = parse_location(f"s3://bucket/{ODD}", "--data")
    shard = store[1].shards[0]
    content = (store[1].folder / shard.name).read_bytes()
    (tmp_path / "part").write_bytes(content[:1000])

    size = {"num_bytes": shard.bytes, "sha256": shard.sha256}
    fetch(location, shard.name, tmp_path / "part", patience=PATIENCE, **size)

    assert (tmp_path / "part").read_bytes() == content
    assert b"shards" in read_small(location, "dataset.json", 1 << 20, patience=PATIENCE)


def test_without_keys_what_is_open_to_all_is_read_and_the_rest_refused_at_once(monkeypatch):
    for name in KEYS:
        monkeypatch.delenv(name)
    said = []

    assert open_data("s3://bucket/open", on_failure=said.append).manifest.num_samples == 5
    with pytest.raises(ConfigError, match=r"closed/dataset.json: .* in 1 attempt, .*Forbidden, as"):
        open_data("s3://bucket/closed", on_failure=said.append)
    assert said == []


def test_the_same_bucket_is_read_by_http(store):
    assert open_data(f"{store[0]}/bucket/open").manifest.hash == store[1].hash
    with pytest.raises(ConfigError, match="the server answered 403"):
        open_data(f"{store[0]}/bucket/closed")


@pytest.mark.parametrize("place", ["bucket/opne", "buckte/open", "bucket/open/404 Forbidden"])
def test_a_misspelt_path_is_told_at_once(place):
    said = []

    with pytest.raises(ConfigError, match=f"^--data s3://{place}: there is no dataset.json") as err:
        open_data(f"s3://{place}", on_failure=said.append)

    assert (err.value.exit_code, said) == (2, [])
    assert isinstance(err.value.__cause__, MissingFileError)


def test_a_store_that_is_away_is_waited_for_with_a_line_per_attempt(monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        monkeypatch.setenv("SWITCH_DIT_FETCH_ATTEMPTS", "2")
        said = []

        with pytest.raises(OutageError, match="in 2 attempts") as err:
            open_data("s3://bucket/404 Forbidden", on_failure=said.append)

    assert err.value.exit_code == 1
    assert [line.split(" failed")[0] for line in said] == [
        "s3://bucket/404 Forbidden/dataset.json: attempt 1 of 2"
    ]


@pytest.mark.parametrize(
    ("scheme", "tool", "said", "error"),
    [
        ("s3", "aws", "An error occurred (404) when calling the HeadObject", MissingFileError),
        ("s3", "aws", "An error occurred (403) when calling the HeadObject", ConfigError),
        ("s3", "aws", "The config profile (x) could not be found", ConfigError),
        ("s3", "aws", "Could not connect to the endpoint URL", OutageError),
        ("gs", "gcloud", "The following URLs matched no objects or files", MissingFileError),
        ("gs", "gcloud", "You do not currently have an active account selected.", ConfigError),
        ("gs", "gsutil", "CommandException: No URLs matched: gs://x", MissingFileError),
        ("gs", "gsutil", "AccessDeniedException: 403 x", ConfigError),
        ("gs", "gsutil", "ServiceException: 503 Backend Error", OutageError),
    ],
)
def test_what_the_programs_of_stores_say_is_understood(
    scheme, tool, said, error, tmp_path, monkeypatch
):
    (tmp_path / tool).write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(ConfigError) as caught:
        read_small(parse_location(f"{scheme}://b", "--data"), "a.tar", 9, patience=PATIENCE)

    assert type(caught.value) is error
    assert said in str(caught.value)


def test_without_keys_aws_is_asked_again_as_anybody(tmp_path, monkeypatch):
    script = 'case "$*" in *--no-sign-request*) echo {};; *) echo Unable to locate credentials;'
    (tmp_path / "aws").write_text(f"#!/bin/sh\n{script} exit 1;; esac\n".replace("s;", "s >&2;"))
    (tmp_path / "aws").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    location = parse_location("s3://b", "--data")
    assert read_small(location, "dataset.json", 9, patience=PATIENCE) == b"{}\n"
