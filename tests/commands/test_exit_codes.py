"""Exit codes that a launcher or a job script acts on."""

import signal
import socket
import time
from pathlib import Path

import pytest

from data_tools.errors import ConfigError, OutageError
from tests.support.launch import finish, start
from training.ranks.process_group import Ranks, one_sentence


@pytest.mark.processes
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


@pytest.mark.parametrize(("error", "exit_code"), [(ConfigError, 2), (OutageError, 1)])
def test_a_mistake_and_an_outage_before_the_ranks_meet_have_their_own_codes(error, exit_code):
    with pytest.raises(SystemExit) as exit_info, one_sentence(Ranks(0, 2, 0)):
        raise error("--data x: is away; try again.")

    assert exit_info.value.code == exit_code


@pytest.mark.processes
def test_a_look_at_the_nodes_while_the_datas_server_is_away_is_worth_another_try(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/data"
        impatient = {"SWITCH_DIT_FETCH_ATTEMPTS": "2", "SWITCH_DIT_FETCH_BACKOFF_SEC": "0.01"}
        impatient |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "no_proxy": "127.0.0.1"}
        process = start(
            *("python", "training/preflight.py", "--data", url, "--run-dir", tmp_path / "run"),
            **impatient,
        )
        output = finish(process)

    assert process.returncode == 1, output
    (sentence,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert f"{url}/dataset.json: could not be fetched in 2 attempts, the last time " in sentence
    assert "Traceback" not in output and not (tmp_path / "run").exists()
