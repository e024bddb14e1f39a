"""Fetching from a web server that misbehaves, from commands, from the tools of object stores."""

import hashlib
import random
import shlex
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from data_tools.errors import ConfigError
from data_tools.storage.byte_stream import Patience
from data_tools.storage.fetch import MissingFileError, fetch, read_small
from data_tools.storage.locations import Location, parse_location
from data_tools.storage.locks import StoppedError
from data_tools.stream.training_data import open_data
from tests.support.http_server import HttpServer
from tests.support.launch import wait_until

ROOT = Path(__file__).resolve().parents[3]
CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
# A busy machine must not look like a stalled server, except where a stall is what is tested.
FAST = Patience(connect_sec=30, stall_sec=30, attempts=4, backoff_sec=0.01)
IMPATIENT = Patience(connect_sec=30, stall_sec=0.3, attempts=4, backoff_sec=0.01)
STALLS = ("silent", "stall", "trickle")
ORDINARY_FAULTS = (
    *("404", "500", "503-later", "reset", "short", "longer", "endless", "other-length", "flip"),
    *("compressed", "to-file"),
)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "a.tar").write_bytes(CONTENT)
    with HttpServer(folder) as server:
        yield server


def bring(location: Location | str, path: Path, patience: Patience = FAST, **options) -> bytes:
    """Fetch a.tar and return what arrived."""
    if isinstance(location, str):
        location = parse_location(location, "--data")
    options = {"num_bytes": len(CONTENT), "sha256": SHA256} | options
    fetch(location, "a.tar", path, patience=patience, **options)
    return path.read_bytes()


@pytest.mark.parametrize("fault", ["", "moved", *ORDINARY_FAULTS])
def test_one_fault_is_survived(fault, server, tmp_path):
    server.spoil("a.tar", *filter(None, [fault]))

    assert bring(server.url, tmp_path / "part") == CONTENT
    assert len(server.requests) == (2 if fault else 1)


@pytest.mark.parametrize("fault", STALLS)
def test_a_server_that_stalls_is_left_and_asked_again(fault, server, tmp_path):
    server.spoil("a.tar", fault)

    assert bring(server.url, tmp_path / "part", replace(IMPATIENT, attempts=50)) == CONTENT
    assert len(server.requests) >= 2


@pytest.mark.parametrize(
    ("fault", "attempts", "cause"),
    [
        ("404", 3, "the server answered 404 Not Found"),
        ("denied", 3, "answered 403 Forbidden (AccessDenied: Access Denied to reader@example.org)"),
        ("quota", 3, "the server answered 402 Payment Required (quota used up)"),
        (
            "login",
            2,
            "it is HTML (text/html, 'Sign in') and no a.tar: the server may ask for a login",
        ),
        ("login-chunked", 2, "it is HTML (text/html, 'Sign in') and no a.tar: the server may ask"),
        ("login-elsewhere", 2, "it is HTML (text/html, from {host}/login, 'Sign in') and no a.tar"),
        ("json", 2, "it is JSON (application/json, 'token expired') and no a.tar"),
        ("lfs", 2, "it is a git-lfs pointer and no a.tar: ask for what the site's"),
        ("500", 4, "the server answered 500 Internal Server Error"),
        ("silent", 4, "the server sent nothing for 0.3 s"),
        ("stall", 4, "the server sent nothing for 0.3 s"),
        ("reset", 4, "[Errno 104] Connection reset by peer"),
        ("short", 4, "the connection ended at byte"),
        ("other-length", 3, "it has 150000 bytes there, dataset.json says 300000"),
        ("endless", 3, "it has more than the 300000 bytes of dataset.json"),
        ("flip", 2, "its sha256 is not that of dataset.json"),
        ("to-file", 3, "the server answered 302"),
    ],
)
def test_a_lasting_fault_is_one_sentence(fault, attempts, cause, server, tmp_path):
    server.spoil("a.tar", *[fault] * 10)

    with pytest.raises(ConfigError) as caught:
        patience = IMPATIENT if fault in STALLS else FAST
        bring(server.url + "?signature=secret", tmp_path / "part", patience)

    message = str(caught.value)
    assert message.startswith(f"{server.url}/a.tar: could not be fetched in {attempts} attempts, ")
    assert cause.replace("{host}", server.url.removesuffix("/data")) in message
    assert len([request for request in server.requests if request.name == "a.tar"]) == attempts
    assert isinstance(caught.value, MissingFileError) == (fault == "404")
    if fault in ("flip", "endless", "other-length"):
        assert (tmp_path / "part").stat().st_size == 0, "bytes that are wrong were kept"


@pytest.mark.parametrize(
    "value", ["", "identity", "Identity", "aws-chunked", "utf-8", "none", "binary", "aws-chunked, "]
)
def test_what_a_store_kept_of_an_upload_is_no_compression(value, server, tmp_path):
    server.headers["Content-Encoding"] = value

    assert bring(server.url, tmp_path / "part") == CONTENT
    assert len(server.requests) == 1


@pytest.mark.parametrize("value", ["gzip", "GZIP", "deflate", "br", "zstd", "x, compress"])
def test_compressions_are_refused(value, server, tmp_path):
    server.headers["Content-Encoding"] = value

    with pytest.raises(ConfigError, match="because the server sends it compressed"):
        bring(server.url, tmp_path / "part")


def test_nobody_listening_is_one_sentence(server, tmp_path):
    server._server.server_close()

    with pytest.raises(ConfigError, match=r"in 4 attempts, the last time because .*refused"):
        bring(server.url, tmp_path / "part")


def test_a_broken_download_is_resumed_with_the_version_it_began(server, tmp_path):
    server.spoil("a.tar", "short")

    assert bring(server.url, tmp_path / "part") == CONTENT
    assert server.ranges("a.tar") == [None, "bytes=150000-"]
    assert server.requests[1].if_range == '"1"'


@pytest.mark.parametrize("fault", ["no-range", "other-part", "unasked-etag", "404", "flip"])
def test_resuming_survives_a_server_that_cannot(fault, server, tmp_path):
    server.spoil("a.tar", "short", fault)

    assert bring(server.url, tmp_path / "part") == CONTENT
    assert server.ranges("a.tar")[:2] == [None, "bytes=150000-"]


def test_a_file_that_changes_in_between_is_fetched_from_the_beginning(server, tmp_path):
    other = bytes(len(CONTENT))
    path = server.folder / "a.tar"
    path.write_bytes(other)
    server.spoil("a.tar", "short", "500")

    def change(*_):
        path.write_bytes(CONTENT)
        server.etags["a.tar"] = '"2"'
        return []

    server.faults["a.tar"] = _Then(["short"], change)

    assert bring(server.url, tmp_path / "part") == CONTENT
    assert server.ranges("a.tar") == [None, "bytes=150000-"]


class _Then(list):
    """Faults after which something happens."""

    def __init__(self, faults, then):
        super().__init__(faults)
        self.then = then

    def pop(self, index):
        fault = super().pop(index)
        if not self:
            self.then()
        return fault


@pytest.mark.parametrize("kept", [CONTENT[:1000], CONTENT, CONTENT + b"xyz", b"wrong" * 999])
def test_what_is_there_already_is_used_if_it_is_right(kept, server, tmp_path):
    (tmp_path / "part").write_bytes(kept)

    assert bring(server.url, tmp_path / "part") == CONTENT
    if kept == CONTENT:
        assert server.requests == []
    if len(kept) == 1000:
        assert server.ranges("a.tar") == ["bytes=1000-"]


def test_a_part_longer_than_the_servers_file_is_given_up(server, tmp_path):
    (tmp_path / "part").write_bytes(CONTENT[:200_000])
    (server.folder / "a.tar").write_bytes(CONTENT[:100])

    with pytest.raises(ConfigError, match="it has 100 bytes there, dataset.json says 300000"):
        bring(server.url, tmp_path / "part")


def test_password_and_query_go_to_the_server_and_into_no_message(server, tmp_path):
    url = server.url.replace("//", "//me:p%40ss@") + "/?token=abc"

    assert bring(url, tmp_path / "part") == CONTENT
    assert server.requests[0].authorization == "Basic bWU6cEBzcw=="
    assert server.requests[0].query == "token=abc"
    assert parse_location(url, "--data").describe("a.tar") == f"{server.url}/a.tar"


def test_a_redirect_takes_no_password_along(server, tmp_path):
    server.spoil("a.tar", "moved")

    assert bring(server.url.replace("//", "//me:pass@"), tmp_path / "part") == CONTENT
    assert [request.authorization is None for request in server.requests] == [False, True]


def test_a_pause_can_be_stopped(server, tmp_path):
    cancel, patience = threading.Event(), Patience(backoff_sec=1000)
    server.spoil("a.tar", "500")
    server.faults["a.tar"] = _Then(["500"], cancel.set)

    with pytest.raises(StoppedError):
        bring(server.url, tmp_path / "part", patience, cancel=cancel)


@pytest.mark.processes
def test_a_killed_process_is_continued_by_the_next(server, tmp_path):
    part = tmp_path / "part"
    server.spoil("a.tar", "stall")
    program = (
        "import sys; from pathlib import Path;"
        "from data_tools.storage.locations import parse_location;"
        "from data_tools.storage.fetch import fetch;"
        "fetch(parse_location(sys.argv[1], '--data'), 'a.tar', Path(sys.argv[2]),"
        f" num_bytes={len(CONTENT)}, sha256={SHA256!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", program, server.url, part], cwd=ROOT)
    wait_until(lambda: part.exists() and part.stat().st_size == 150_000)
    process.send_signal(signal.SIGKILL)
    process.wait()

    assert bring(server.url, part) == CONTENT
    assert server.ranges("a.tar") == [None, "bytes=150000-"]


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (
            "login",
            "{url}/dataset.json: could not be fetched in 2 attempts, the last time because it is "
            "HTML (text/html, 'Sign in') and no dataset.json: the server may ask for a login; see ",
        ),
        ("login-elsewhere", "it is HTML (text/html, from {host}/login, 'Sign in') and no dataset."),
        (
            "json",
            "is no dataset.json but a message of the server ('token expired'); check the addr",
        ),
        ("no-json", "is not JSON (Expecting value: line 1 column 1 (char 0)); check the address, "),
        ("other-json", "the content lacks ['format_version']; check the address, and that python "),
        ("quota", "the server answered 402 Payment Required (quota used up)"),
        ("404-xml", "there is no dataset.json ({url}/dataset.json), it is written last; check the"),
    ],
)
def test_what_comes_in_the_place_of_a_description_is_named(fault, sentence, server):
    (server.folder / "dataset.json").write_bytes(b"{}")
    server.spoil("dataset.json", *[fault] * 3)

    with pytest.raises(ConfigError) as caught:
        open_data(server.url)

    sentence = sentence.format(url=server.url, host=server.url.removesuffix("/data"))
    assert sentence in str(caught.value)
    assert "delete" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_line_is_said_before_each_pause(server):
    (server.folder / "small").write_bytes(b"1")
    server.spoil("small", "500", "503-later")
    said = []

    there = parse_location(server.url, "--data")
    read_small(there, "small", 1, patience=replace(FAST, backoff_sec=0), on_failure=said.append)

    where = f"{server.url}/small: attempt"
    assert said == [
        f"{where} 1 of 4 failed (the server answered 500 Internal Server Error); the next in 0.0 s",
        f"{where} 2 of 4 failed (the server answered 503 Service Unavailable); the next in 0.0 s",
    ]


def test_small_files_are_read_within_a_limit(server, tmp_path):
    (server.folder / "dataset.json").write_bytes(b"{}")
    server.spoil("dataset.json", "500", "short")
    here, there = (parse_location(str(place), "--data") for place in (server.folder, server.url))

    assert read_small(there, "dataset.json", 2, patience=FAST) == b"{}"
    assert read_small(here, "dataset.json", 2) == b"{}"
    for location in (here, there):
        with pytest.raises(ConfigError, match="has more than 1 bytes"):
            read_small(location, "dataset.json", 1, patience=FAST)
        with pytest.raises(MissingFileError, match="none.json"):
            read_small(location, "none.json", 1, patience=FAST)


@pytest.mark.processes
def test_a_pipe_is_a_shell_command_with_the_name_in_it(tmp_path):
    (tmp_path / "a.tar").write_bytes(CONTENT)

    assert bring(f"pipe:cat '{tmp_path}'/{{}} | cat", tmp_path / "part") == CONTENT


@pytest.mark.processes
@pytest.mark.parametrize(
    ("command", "cause"),
    [
        ("echo one >&2; echo no such {} >&2; exit 3", "exit code 3: no such a.tar"),
        ("head -c 10 {folder}/{}; sleep 600", "the command printed nothing for 0.3 s"),
        (": {}; exec >&-; sleep 600", "the command does not end"),
        ("head -c 10 {folder}/{}", "the connection ended at byte 10 of 300000"),
    ],
)
def test_a_failing_pipe_is_one_sentence(command, cause, tmp_path):
    (tmp_path / "a.tar").write_bytes(CONTENT)
    text = "pipe:" + command.replace("{folder}", shlex.quote(str(tmp_path)))
    patience = replace(IMPATIENT if "sleep" in command else FAST, attempts=2)

    with pytest.raises(ConfigError) as caught:
        bring(text, tmp_path / "part", patience)

    assert "could not be fetched in 2 attempts" in str(caught.value)
    assert cause in str(caught.value)


@pytest.mark.processes
def test_a_pipe_that_leaves_something_running_is_read_to_its_end(tmp_path):
    (tmp_path / "a.tar").write_bytes(CONTENT)

    text = f"pipe:sleep 20 >/dev/null & cat {shlex.quote(str(tmp_path))}/{{}}"
    assert bring(text, tmp_path / "part") == CONTENT


def make_tool(folder: Path, name: str, script: str) -> None:
    """Put a program on a folder for PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("scheme", "tool", "script"),
    [
        ("s3", "aws", '[ "$1 $2 $5" = "s3 cp -" ] && cat "$BUCKET/${4#s3://bucket/data/}"'),
        ("gs", "gcloud", '[ "$1 $2" = "storage cat" ] && cat "$BUCKET/${3#gs://bucket/data/}"'),
        ("gs", "gsutil", '[ "$1 $2" = "-q cat" ] && cat "$BUCKET/${3#gs://bucket/data/}"'),
    ],
)
def test_the_programs_of_object_stores_are_used(scheme, tool, script, tmp_path, monkeypatch):
    (tmp_path / "a.tar").write_bytes(CONTENT)
    make_tool(tmp_path / "bin", tool, script)
    (tmp_path / "bin/cat").symlink_to("/bin/cat")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("BUCKET", str(tmp_path))

    assert bring(f"{scheme}://bucket/data", tmp_path / "part") == CONTENT


def test_without_a_program_for_an_object_store_one_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(ConfigError, match="^s3://bucket/a.tar: needs aws on PATH or the .* s3fs"):
        bring("s3://bucket", tmp_path / "part")


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        ("latents/demo", "latents/demo"),
        ("file:///data/a%20b", "/data/a b"),
        ("file:relative", "relative"),
        ("C:odd name", "C:odd name"),
    ],
)
def test_local_locations(text, folder):
    location = parse_location(text, "--data")

    assert location == Location(text, Path(folder))
    assert location.describe("0.tar") == f"{folder}/0.tar"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--data: is empty"),
        ("pipe:cat file", "has no {} for the file's name"),
        ("ftp://host/x", "is no URL that can be read"),
        ("http:///x", "is no URL that can be read"),
        ("http://[x/y", "is no URL that can be read"),
        ("http://host/a#1", "a server is never sent what follows the #; write %23"),
        ("file://host/x", "cannot name another machine"),
        ("x" * 300, "x: File name too long; name a folder that can be read."),
    ],
)
def test_wrong_locations(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_location(text, "--data")

    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["../a.tar", "/etc/passwd", "", ".", "a/b", "a\n", "-x", "$(id)"])
def test_a_name_that_is_no_plain_file_name_is_not_looked_up(name):
    for text in ("http://host/x", "s3://bucket", "pipe:cat {}"):
        with pytest.raises(ConfigError, match="is no plain file name"):
            parse_location(text, "--data").url(name)
    with pytest.raises(ConfigError, match="is no plain file name"):
        parse_location("folder", "--data").path(name)


def test_patience_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("SWITCH_DIT_FETCH_STALL_SEC", "2.5")
    monkeypatch.setenv("SWITCH_DIT_FETCH_ATTEMPTS", "7")

    assert Patience.from_environment() == Patience(stall_sec=2.5, attempts=7)
    for wrong in ("0", "x", "1.5", "-1"):
        monkeypatch.setenv("SWITCH_DIT_FETCH_ATTEMPTS", wrong)
        with pytest.raises(ConfigError, match=f"SWITCH_DIT_FETCH_ATTEMPTS {wrong}: "):
            Patience.from_environment()


def test_letters_that_are_no_ascii_are_escaped_for_the_server(server, tmp_path):
    folder = server.folder / "größe 1"
    folder.mkdir()
    (folder / "a.tar").write_bytes(CONTENT)
    assert bring(f"{server.url}/größe 1", tmp_path / "part") == CONTENT
    (tmp_path / "part").unlink()
    assert bring(f"{server.url}/gr%C3%B6%C3%9Fe%201", tmp_path / "part") == CONTENT


@pytest.mark.parametrize("host", ["a..b", ".b", "x" * 70])
def test_a_host_that_cannot_be_looked_up_is_refused(host):
    with pytest.raises(ConfigError, match="is no URL that can be read"):
        parse_location(f"http://{host}/a", "--data")
