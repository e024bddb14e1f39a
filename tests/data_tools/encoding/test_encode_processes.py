"""Many processes over one output: the same bytes, whoever is killed whenever."""

import dataclasses
import json
import os
import shutil
import signal
import time

import pytest
import torch

from data_tools.encode_latents import main
from data_tools.encoding.claims import Owner
from data_tools.encoding.command import choose_device, choose_threads
from data_tools.encoding.output import CLAIMS_NAME
from data_tools.errors import ConfigError
from data_tools.files import as_json, write_text_once
from data_tools.shards.manifest import MANIFEST_NAME, DatasetManifest
from tests.support.encode_jobs import content, flags, make_pictures
from tests.support.launch import BIN, finish, run, start

pytestmark = pytest.mark.usefixtures("one_thread")  # bytes are compared

SCRIPT = ("python", "data_tools/encode_latents.py")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"), 80)


@pytest.fixture(scope="module")
def encoded(images, tmp_path_factory):
    """By one process."""
    folder = tmp_path_factory.mktemp("latents") / "set"
    main(flags(images, folder))
    return folder


def kill_writer(output, shards):
    """Kill the process that first writes one of the shards; return its number."""
    deadline = time.monotonic() + 300
    while not (found := list(output.glob(f"{shards}.tar.*.tmp"))):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    victim = int(found[0].name.split(".")[2].split("-")[0])
    os.kill(victim, signal.SIGKILL)
    return victim


@pytest.mark.processes
def test_killed_processes_are_replaced_by_others_to_the_same_bytes(images, encoded, tmp_path):
    output = tmp_path / "set"
    processes = {p.pid: p for p in (start(*SCRIPT, *flags(images, output)) for _ in range(2))}
    # One dies, the other goes on and dies as well.
    finish(processes.pop(kill_writer(output, "0000[2-5]")))
    finish(processes.pop(kill_writer(output, "0000[6-9]")))
    assert list(output.glob("*.json")) and list(output.glob("*.tmp"))
    assert list((output / CLAIMS_NAME).iterdir()), "a killed process leaves its claims"
    assert not (output / MANIFEST_NAME).exists()
    with pytest.raises(ConfigError, match="encoding did not finish"):
        DatasetManifest.load(output)

    command = ("--standalone", "--nproc-per-node", 2, *SCRIPT[1:], *flags(images, output))
    text = run(BIN / "torchrun", *command)

    assert text.count("80 samples in 10 shards") == 1, "one of them speaks"
    assert content(output) == content(encoded)


def claim_elsewhere(output, index, age_sec):
    """Leave the claim of a process of another machine."""
    folder = output / CLAIMS_NAME
    folder.mkdir(parents=True, exist_ok=True)
    owner = Owner("far", "another boot/1", 1, 1, "token", 5)
    path = folder / f"{index:05d}.lock"
    path.write_text(json.dumps(dataclasses.asdict(owner)))
    os.utime(path, (time.time() - age_sec,) * 2)
    return path


@pytest.mark.processes
def test_a_process_waits_for_shards_that_others_encode(images, encoded, tmp_path):
    output = tmp_path / "set"
    claim = claim_elsewhere(output, 4, 0)
    process = start(*SCRIPT, *flags(images, output))
    lines = []
    while not lines or "waiting for other processes: 1 shard" not in lines[-1]:
        lines.append(process.stdout.readline())
        assert lines[-1], lines
    assert not (output / MANIFEST_NAME).exists()

    for name in ("00004.tar", "00004.json"):
        shutil.copy(encoded / name, output / name)
    text = finish(process)

    assert process.returncode == 0 and "80 samples in 10 shards" in text
    assert content(output) == content(encoded)
    assert not claim.exists()


def test_a_claim_that_nobody_renews_is_taken_over(images, encoded, tmp_path):
    output = tmp_path / "set"
    claim_elsewhere(output, 4, 1000)
    temporary = output / "00004.tar.1-0123.tmp"
    temporary.write_bytes(b"half a shard")
    (output / f"{MANIFEST_NAME}.0123.tmp").write_bytes(b"{")
    os.utime(output / f"{MANIFEST_NAME}.0123.tmp", (0, 0))

    main(flags(images, output))

    assert content(output) == content(encoded)


def test_the_loser_of_a_race_keeps_what_the_other_wrote(images, encoded, tmp_path, monkeypatch):
    """Its temporary file is removed by a process that believes it dead and writes the shard."""
    original = os.replace

    def too_late(source, target):
        if str(target).endswith("00004.tar"):
            for name in ("00004.tar", "00004.json"):
                shutil.copy(encoded / name, tmp_path / name)
            os.unlink(source)
        original(source, target)

    monkeypatch.setattr(os, "replace", too_late)
    main(flags(images, tmp_path))

    assert content(tmp_path) == content(encoded)


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stopped_process_gives_its_claims_back_and_says_what_next(images, tmp_path, number):
    output = tmp_path / "set"
    process = start("env", "--default-signal", *SCRIPT, *flags(images, output))
    while not list(output.glob("00003.tar.*.tmp")):
        assert process.poll() is None
        time.sleep(0.001)
    os.killpg(process.pid, number)
    os.killpg(process.pid, number)  # launchers repeat it
    text = finish(process)

    name = "Ctrl-C" if number == signal.SIGINT else number.name
    assert process.returncode == 128 + number and "Traceback" not in text
    assert text.endswith(f"stopped by {name}; the same command goes on\n"), text
    assert not (output / CLAIMS_NAME).exists() and not list(output.glob("*.tmp"))


@pytest.mark.parametrize("has_links", [True, False])
def test_of_several_writers_the_first_one_wins(tmp_path, monkeypatch, has_links):
    if not has_links:
        monkeypatch.setattr(os, "link", lambda *_: os.stat("/dev/null/x"))
    for number in range(3):
        write_text_once(tmp_path / "a.json", as_json({"number": number}))
    assert content(tmp_path) == {"a.json": b'{\n "number": 0\n}\n'}


def test_the_batch_size_is_chosen_once_and_kept(images, tmp_path, capsys):
    auto = flags(images, tmp_path, **{"--batch-size": "auto"})
    main(auto)
    assert "--batch-size auto: 32" in capsys.readouterr().out
    (tmp_path / "00002.json").unlink()
    before = content(tmp_path)
    path = tmp_path / "encoding.json"
    path.write_text(path.read_text().replace('"batch_size": 32', '"batch_size": 5'))
    main(auto)
    assert "auto" not in capsys.readouterr().out
    after = content(tmp_path)
    assert json.loads(after["encoding.json"])["batch_size"] == 5
    assert after["00003.tar"] == before["00003.tar"]


def test_each_process_of_a_machine_has_its_own_gpu_and_its_share_of_the_cores(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert choose_device(None) == torch.device("cuda:0")
    for name, value in (("PROCID", 2), ("STEP_ID", 0), ("STEP_NUM_TASKS", 4), ("LOCALID", 2)):
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert choose_device(None) == torch.device("cuda:2")
    for name in ("PROCID", "STEP_ID"):
        monkeypatch.delenv(f"SLURM_{name}")
    monkeypatch.setenv("LOCAL_RANK", "5")  # by hand; more processes than GPUs share them
    assert choose_device(None) == torch.device("cuda:1")
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    assert (choose_threads(None), choose_threads(3)) == (12, 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert choose_threads(None) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert choose_threads(None) == 1
