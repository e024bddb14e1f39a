"""What is printed is never worth the work: terminals, pipes, disks and encodings that fail."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from data_tools.process.signals import STOP_SIGNALS
from tests.support.encode_jobs import flags, make_pictures
from tests.support.launch import REPOSITORY, environment, finish, start
from tests.support.synthetic import make_dataset
from training.checkpoints.manifest import latest_checkpoint
from training.monitoring.event_files import read_metrics
from training.run.console_log import LOG_FILE

WORK = """
import os, sys
from pathlib import Path
from data_tools.process.entry_point import enter
def main():
    for number in range(3000):
        print("line", number, "\\N{LATIN SMALL LETTER E WITH ACUTE}\\u732b\\udc80", flush=True)
        sys.stderr.write("warning: \\u732b\\n")
    Path(sys.argv[1]).write_text("done")
enter(main)
"""


def work(redirection, marker, unbuffered=False, **env):
    """Run a command that prints much and then leaves a file; return its exit code and output."""
    command = [sys.executable, *(["-u"] if unbuffered else []), "-c", WORK, str(marker)]
    result = subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$@" {redirection}', "bash", *command],
        cwd=REPOSITORY,
        env=environment(PYTHONPATH=str(REPOSITORY), PYTHONUNBUFFERED="", **env),
        capture_output=True,
        check=False,
        timeout=120,
    )
    return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize(
    "redirection",
    [
        "| head -1",
        "2>&1 | head -1",
        ">/dev/full",
        ">/dev/full 2>&1",
        ">&-",
        ">&- 2>&-",
        "<&- >&- 2>&-",
    ],
)
def test_work_goes_on_wherever_its_output_goes(tmp_path, redirection, unbuffered):
    code, _, said = work(redirection, tmp_path / "marker", unbuffered)

    assert code == 0, said
    assert (tmp_path / "marker").read_text() == "done"
    assert b"Traceback" not in said and b"Exception ignored" not in said
    assert said.endswith(b"a part of the output is lost (No space left on device).\n") == (
        redirection == ">/dev/full"
    )


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", rb"\xe9\u732b\udc80"),
        ("iso-8859-1", b"\xe9" + rb"\u732b\udc80"),
        ("utf-8", "\u00e9\u732b".encode() + rb"\udc80"),
    ],
)
def test_a_character_that_an_encoding_lacks_is_written_as_an_escape(tmp_path, encoding, shown):
    code, output, _ = work("", tmp_path / "marker", PYTHONIOENCODING=encoding)

    assert code == 0
    assert output.splitlines() == [b"line %d %b" % (i, shown) for i in range(3000)]


def test_names_of_files_are_read_in_any_locale(tmp_path):
    """Under ASCII and Latin-1 alike; what is printed is still what the terminal can show."""
    no_utf8 = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    script = (
        "import sys; from data_tools.process.entry_point import enter;"
        "enter(lambda: print(sys.argv))"
    )
    command = [sys.executable, "-c", script, "l\u00e4ufe", b"\xff"]
    said = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment(PYTHONPATH=str(REPOSITORY), **no_utf8),
        capture_output=True,
        check=True,
    )

    assert said.stdout == rb"['-c', 'l\xe4ufe', '\udcff']" + b"\n"


def test_a_file_opened_later_does_not_become_the_closed_output(tmp_path):
    script = (
        "import os, subprocess; from data_tools.process.entry_point import enter\n"
        "def main():\n"
        f"    with open({str(tmp_path / 'checkpoint')!r}, 'w') as file:\n"
        "        os.write(1, b'noise'); subprocess.run(['echo', 'noise'], check=True)\n"
        "        print('noise', flush=True); file.write('state')\n"
        "enter(main)"
    )
    command = [sys.executable, "-c", script]
    subprocess.run(
        ["bash", "-c", '"$@" <&- >&- 2>&-', "bash", *command],
        cwd=REPOSITORY,
        env=environment(PYTHONPATH=str(REPOSITORY)),
        check=True,
    )

    assert (tmp_path / "checkpoint").read_text() == "state"


STOPPED = """
import sys, time
from data_tools.process.entry_point import enter
def main():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        time.sleep(0.2)
        print("closed", flush=True)
enter(main, when_stopped="the same command goes on")
"""


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_ends_a_command_with_one_line_unless_it_was_ignored(number):
    """The environment's command sets what nohup and others leave behind."""
    script = (sys.executable, "-c", STOPPED)
    process = start("env", "--default-signal", *script, PYTHONPATH=str(REPOSITORY))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    time.sleep(0.05)
    process.send_signal(number)  # as launchers repeat it
    said = finish(process)

    name = "Ctrl-C" if number == signal.SIGINT else number.name
    assert said == f"closed\nstopped by {name}; the same command goes on\n"
    assert process.returncode == 128 + number

    process = start("env", f"--ignore-signal={number}", *script, PYTHONPATH=str(REPOSITORY))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.kill()
    finish(process)


def test_on_a_terminal_the_line_about_a_signal_is_not_behind_a_bar():
    script = STOPPED.replace('print("closed", flush=True)', 'sys.stderr.write(" 50%|#####")')
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=slave,
        stderr=slave,
        cwd=REPOSITORY,
        env=environment(PYTHONPATH=str(REPOSITORY)),
    )
    os.close(slave)
    said = os.read(master, 1000)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    with suppress(OSError):  # Linux says so at the end
        while part := os.read(master, 1000):
            said += part
    os.close(master)

    assert said.endswith(b" 50%|#####\r\nstopped by SIGTERM; the same command goes on\r\n")


def command(*argv, redirection="", **env):
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$@" {redirection}', "bash", *map(str, argv)],
        cwd=REPOSITORY,
        env=environment(**env),
        capture_output=True,
        text=True,
        errors="backslashreplace",
        check=False,
        timeout=300,
    )


def test_a_description_is_printed_on_any_terminal_and_a_lost_one_is_a_failure(tmp_path):
    make_dataset(tmp_path, [8])
    path = tmp_path / "dataset.json"
    described = json.loads(path.read_text())
    described["classes"][0] |= {"id": "H\u00fcndin", "name": "\u732b"}
    path.write_text(json.dumps(described))
    script = ("python", "data_tools/inspect_dataset.py", tmp_path)

    shown = command(*script, PYTHONIOENCODING="ascii")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert r"\u732b" in shown.stdout
    cut = command(*script, redirection="| head -1")
    assert (cut.returncode, cut.stdout.count("\n"), cut.stderr) == (0, 1, "")
    lost = command(*script, "--json", redirection="> /dev/full")
    assert lost.returncode == 1
    assert lost.stderr == "warning: a part of the output is lost (No space left on device).\n"


def test_help_and_mistakes_are_shown_on_a_terminal_without_accents(tmp_path):
    ascii_only = {"PYTHONIOENCODING": "ascii"}

    answer = command("python", "training/score_images.py", "--help", **ascii_only)
    mistake = command("python", "data_tools/verify_shards.py", "--data", "f\u00fcr", **ascii_only)

    assert (answer.returncode, answer.stderr) == (0, "")
    assert r"Fr\xe9chet" in answer.stdout
    assert mistake.returncode == 2 and r"--data f\xfcr: does not exist" in mistake.stderr


def test_encoding_goes_on_without_a_reader_and_with_names_that_a_terminal_lacks(tmp_path):
    images = make_pictures(tmp_path / "images")
    (images / "red_cars").rename(images / "\u732b")
    (images / "\u732b" / "besch\u00e4digt.png").write_bytes(b"xx")
    script = ("python", "data_tools/encode_latents.py", *flags(images, tmp_path / "set"))

    result = command(*script, redirection="| head -1", PYTHONIOENCODING="ascii")

    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr and result.stdout.count("\n") == 1
    assert len(json.loads((tmp_path / "set/dataset.json").read_text())["shards"]) == 3


STEPS = 8
TRAINING = [
    *("--num-experts", 2, "--patch-size", 16, "--global-batch-size", 4, "--warmup-steps", 2),
    *("--log-every", 1, "--save-every", 4, "--sample-every", 0, "--max-steps", STEPS),
]


def check_whole(run_dir):
    assert [record["step"] for record in read_metrics(run_dir)] == list(range(1, STEPS + 1))
    assert latest_checkpoint(run_dir).name == f"step-{STEPS:07d}"
    lines = (run_dir / LOG_FILE).read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if f"step {STEPS}/{STEPS}  loss" in line]
    assert lines[-1].endswith(f"results in {run_dir}")


@pytest.mark.processes
def test_training_goes_on_when_the_disk_of_its_output_is_full(train_forked, demo_latents, tmp_path):
    run_dir = tmp_path / "l\u00e4ufe"

    train_forked(
        *("--data", demo_latents, "--run-dir", run_dir, *TRAINING), said_to=Path("/dev/full")
    )

    check_whole(run_dir)


@pytest.mark.processes
def test_training_goes_on_when_its_terminal_is_gone(train_forked, demo_latents, tmp_path):
    run_dir, metrics = tmp_path / "run", tmp_path / "run/metrics.jsonl"
    master, slave = pty.openpty()
    name = os.ttyname(slave)
    seen = []

    def leave():
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 2:
            if select.select([master], [], [], 0.01)[0]:
                seen.append(os.read(master, 1 << 16))
        os.close(master)

    watcher = threading.Thread(target=leave, daemon=True)
    watcher.start()
    train_forked(*("--data", demo_latents, "--run-dir", run_dir, *TRAINING), said_to=Path(name))
    watcher.join()
    os.close(slave)

    assert b"starting at step 0" in b"".join(seen)
    check_whole(run_dir)
