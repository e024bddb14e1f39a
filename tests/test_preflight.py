"""What a look at the nodes says, from what the nodes said; test_cluster_slurm.py has real nodes."""

import dataclasses

import pytest

from data_tools.errors import ConfigError
from tests.launch import run
from training.bandwidth import Bandwidth
from training.node_facts import NodeFacts, collect, compare
from training.preflight import floor_gbps, judge
from training.processes import Ranks


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


def test_facts_travel_as_text():
    assert NodeFacts.from_json(facts(3).to_json()) == facts(3)


def test_a_check_that_fails_is_a_fact(monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def check():
        raise ConfigError("--data x: does not exist.")

    found = collect(Ranks(1, 2, 0), check)

    assert (found.node, found.problem) == ("node7", "--data x: does not exist.")
    assert found.packages["deepspeed"] == "0.19.8"


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


def test_one_process_is_looked_at_too(demo_latents, tmp_path):
    flags = ["--data", demo_latents, "--run-dir", tmp_path / "run", "--num-classes", 10]

    output = run("python", "training/preflight.py", *flags)

    assert "nodes: 1 rank(s) on 1 node(s) (" in output
    assert not (tmp_path / "run").exists()
