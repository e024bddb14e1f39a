"""The one way out: what is said and flushed before, and what a teardown can no longer do."""

import ast

import pytest

from data_tools import exit_codes
from tests.support.launch import REPOSITORY, run


def script(body, *imports):
    return "\n".join(["import ctypes, os, sys, threading, time", *imports, body])


def call(body, expect=0, **env):
    imports = (
        "from data_tools.process.entry_point import enter",
        "from data_tools.process.leaving import flushed_when_leaving, leave, skip_teardown",
    )
    program = script(body, *imports)
    return run("python", "-c", program, expect=expect, PYTHONPATH=str(REPOSITORY), **env)


def test_the_project_has_one_way_out():
    callers = {
        str(path.relative_to(REPOSITORY))
        for room in ("models", "data_tools", "training", "benchmarks")
        for path in (REPOSITORY / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("_exit", "abort")
    }

    assert callers == {"data_tools/process/leaving.py"}


def test_a_thread_says_why_flushes_everything_and_ends_a_process_that_hangs():
    output = call(
        """
        def main():
            print("half a", end=" line")
            with flushed_when_leaving(lambda: os.write(2, b"events\\n")):
                why = "error: it hangs\\n"
                threading.Timer(0.2, leave, (7, why)).start()
                time.sleep(600)
        enter(main)
        """.replace("\n        ", "\n"),
        expect=7,
    )

    assert "error: it hangs\n" in output and "half a line" in output and "events\n" in output


def test_words_that_cannot_be_written_end_nothing_and_keep_nobody():
    """A pipe that nobody empties, while the main thread holds the lock of the stream."""
    call(
        """
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        threading.Timer(0.2, leave, (7, "bye\\n", 0.2)).start()
        sys.stdout.write("x" * (1 << 20))
        """.replace("\n        ", "\n"),
        expect=7,
    )


# What gloo's threads do to a process now and then, every time.
ABORTING = """
def main():
    libc = ctypes.CDLL(None)
    libc.on_exit(ctypes.cast(libc.abort, ctypes.c_void_p), None)
    import atexit
    atexit.register(print, "atexit's functions")
    thread = threading.Thread(target=lambda: (time.sleep(0.3), print("a thread's end")))
    thread.start()
    {met}
    sys.exit({code})
enter(main)
"""


@pytest.mark.parametrize("code", [0, exit_codes.SAVED_EXIT_CODE])
def test_a_process_that_has_met_others_leaves_without_teardown_but_cleans_up(code):
    output = call(ABORTING.format(met="skip_teardown()", code=code), expect=code)

    assert output == "a thread's end\natexit's functions\n"


def test_the_teardown_of_the_test_above_would_abort():
    """The premise."""
    call(ABORTING.format(met="", code=0), expect=-6)


def test_exit_codes_rank_as_launchers_report_them_and_as_job_scripts_know_them():
    """srun reports the highest code of all ranks."""
    common = (REPOSITORY / "slurm" / "common.sh").read_text()

    codes = exit_codes
    assert 0 < codes.CRASH_EXIT_CODE < codes.CONFIG_ERROR_EXIT_CODE < codes.SAVED_EXIT_CODE
    assert codes.SAVED_EXIT_CODE < codes.SIGNAL_EXIT_CODE
    assert f"\nSAVED={codes.SAVED_EXIT_CODE} " in common
    assert f"((status == {codes.CRASH_EXIT_CODE} || status > {codes.SIGNAL_EXIT_CODE}))" in common
    assert f"exit {codes.CONFIG_ERROR_EXIT_CODE}\n" in common
