"""A run continued on other ranks, expert-parallel sizes, ZeRO stages equals one never stopped."""

import json

import pytest
from safetensors.torch import load_file

from tests.support.alike import assert_trained_alike
from training.checkpoints.manifest import latest_checkpoint, read_manifest
from training.monitoring.event_files import read_metrics

pytestmark = pytest.mark.processes

LEGS = (3, 8, 13, 18)  # the steps at which runs change their layout
RANKS = (2, 1, 4, 2)
COMMON = [
    *("--num-experts", 4, "--global-batch-size", 8, "--warmup-steps", 2, "--patch-size", 8),
    *("--log-every", 1, "--save-every", 100, "--sample-every", 0, "--ema-stds", "0.05,0.1"),
    *("--expert-kind", "mlp", "--expert-hidden-ratio", 0.5, "--loss-weight", "uncertainty"),
    *("--prior-matching-every", 4),
]
# Name: ZeRO stage, expert-parallel size and placement of every leg.
RUNS = {
    "a": [(1, 2, "strided"), (2, 1, "strided"), (3, 4, "strided"), (2, 1, "strided")],
    "b": [(0, 2, "contiguous"), (3, 1, "strided"), (2, 2, "strided"), (0, 2, "balanced")],
    "c": [(3, 2, "balanced"), (2, 1, "balanced"), (1, 4, "balanced"), (3, 2, "strided")],
}
WHOLE = "whole"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, demo_latents, train_forked):
    """Train every run leg by leg, and one in one piece."""
    folder = tmp_path_factory.mktemp("runs")

    def job(name, stage, ep_size, placement, max_steps):
        file = folder / f"zero{stage}.json"
        zero = {"stage": stage}
        if stage == 3:  # several flat tensors, and most parameters in parts
            zero |= {"stage3_param_persistence_threshold": 100, "sub_group_size": 200_000}
        file.write_text(json.dumps({"zero_optimization": zero}))
        return [
            *("--deepspeed", file, "--run-dir", folder / name, "--data", demo_latents, *COMMON),
            *("--gradient-clipping", 0, "--expert-parallel-size", ep_size),
            *("--placement", placement, "--max-steps", max_steps),
        ]

    for leg, (num_ranks, max_steps) in enumerate(zip(RANKS, LEGS, strict=True)):
        named = [(name, (*legs[leg], max_steps)) for name, legs in RUNS.items()]
        if num_ranks == 1:
            named.append((WHOLE, (2, 1, "contiguous", LEGS[-1])))
        for name, values in named:
            train_forked(*job(name, *values), num_ranks=num_ranks)
    return lambda name: folder / name


@pytest.mark.parametrize("name", RUNS)
def test_losses_equal_those_of_a_run_that_never_changed(runs, name):
    expected, got = read_metrics(runs(WHOLE)), read_metrics(runs(name))

    assert [record["step"] for record in got] == list(range(1, LEGS[-1] + 1))
    for wanted, record in zip(expected, got, strict=True):
        for key in ("loss/total", "loss/mse", "loss/vlb", "loss/prior", "optim/skipped_steps"):
            assert record[key] == pytest.approx(wanted[key], rel=1e-5, abs=1e-7), key


@pytest.mark.parametrize("name", RUNS)
def test_weights_and_averages_equal_those_of_a_run_that_never_changed(runs, name):
    ours, theirs = (latest_checkpoint(runs(n)) for n in (name, WHOLE))
    files = sorted(path.name for path in theirs.glob("*.safetensors"))
    assert len(files) == 4

    stage, ep_size, _ = RUNS[name][-1]
    layout = read_manifest(ours).layout
    assert (layout.world_size, layout.expert_parallel_size, layout.zero_stage) == (
        *(RANKS[-1], ep_size),
        stage,
    )
    for file in files:
        assert_trained_alike(load_file(ours / file), load_file(theirs / file), file)
