"""The acceptance for GPUs, rehearsed with the CPU in the GPU's place, and its supervision."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks.gpu_acceptance import main, parse
from benchmarks.gpu_parts.catalogue import PARTS
from benchmarks.gpu_parts.record import Record, read_record
from tests.support.launch import REPOSITORY, environment

REHEARSAL = ("--tiny", "--device", "cpu", "--minutes", "90", "--output")
# Parts that are there in place of the real ones: one that ends, one with an error, one that hangs.
STAND_INS = """
import sys, time
sys.path.insert(0, {root!r})
from benchmarks import gpu_acceptance
from benchmarks.gpu_parts.catalogue import PARTS, Entry
from data_tools.process.entry_point import enter

def good(setting, record):
    "Good."
    record.check(True, "one is one")
    record.number("one, pieces", 1)

def broken(setting, record):
    "Broken."
    record.check(True, "before the error")
    record.write(setting.folder)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def hanging(setting, record):
    "Hanging."
    time.sleep(600)

PARTS.clear()
PARTS.update(first=Entry(good, 60), broken=Entry(broken, 60), hanging=Entry(hanging, 1), last=Entry(good, 60))
gpu_acceptance.__file__ = __file__
enter(gpu_acceptance.main)
"""  # noqa: E501


def run(*command):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.processes
@pytest.mark.slow
def test_every_part_is_rehearsed_on_a_cpu(tmp_path):
    ended = run("benchmarks/gpu_acceptance.py", *REHEARSAL, tmp_path)

    stored = json.loads((tmp_path / "acceptance.json").read_text())["parts"]
    assert list(stored) == list(PARTS)
    assert [part["state"] for part in stored.values()] == ["done"] * len(PARTS), ended.stdout
    failed = {
        name: [check["text"] for check in part["checks"] if not check["has_passed"]]
        for name, part in stored.items()
    }
    assert ended.returncode == int(any(failed.values()))
    assert not any(failed.values()), failed
    for name in ("layout", "parity", "programs", "saving", "inference"):
        assert stored[name]["checks"], name
    for name in ("waits", "ceilings", "step", "experts", "inference"):
        numbers = stored[name]["numbers"].values()
        assert numbers and min(numbers) >= 0, name
    assert "GPU" in " ".join(stored["tests"]["remarks"] + stored["memory"]["remarks"])


@pytest.mark.processes
def test_a_part_that_breaks_or_hangs_costs_only_itself(tmp_path):
    script = tmp_path / "accept.py"
    script.write_text(STAND_INS.format(root=str(REPOSITORY)))

    ended = run(script, *REHEARSAL, tmp_path / "out")

    assert ended.returncode == 1
    names = ("first", "broken", "hanging", "last")
    records = {name: read_record(tmp_path / "out", name) for name in names}
    states = {name: record.state for name, record in records.items()}
    assert states == {"first": "done", "broken": "broken", "hanging": "stopped", "last": "done"}
    assert [check.text for check in records["broken"].checks] == ["before the error"]
    assert "an illegal memory access" in ended.stderr
    table = ended.stdout[ended.stdout.rindex("\npart ") :].splitlines()
    assert [line.split()[0] for line in table[2:6]] == ["first", "broken", "hanging", "last"]
    assert table[6:] == ["2 failed", "  - broken: broken", "  - hanging: stopped"]


def test_a_failed_check_is_a_failure():
    record = Record("some", "done")
    record.check(True, "this is so")
    record.check(False, "that is so")

    assert record.failures == ["that is so"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pace"], "pace is no part of the acceptance; use tests, layout,"),
        (["--device", "tpu"], "--device tpu: unknown device; use cuda or cpu."),
        (["--device", "cpu"], "--device cpu: takes hours at the real sizes; add --tiny."),
        (["--minutes", "0"], "--minutes must be at least 1, not 0."),
    ],
)
def test_mistakes_are_refused_in_one_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)

    assert left.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_the_rehearsal_is_offered(capsys):
    with pytest.raises(SystemExit):
        main([])

    assert "torch finds no CUDA device; use --tiny --device cpu" in capsys.readouterr().err


def test_parts_are_run_in_the_order_of_the_catalogue():
    args = parse(["step", "layout", *REHEARSAL, "out"])

    assert args.parts == ["layout", "step"]
