"""The copy of what a run prints: all of it, with times, in files of bounded size."""

import os
import re
import sys
import threading

import pytest

from training.ranks.agreement import RunError
from training.run import console_log
from training.run.console_log import LOG_FILE, NUM_OLDER, log_to


def messages(path):
    lines = path.read_text().splitlines()
    found = [re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (.*)", line) for line in lines]
    return [match[1] if match else line for match, line in zip(found, lines, strict=True)]


def test_what_is_printed_goes_to_the_terminal_and_to_the_log(tmp_path, capsys):
    with log_to(tmp_path):
        print("step 1", "loss 2", flush=True)
        sys.stderr.write("warning: a\nwarn")
        sys.stderr.write("ing: b\n")
        sys.stderr.write("\rhalf\rwhole 100 %\n")
        assert not sys.stdout.isatty()
    print("later")

    assert capsys.readouterr() == (
        "step 1 loss 2\nlater\n",
        "warning: a\nwarning: b\n\rhalf\rwhole 100 %\n",
    )
    assert messages(tmp_path / LOG_FILE) == [
        "step 1 loss 2",
        "warning: a",
        "warning: b",
        "whole 100 %",
    ]


def test_what_ends_a_run_is_its_last_line(tmp_path):
    with pytest.raises(RunError), log_to(tmp_path):
        raise RunError("the loss is not finite.")
    with pytest.raises(ZeroDivisionError), log_to(tmp_path):
        print(1 / 0)

    first, *traceback = messages(tmp_path / LOG_FILE)
    assert first == "error: the loss is not finite."
    assert traceback[-1] == "ZeroDivisionError: division by zero"


def test_the_log_is_bounded_and_loses_its_oldest_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(console_log, "MAX_BYTES", 1000)
    with log_to(tmp_path):
        for number in range(1000):
            print(f"line {number}")

    files = [tmp_path / LOG_FILE, *(tmp_path / f"{LOG_FILE}.{i + 1}" for i in range(NUM_OLDER))]
    assert sorted(tmp_path.iterdir()) == files
    assert all(path.stat().st_size <= 1000 for path in files)
    lines = [line for path in reversed(files) for line in messages(path)]
    assert lines == [f"line {number}" for number in range(1000 - len(lines), 1000)]


def test_a_log_that_cannot_be_written_is_said_once_and_costs_nothing_else(tmp_path, capsys):
    (tmp_path / LOG_FILE).mkdir()
    with log_to(tmp_path):
        print("a")
        print("b")

    output = capsys.readouterr()
    assert output.out == "a\nb\n"
    assert output.err.count("lines are missing (") == 1


def test_a_log_whose_disk_hangs_keeps_no_line_of_a_report_from_the_terminal(tmp_path, capfd):
    os.mkfifo(tmp_path / LOG_FILE)  # a write to it waits, as on a file server that is gone
    report = "Traceback (most recent call last):\n  somewhere\nerror: [rank 0] what to do\n"
    with log_to(tmp_path):
        thread = threading.Thread(target=sys.stderr.write, args=[report], daemon=True)
        thread.start()
        thread.join(timeout=0.5)
        is_waiting = thread.is_alive()
        said = capfd.readouterr().err
        with open(tmp_path / LOG_FILE) as reader:  # the disk is back
            lines = [reader.readline() for _ in range(3)]
            thread.join()

    assert is_waiting
    assert said == report
    assert [line.split(" ", 1)[1] for line in lines] == report.splitlines(keepends=True)
