"""What a person sees of a run's progress, on a real pseudo-terminal and in a file."""

import os
import pty
import re
import sys
import termios
import threading
from contextlib import redirect_stderr, redirect_stdout

import pytest

from training.monitoring.progress import Progress
from training.run.console_log import LOG_FILE, log_to

METRICS = {
    "loss/total": 0.1234,
    "loss/mse": 0.1,
    "loss/vlb": 0.02,
    "loss/prior": 0.0034,
    "optim/lr": 1e-4,
    "speed/samples_per_sec": 93.26,
}
LINE = "step 40/100  loss 0.1234 (mse 0.1000 vlb 0.0200 prior 0.0034)  lr 1.00e-04  93.3 images/s"


@pytest.fixture
def terminal():
    """Yield a text stream that is a terminal and a function that closes it, for what was shown."""
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 120))
    parts = []

    def read():
        try:
            while part := os.read(reader, 4096):
                parts.append(part)
        except OSError:  # Linux's way to say that the other end is closed
            pass

    thread = threading.Thread(target=read)
    thread.start()
    stream = os.fdopen(writer, "w", buffering=1)

    def shown():
        stream.close()
        thread.join()
        return b"".join(parts).decode()

    yield stream, shown
    stream.close()
    thread.join()
    os.close(reader)


def train_a_bit(run_dir, terminal, is_quiet=False):
    """Use the bar and the log as training/main.py does."""
    with (
        redirect_stdout(terminal),
        redirect_stderr(terminal),
        log_to(run_dir, is_quiet) as note,
        Progress(100, note, is_quiet, terminal) as progress,
    ):
        progress.begin(30, 3)
        print("resuming", 30, flush=True)  # in several parts
        for _ in range(10):
            progress.advance()
        progress.show(METRICS, 40, 5.0)
        sys.stderr.write("warning: a spike\n")


def on_screen(text):
    """Return the lines that stay on a terminal: what follows the last return to a line's start."""
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    return [line.rpartition("\r")[2] for line in lines]


def test_a_terminal_shows_a_bar_below_all_other_lines(terminal, tmp_path):
    stream, shown = terminal
    train_a_bit(tmp_path, stream)

    lines = on_screen(shown())

    assert lines[:2] == ["resuming 30", "warning: a spike"]
    assert len(lines) == 3
    wanted = r" 40%\|.*\| 40/100 \[.*, loss 0\.1234, 93\.3 images/s, 2 restart\(s\)\]"
    assert re.fullmatch(wanted, lines[2].rstrip()), lines[2]
    log = (tmp_path / LOG_FILE).read_text()
    assert LINE in log and "warning: a spike" in log and "%|" not in log


def test_a_file_gets_lines_and_the_log_the_same(tmp_path):
    with (tmp_path / "output").open("w") as file:
        train_a_bit(tmp_path, file)

    output = (tmp_path / "output").read_text().splitlines()
    log = (tmp_path / LOG_FILE).read_text().splitlines()
    assert output == ["resuming 30", f"{LINE}  left 0:00:12", "warning: a spike"]
    assert [line.split(" ", 1)[1] for line in log] == output


def test_quiet_leaves_warnings_only_and_the_log_whole(terminal, tmp_path):
    stream, shown = terminal
    train_a_bit(tmp_path, stream, is_quiet=True)

    assert on_screen(shown()) == ["warning: a spike"]
    log = (tmp_path / LOG_FILE).read_text()
    assert "resuming 30" in log and LINE in log and "warning: a spike" in log


def test_an_interval_without_losses_is_told(tmp_path, capsys):
    metrics = {name: value for name, value in METRICS.items() if not name.startswith("loss/")}
    with log_to(tmp_path) as note, Progress(100, note, False, sys.stderr) as progress:
        progress.begin(0, 1)
        progress.show(metrics, 40, 5.0)

    assert "step 40/100  every step was left out  lr" in capsys.readouterr().out
