"""Claims: one holder, at once free when a process dies, stale by the file server's clock."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from data_tools.encoding.claims import Claims, Owner
from tests.support.launch import REPOSITORY, environment

HOLDER = """
import sys, time
from pathlib import Path
from data_tools.encoding.claims import Claims
claims = Claims(Path(sys.argv[1]), renew_sec=0.02)
print(claims.take("a"), flush=True)
claims.note("a", 7)
sys.stdin.read()
claims.__exit__()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that claims "a"."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "claims")],
        cwd=REPOSITORY,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "True\n"
    yield process
    process.kill()
    process.communicate()


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.processes
def test_one_process_holds_a_claim_and_gives_it_back(tmp_path, holder):
    with Claims(tmp_path / "claims") as claims:
        assert not claims.take("a") and claims.take("b") and not claims.take("b")
        wait_until(lambda: dict(claims.held()) == {"a": 7, "b": 0})
        holder.communicate("")
        assert claims.take("a")
        claims.release("a")
        claims.release("never held")
        assert claims.take("a")
    assert not (tmp_path / "claims").exists()


@pytest.mark.processes
def test_the_claim_of_a_killed_process_is_free_at_once(tmp_path, holder):
    with Claims(tmp_path / "claims") as claims:
        assert not claims.take("a") and claims.is_live("a")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert not claims.is_live("a") and claims.take("a") and claims.is_live("a")
        claims.sweep()
        assert not (tmp_path / "claims").exists()
        assert claims.take("c"), "sweeping disturbs nobody who is still there"


@pytest.mark.processes
def test_a_process_that_was_not_waited_for_counts_as_dead(tmp_path, holder):
    with Claims(tmp_path / "claims") as claims:
        holder.send_signal(signal.SIGKILL)
        wait_until(lambda: not claims.is_live("a"))  # a zombie, until `wait`
        assert holder.returncode is None and claims.take("a")


def elsewhere(claims, name, age_sec, **changes):
    """Write the claim of a process on another machine, renewed some time ago."""
    path = claims.folder / f"{name}.lock"
    owner = Owner("far", "another boot/1", os.getpid(), 1, "token", 3)
    path.write_text(json.dumps(dataclasses.asdict(owner) | changes))
    now = claims._now()
    os.utime(path, (now - age_sec, now - age_sec))
    return path


def test_claims_of_other_machines_are_stale_by_the_clock_of_the_file_server(tmp_path, monkeypatch):
    with Claims(tmp_path / "claims", lease_sec=60) as claims:
        elsewhere(claims, "new", 50)
        elsewhere(claims, "old", 70)
        (tmp_path / "claims" / "half written.lock").touch()
        # This machine's own clock counts for nothing.
        monkeypatch.setattr(time, "time", lambda: 1e12)
        assert not claims.take("new") and not claims.take("half written")
        assert claims.take("old")
        now = claims._now() - 70
        os.utime(tmp_path / "claims" / "half written.lock", (now, now))
        assert claims.take("half written")


def test_a_process_number_used_again_is_no_sign_of_life(tmp_path):
    with Claims(tmp_path / "claims") as claims:
        elsewhere(claims, "a", 0, machine=claims.machine, started=1)
        assert claims.take("a")


def test_claims_are_renewed_while_they_are_held(tmp_path):
    with Claims(tmp_path / "claims", renew_sec=0.02) as claims:
        claims.take("a")
        path = tmp_path / "claims" / "a.lock"
        os.utime(path, (0, 0))
        wait_until(lambda: path.stat().st_mtime > 0)


def test_a_claim_that_was_taken_over_is_not_renewed_and_not_given_back(tmp_path):
    with Claims(tmp_path / "claims", renew_sec=0.02) as claims:
        claims.take("a")
        claims.take("b")
        path = elsewhere(claims, "a", 30)
        content = path.read_bytes()
        os.utime(tmp_path / "claims" / "b.lock", (0, 0))
        wait_until(lambda: (tmp_path / "claims" / "b.lock").stat().st_mtime > 0)
        claims.release("a")
    assert path.read_bytes() == content


RACER = """
import sys
from pathlib import Path
from data_tools.encoding.claims import Claims
folder = Path(sys.argv[1])
sys.stdin.readline()
with Claims(folder / "claims") as claims:
    for piece in range(100):
        if claims.take(str(piece)):
            with (folder / "done").open("a") as file:
                file.write(f"{piece}\\n")
    print("all", flush=True)
    sys.stdin.read()
"""


@pytest.mark.processes
def test_of_many_processes_exactly_one_gets_each_piece(tmp_path):
    command = [sys.executable, "-c", RACER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    racers = [
        subprocess.Popen(command, cwd=REPOSITORY, env=environment(), **pipes) for _ in range(3)
    ]
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    assert [racer.stdout.readline() for racer in racers] == ["all\n"] * 3
    for racer in racers:
        racer.communicate()
    done = [int(line) for line in (tmp_path / "done").read_text().split()]
    assert sorted(done) == list(range(100))
    assert not (tmp_path / "claims").exists()
