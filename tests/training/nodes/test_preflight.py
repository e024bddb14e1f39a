"""What a look at the nodes says, from what the nodes said; test_cluster_slurm.py has real nodes."""

import dataclasses
import json
import socket
import threading
import time
from datetime import timedelta

import pytest
import torch

from data_tools.errors import ConfigError
from data_tools.shards.manifest import DatasetManifest
from tests.support.configs import FP32
from tests.support.evaluated_run import STEP, make_run
from tests.support.launch import run
from training import preflight
from training.checkpoints.manifest import tag_of
from training.config.command_line import CommandLine
from training.nodes import bandwidth
from training.nodes.bandwidth import Bandwidth, floor_gbps, judge
from training.nodes.facts import NodeFacts, collect, compare, exit_code_of
from training.preflight import PreflightError, Stage, agree, check_job, connect
from training.ranks.process_group import Ranks


def facts(rank, **changes):
    usual = NodeFacts(
        rank=rank,
        node=f"node{rank // 2}",
        problem="",
        hardware="2 x GPU",
        commit="abc",
        sources="0",
        python="3.11.7",
        packages={"torch": "2.13.0", "numpy": "2.4.6"},
        data="1",
        checkpoint="",
    )
    return dataclasses.replace(usual, **changes)


def nodes(**changes):
    """Three nodes of two ranks; the last one is different."""
    return [facts(rank, **(changes if rank >= 4 else {})) for rank in range(6)]


def test_equal_nodes_are_fine():
    assert compare(nodes()) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"commit": "def"}, "commit def, the other nodes have abc; check out the same commit"),
        ({"sources": "9"}, "sources differ from the other nodes'; its copy of this program"),
        ({"python": "3.12.1"}, "python 3.12.1, the other nodes have 3.11.7; make VENV"),
        ({"hardware": "1 x GPU"}, "hardware 1 x GPU, the other nodes have 2 x GPU; choose"),
        ({"data": "2"}, "data differ from the other nodes'; copy the same data set there"),
        ({"checkpoint": "x"}, "checkpoint x, the other nodes have none; put --run-dir on a disk"),
        ({"packages": {"torch": "2.0"}}, "numpy missing instead of 2.4.6, torch 2.0 instead of 2"),
        ({"problem": "--data x: gone."}, "--data x: gone."),
    ],
)
def test_a_node_that_differs_is_named_once(changes, sentence):
    (found,) = compare(nodes(**changes))

    assert found.startswith("node node2: ")
    assert sentence in found


def test_the_first_node_is_named_if_it_is_the_odd_one():
    everyone = [facts(rank, commit="def" if rank < 2 else "abc") for rank in range(6)]

    assert compare(everyone)[0].startswith("node node0: commit def, the other nodes have abc")


def test_a_mistake_that_all_ranks_find_is_no_nodes_fault():
    everyone = [facts(rank, problem="--lr: no.") for rank in range(6)]

    assert compare(everyone) == ["--lr: no."]


@pytest.mark.parametrize(
    ("codes", "expected"), [([1, 1], 1), ([0, 1], 1), ([1, 2], 2), ([0, 2], 2), ([0, 0], 2)]
)
def test_only_a_server_that_is_away_is_worth_another_start(codes, expected):
    everyone = [facts(rank, exit_code=code) for rank, code in enumerate(codes)]

    assert exit_code_of(everyone) == expected


def test_facts_travel_as_text():
    assert NodeFacts(**json.loads(json.dumps(dataclasses.asdict(facts(3))))) == facts(3)


@pytest.mark.processes
def test_a_check_that_fails_is_a_fact(monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def check():
        raise ConfigError("--data x: does not exist.")

    found = collect(Ranks(1, 2, 0), check)

    assert (found.node, found.problem) == ("node7", "--data x: does not exist.")
    assert found.packages["deepspeed"] == "0.19.8"


@pytest.mark.processes
def test_gpus_that_slurm_gave_must_be_seen(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "64")

    found = collect(Ranks(0, 1, 0), lambda: ("", ""))

    assert "and Slurm gave 64; look at nvidia-smi" in found.problem


def test_slow_nodes_are_refused_by_the_sites_number_and_else_compared():
    bandwidth = Bandwidth({"a": 10.0, "b": 9.0, "c": 1.0}, 5.0, 5.0)

    slow, odd = judge(bandwidth, 2.0)

    assert [sentence.split()[1] for sentence in slow] == ["c"]
    assert odd == ["node c exchanges 1.000 GB/s, the others much more."]
    assert judge(Bandwidth({"b": 1.0}, 5.0, 5.0), 0.0) == ([], [])
    assert str(bandwidth).endswith("slowest node c 1.00 GB/s")


def test_the_sites_number_is_a_number(monkeypatch):
    monkeypatch.setenv("MIN_NODE_GBPS", "fast")
    with pytest.raises(ConfigError, match="^MIN_NODE_GBPS=fast is no number"):
        floor_gbps()


@pytest.mark.processes
def test_one_process_is_looked_at_too(demo_latents, tmp_path):
    flags = ["--data", demo_latents, "--run-dir", tmp_path / "run", "--num-classes", 10]

    output = run("python", "training/preflight.py", *flags)

    assert "nodes: 1 rank(s) on 1 node(s) (" in output
    assert not (tmp_path / "run").exists()


def test_checkpoints_of_different_moments_are_on_one_disk():
    # The second node looked before an earlier job published, and one rank of the third after.
    names = ["b", "b", "a", "a", "b", "c"]
    everyone = [facts(rank, checkpoint=name) for rank, name in enumerate(names)]

    assert compare(everyone) == []


def test_a_node_without_the_others_checkpoints_has_another_disk():
    names = ["", "", "a", "b", "c", "d"]
    everyone = [facts(rank, checkpoint=name) for rank, name in enumerate(names)]

    (found,) = compare(everyone)

    assert found.startswith("node node0: checkpoint none, the other nodes have d; put --run-dir")


@pytest.mark.precision
def test_a_run_with_a_checkpoint_is_checked_as_training_does(tmp_path):
    config = make_run(tmp_path / "run", tmp_path / "data", sample_every=0)
    command = CommandLine(config, FP32, dry_run=False)

    data, checkpoint = check_job(command, Ranks(0, 1, 0))

    assert data == DatasetManifest.load(tmp_path / "data").hash
    assert checkpoint == str(tmp_path / "run" / "checkpoints" / tag_of(STEP))


TIMEOUT = timedelta(seconds=0.5)


@pytest.fixture
def short_grace(monkeypatch):
    monkeypatch.setattr(preflight, "GRACE_SEC", 0.2)
    monkeypatch.setattr(preflight.process_group, "FOLLOWER_WAIT_SEC", 0.5)
    monkeypatch.setenv("MASTER_ADDR", "node0")
    monkeypatch.setenv("SLURMD_NODENAME", "node1")


@pytest.fixture
def ended(monkeypatch):
    """The exit codes of stages that gave up."""
    codes = []
    monkeypatch.setattr(preflight.os, "_exit", codes.append)
    return codes


@pytest.fixture
def begin(short_grace, ended, monkeypatch):
    """Begin the stages of a rank; none ends this process later."""
    monkeypatch.setenv("MASTER_ADDR", "node0")
    monkeypatch.setenv("MASTER_PORT", "29500")
    stages = []

    def begin(ranks):
        stages.append(Stage(ranks, TIMEOUT))
        return stages[-1]

    yield begin
    for stage in stages:
        stage.close()


@pytest.mark.processes  # git, for one: what program the node has
@pytest.mark.parametrize("argv", [["--lr", "fast"], ["--data", "none", "--dry-run"]])
def test_a_look_that_has_ended_leaves_no_time_limit_behind(argv, monkeypatch, tmp_path):
    """Else it would end this process in ten minutes, whatever it does then."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.ranks.process_group.wait_to_be_ended", lambda _code: None)
    with pytest.raises(SystemExit) as ended:
        preflight.main(argv)

    assert ended.value.code == 2
    assert not [t for t in threading.enumerate() if isinstance(t, threading.Timer)]


def test_a_first_node_that_does_not_answer_is_named(begin, ended):
    store, ranks = torch.distributed.HashStore(), Ranks(2, 4, 0)
    began = time.monotonic()

    with pytest.raises(PreflightError, match=r"^node node0 \(rank 0\) gave node1 no answer"):
        agree(store, facts(2, node="node1"), ranks, TIMEOUT, begin(ranks))

    # Longer than rank 0's own limit: what it says of a third node comes first.
    assert time.monotonic() - began > (2 * TIMEOUT).total_seconds() + preflight.GRACE_SEC
    assert not ended


def test_a_connection_that_hangs_for_good_names_the_first_node_too(begin, ended, capfd):
    ranks = Ranks(2, 4, 0)
    stage = begin(ranks)

    class Stopped:
        def set(self, *_):
            deadline = time.monotonic() + 60
            while not ended and time.monotonic() < deadline:
                time.sleep(0.05)
            raise RuntimeError("Broken pipe")

    with pytest.raises(PreflightError):
        agree(Stopped(), facts(2, node="node1"), ranks, TIMEOUT, stage)

    assert ended == [2]
    assert capfd.readouterr().err.startswith("error: node node0 (rank 0) gave node1 no answer")


def test_a_slow_first_node_still_says_who_did_not_report(begin):
    store, ranks = torch.distributed.HashStore(), Ranks(0, 2, 0)
    stage = begin(ranks)
    time.sleep(1.8 * TIMEOUT.total_seconds())  # its own files

    _, problems, _, _ = agree(store, facts(0), ranks, TIMEOUT, stage)

    assert [problem.split(":")[0] for problem in problems] == ["rank 1 did not report within 0 s"]


def test_a_taken_port_is_no_fault_of_the_network(monkeypatch):
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))

        with pytest.raises(PreflightError, match=rf"^MASTER_PORT={port}: this port of .* is taken"):
            connect(Ranks(0, 1, 0), TIMEOUT)


def test_all_ranks_take_part_in_the_first_operation_of_a_group(single_process_group, monkeypatch):
    calls, all_reduce = [], torch.distributed.all_reduce
    monkeypatch.setattr(bandwidth, "_exchange", lambda *_: calls.append("pair"))
    monkeypatch.setattr(
        *(torch.distributed, "all_reduce"), lambda data: (calls.append("all"), all_reduce(data))
    )

    bandwidth.measure(["node0", "node1"], torch.device("cpu"), lambda _: None)

    assert calls[:2] == ["all", "pair"]
