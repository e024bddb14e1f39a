"""Exit codes that a launcher or a job script acts on."""

import signal
import time
from pathlib import Path

import pytest

from tests.launch import finish, start


@pytest.mark.parametrize("program", ["main.py", "preflight.py"])
def test_a_rank_that_is_ended_while_it_starts_does_not_hide_the_exit_code_of_another(program):
    process = start("python", f"training/{program}", RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    folder = Path(f"/proc/{process.pid}")
    is_minded = 1 << (signal.SIGTERM - 1)

    while not int((folder / "status").read_text().split("SigCgt:")[1].split()[0], 16) & is_minded:
        assert process.poll() is None
        time.sleep(0.005)
    is_torch_loaded = "libtorch" in (folder / "maps").read_text()
    process.send_signal(signal.SIGTERM)
    output = finish(process)

    assert not is_torch_loaded  # its import takes the longest part of a start
    assert process.returncode == 1, output  # below a mistake's 2: launchers report the highest
