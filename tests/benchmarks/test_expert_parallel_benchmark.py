"""The benchmarks of expert parallelism: what they print, compare and refuse."""

import pytest
import torch

from benchmarks import expert_parallel, metrics_cost
from benchmarks.layer_comparison import Measured, check_agreement, compare
from benchmarks.layer_problem import Side, Sizes, make_problem
from tests.support.ranks import run_ranks


def compare_small_layers(rank, world_size):
    for kind, top_k in (("affine", 1), ("affine", 2), ("mlp", 3)):
        sizes = Sizes(16, 4, 16, 3, 8, top_k, kind, 2.0)  # 16 samples, 3 layers, 8 experts
        results = compare(rank, world_size, sizes, 1, "cpu")  # outputs and gradients too
        for routing, (stock, ours) in results.items():
            assert ours.num_exchanges == stock.num_exchanges == 4 * 3, "forward and backward"
            per_layer = 3 if top_k == 1 else 1  # DeepSpeed's top-1 gate looks at its capacity too
            assert (ours.num_waits, stock.num_waits) == (1, 3 * per_layer), (kind, top_k)
            assert stock.sent_bytes > (2.0 if routing == "prior" else 1.0) * ours.sent_bytes


@pytest.mark.processes
def test_both_sides_agree_and_ours_waits_once_and_sends_less():
    run_ranks(compare_small_layers, 2)


def test_the_table_shows_ratios(capsys):
    sides = [
        Measured("DeepSpeed", 0.03, 6 * 2**20, 8, 2, 20 * 2**20),
        Measured("ours", 0.02, 2**20, 8, 1, 10 * 2**20),
    ]

    expert_parallel.print_comparison({"prior": sides})

    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["prior", "DeepSpeed", "30.0", "6.00", "8", "2", "20.0"]
    assert lines[3].split() == ["prior", "ratio", "1.50", "6.00", "2.00"]


def test_sides_that_differ_are_not_timed(single_process_group):
    sizes = Sizes(2, 3, 4, 1, 2, 1, "affine", 1.0)
    problem = make_problem(sizes, "even", 0, 1, torch.device("cpu"))

    def side(factor):
        def forward(x):
            return factor * x + problem.gate_logits.mean()

        return Side("", forward, list, lambda: None)

    check_agreement([side(1.0), side(1.0)], problem)
    with pytest.raises(AssertionError, match="the sides differ by .*e-0[34] of the largest"):
        check_agreement([side(1.0), side(1.001)], problem)


def test_the_cost_of_metrics_is_printed(capsys, monkeypatch):
    monkeypatch.setattr(metrics_cost, "WATCH_SEC", 0.1)
    metrics_cost.main(["--batch", "1", "--steps", "1"])

    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "demo, 8 experts, 1 samples, fp32"
    for part in ("sums of a micro", "end of an interval", "pictures of", "picture of", "profiling"):
        [line] = [line for line in lines if line.startswith(part)]
        assert line.endswith("%")
    [share] = [line for line in lines if line.startswith("share of the step")]
    assert share.endswith("%")
    assert lines[-1].startswith("the watchdog's thread") and lines[-1].endswith("% of a core")


def test_the_cost_of_metrics_is_related_to_a_step_that_is_given(capsys, monkeypatch):
    monkeypatch.setattr(metrics_cost, "WATCH_SEC", 0.1)
    metrics_cost.main(["--batch", "1", "--step-sec", "1000000"])

    lines = capsys.readouterr().out.splitlines()
    assert "step                       1000000000.00 ms, given" in lines
    assert "share of the step              0.00%" in lines
    assert not any(line.startswith("profiling") for line in lines), "there is no step to profile"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experts", "6"], "--experts 6 do not divide over --ranks 4."),
        (["--ranks", "1"], "--ranks 1: there is nothing to share; use 2 or more."),
        (["--top-k", "9"], "--top-k 9 is more than --experts 8."),
        (["--batch", "0"], "--batch must be at least 1, not 0."),
        (["--device", "tpu"], "--device must be cpu or cuda, not tpu."),
        (["--layouts", "--device", "cuda"], "--layouts measures resident memory; use --device cpu"),
    ],
)
def test_mistakes_are_refused_before_processes_start(arguments, message, capsys):
    with pytest.raises(SystemExit):
        expert_parallel.main(arguments)

    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experts", "3"], "--experts must be an even number, not 3."),
        (["--step-sec", "0"], "--step-sec must be positive, not 0.0."),
    ],
)
def test_the_cost_of_metrics_refuses_mistakes(arguments, message, capsys):
    with pytest.raises(SystemExit):
        metrics_cost.main(arguments)

    assert message in capsys.readouterr().err
