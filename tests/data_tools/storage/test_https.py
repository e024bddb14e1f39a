"""Fetching over encrypted connections: a server of this machine, with certificates made here."""

import hashlib
import random
import ssl
from dataclasses import replace

import pytest
import trustme

from data_tools.errors import ConfigError
from data_tools.storage.byte_stream import Patience
from data_tools.storage.fetch import fetch, read_small
from data_tools.storage.locations import parse_location
from tests.support.http_server import HttpServer

CONTENT = random.Random(0).randbytes(300_000)
WANTED = {"num_bytes": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest()}
PATIENCE = Patience(connect_sec=30, stall_sec=30, attempts=4, backoff_sec=0.01)


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture
def trusted(authority, tmp_path, monkeypatch):
    """The authority is known to this machine, as a site's own would be."""
    path = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(path))
    monkeypatch.setenv("SSL_CERT_FILE", str(path))


@pytest.fixture
def serve(authority, tmp_path, monkeypatch):
    """Start the server with a certificate for a host."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "a.tar").write_bytes(CONTENT)

    def start(host: str = "127.0.0.1") -> HttpServer:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(host).configure_cert(context)
        return HttpServer(folder, context)

    return start


def refusal(server: HttpServer, tmp_path, patience: Patience = PATIENCE) -> str:
    location = parse_location(server.url, "--data")
    with pytest.raises(ConfigError) as caught:
        fetch(location, "a.tar", tmp_path / "part", patience=patience, **WANTED)
    return str(caught.value)


def test_files_are_fetched_and_resumed(serve, trusted, tmp_path):
    with serve() as server:
        location = parse_location(server.url, "--data")
        server.spoil("a.tar", "short", "moved")
        fetch(location, "a.tar", tmp_path / "part", patience=PATIENCE, **WANTED)

        assert (tmp_path / "part").read_bytes() == CONTENT
        assert server.ranges("a.tar") == [None, *["bytes=150000-"] * 2]
        assert read_small(location, "a.tar", 1 << 20, patience=PATIENCE) == CONTENT


@pytest.mark.parametrize("fault", ["silent", "stall"])
def test_a_stall_is_noticed(fault, serve, trusted, tmp_path):
    with serve() as server:
        server.spoil("a.tar", fault, fault)
        message = refusal(server, tmp_path, replace(PATIENCE, stall_sec=0.3, attempts=2))

    assert "the server sent nothing for 0.3 s" in message


def test_an_unknown_authority_is_refused(serve, tmp_path):
    with serve() as server:
        message = refusal(server, tmp_path)
        assert not server.requests

    assert "the server's certificate is not trusted (unable to get local issuer" in message
    assert "\n" not in message


def test_another_hosts_certificate_is_refused(serve, trusted, tmp_path):
    with serve("example.org") as server:
        assert "certificate is not valid for '127.0.0.1'" in refusal(server, tmp_path)
