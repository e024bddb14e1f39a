"""Experts that change places in a run: all that is theirs moves, and nothing else changes."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.switch_dit import MODEL_SIZES, ModelSize
from tests.support.alike import assert_trained_alike
from tests.support.launch import run_jobs
from tests.support.ranks import run_ranks
from training.checkpoints.manifest import EMA_FILE, RAW_FILE, latest_checkpoint
from training.config.deepspeed_config import merge_deepspeed
from training.config.preset import load_preset
from training.engine.build import build_engine
from training.engine.deepspeed_internals import base_optimizer
from training.engine.expert_placement import ExpertPlacement, move_experts
from training.engine.gate_table import engine_gate_table
from training.engine.zero_weights import consolidated_weights
from training.monitoring.event_files import read_metrics

pytestmark = pytest.mark.processes

EP_SIZE, NUM_EXPERTS, DEPTH = 2, 8, 3


def configured(optimizer="adamw", **run):
    """A model of one token a sample."""
    config = load_preset(str(Path(__file__).resolve().parents[3] / "tests/small.yaml"))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, patch_size=8, num_experts=NUM_EXPERTS, expert_kind="mlp"
        ),
        optim=dataclasses.replace(
            config.optim,
            optimizer=optimizer,
            ema_stds=(0.05,),
            global_batch_size=8,
            gradient_clipping=0.0,
        ),
        run=dataclasses.replace(config.run, expert_parallel_size=EP_SIZE, **run),
    )


def forward(engine, rank, world_size):
    """Predict other samples, at other timesteps, on every rank."""
    N = 8 // world_size
    x = torch.linspace(-1, 1, 8 * 4 * 16 * 16).view(8, 4, 16, 16)[rank * N : (rank + 1) * N]
    t = torch.arange(8) * 140
    first = rank // EP_SIZE * EP_SIZE * N
    group_t = t[first : first + EP_SIZE * N]
    return engine(x, t[rank * N : (rank + 1) * N], torch.zeros(N, dtype=torch.long), group_t)


def train_step(engine, rank, world_size):
    output = forward(engine, rank, world_size)
    engine.backward((output.prediction.float() - 1).square().mean())
    engine.step()


def whole_state(engine):
    """Weights, averages and moments by the experts' own numbers."""
    keys = [None, *base_optimizer(engine).profiles]
    if base_optimizer(engine).state:
        keys += {key for state in base_optimizer(engine).state.values() for key in state} - {"step"}
    return {key: consolidated_weights(engine, key) for key in keys}


def check_moves(engine, rank, world_size, seed):
    generator = torch.Generator().manual_seed(seed)
    slots = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator) for _ in range(DEPTH)])
    slots[1] = engine.module.gate.slots[1]  # a block whose experts stay
    with torch.no_grad():
        before, predicted = whole_state(engine), forward(engine, rank, world_size).prediction

    move_experts(engine, slots)

    after = whole_state(engine)
    for key, values in before.items():
        for name, value in values.items():
            assert torch.equal(after[key][name], value), (key, name)
    assert torch.equal(engine.module.gate.slots, slots)
    with torch.no_grad():
        torch.testing.assert_close(
            forward(engine, rank, world_size).prediction, predicted, rtol=1e-5, atol=1e-6
        )


def check_engines(rank, world_size, folder, layouts):
    MODEL_SIZES["demo"] = ModelSize(depth=DEPTH, hidden_size=64, num_heads=4)  # quicker
    for stage, precision, optimizer in layouts:
        config = configured(optimizer)
        zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
        path = folder / f"rank{rank}.json"
        path.write_text(json.dumps({"zero_optimization": zero, "bf16": {"enabled": precision}}))
        engine = build_engine(config, merge_deepspeed(path, config, world_size))
        check_moves(engine, rank, world_size, seed=0)
        for _ in range(4):  # adaLN-Zero lets no gradient through to the experts before the third
            train_step(engine, rank, world_size)
        check_moves(engine, rank, world_size, seed=1)
        moments = consolidated_weights(engine, "momentum" if optimizer == "muon" else "exp_avg_sq")
        expert = "blocks.2.mixture.deepspeed_moe.experts.fc2_weight"
        assert rank != 0 or moments[expert].any(), "the premise: experts have moments"
        if precision:
            continue
        # The table is that of the model's own forward.
        with torch.no_grad():
            expected = forward(engine, rank, world_size).gate_table
        torch.testing.assert_close(
            engine_gate_table(engine, config), expected, rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize(
    ("world_size", "layouts"),
    [
        (
            2,
            [
                *((0, False, "adamw"), (1, False, "muon"), (1, False, "adamw")),
                *((2, True, "adamw"), (3, False, "muon"), (3, False, "adamw")),
            ],
        ),
        (4, [(2, False, "muon"), (3, True, "adamw")]),
    ],
)
def test_experts_move_with_all_that_is_theirs(tmp_path, world_size, layouts):
    run_ranks(check_engines, world_size, tmp_path, layouts)


STEPS = 6
COMMON = [
    *("--num-experts", 4, "--global-batch-size", 8, "--warmup-steps", 2, "--max-steps", STEPS),
    *("--log-every", 1, "--save-every", 2, "--sample-every", 0, "--patch-size", 4),
    *("--expert-kind", "mlp", "--expert-hidden-ratio", 0.5),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, demo_latents):
    """Train with every placement; returns a function from a run's name to its directory."""
    folder = tmp_path_factory.mktemp("runs")

    def job(name, stage, *flags):
        path = folder / f"zero{stage}.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        run = ["--deepspeed", path, "--run-dir", folder / name, "--data", demo_latents]
        return [*run, *COMMON, *flags]

    ep2 = ("--expert-parallel-size", 2)
    balanced = (*ep2, "--placement", "balanced")
    again = (*balanced, "--rebalance-every", 4)
    affine = (*again, "--timestep-dealing", "affine", "--micro-batch-size", 2)
    run_jobs(1, [job("reference", 2)], folder)
    run_jobs(
        2,
        [
            job("rebalanced", 1, *again),
            job("rebalanced-resumed", 1, *again, "--max-steps", 4),
            job("rebalanced-resumed", 1, *again),
            job("changed", 2, *ep2, "--max-steps", 2),
            job("changed", 2, *balanced, "--max-steps", 4),
            job("changed", 2, *ep2, "--placement", "strided"),
            job("affine", 2, *affine),
            job("affine-resumed", 2, *affine, "--max-steps", 2),
            job("affine-resumed", 2, *affine),
            job("rebalanced-z3", 3, *again),
        ],
        folder,
    )
    return lambda name: folder / name


def comparable(run_dir):
    """Everything that a layout or a placement must not change."""
    machine = ("speed/", "memory/", "traffic/", "moe_rank")
    return [
        {key: value for key, value in record.items() if not key.startswith(machine)}
        for record in read_metrics(run_dir)
    ]


PLACED = ["rebalanced", "rebalanced-resumed", "changed", "rebalanced-z3"]


@pytest.mark.parametrize("name", PLACED)
def test_no_placement_changes_what_is_computed(runs, name):
    expected, got = comparable(runs("reference")), comparable(runs(name))

    assert len(got) == STEPS
    for wanted, record in zip(expected, got, strict=True):
        for key, value in wanted.items():
            assert record[key] == pytest.approx(value, rel=1e-5, abs=1e-7), key
    for file in (RAW_FILE, EMA_FILE):
        expected = load_file(latest_checkpoint(runs("reference")) / file)
        got = load_file(latest_checkpoint(runs(name)) / file)
        assert_trained_alike(got, expected, file)


def saved_placement(run_dir):
    path = latest_checkpoint(run_dir) / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=False)["placement"]
    return state["placement"], torch.tensor(state["slots"])


def test_checkpoints_say_where_experts_sit(runs):
    kind, slots = saved_placement(runs("changed"))
    assert kind == "strided" and slots.tolist() == [[0, 2, 1, 3]] * 6
    kind, slots = saved_placement(runs("rebalanced"))
    assert kind == "balanced" and slots.sort().values.tolist() == [[0, 1, 2, 3]] * 6


@pytest.mark.parametrize("name", ["rebalanced", "affine"])
def test_a_resumed_run_is_bit_identical(runs, name):
    assert comparable(runs(f"{name}-resumed")) == comparable(runs(name))
    for file in (RAW_FILE, EMA_FILE):
        wanted = load_file(latest_checkpoint(runs(name)) / file)
        got = load_file(latest_checkpoint(runs(f"{name}-resumed")) / file)
        assert all(torch.equal(got[key], value) for key, value in wanted.items())


def test_dealing_keeps_the_timesteps_of_a_step_and_gives_them_to_other_samples(runs):
    position, affine = comparable(runs("reference")), comparable(runs("affine"))

    num_changed = 0
    for wanted, record in zip(position, affine, strict=True):
        ranges = [{k for k in each if k.startswith("mse_by_t")} for each in (wanted, record)]
        assert ranges[0] == ranges[1]
        # A new network's error is the noise's square, and the noise stays with its sample.
        num_changed += sum(record[k] != pytest.approx(wanted[k], rel=1e-4) for k in ranges[0])
    assert num_changed >= STEPS
    for key in (key for key in position[0] if key.startswith("moe_load/")):
        assert affine[0][key] == pytest.approx(position[0][key])


def test_nothing_is_placed_without_expert_parallelism():
    config = load_preset(str(Path(__file__).resolve().parents[3] / "tests/small.yaml"))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, placement="balanced"))
    placement = ExpertPlacement(config, engine=None, objective=None)

    placement.load_state(placement.state())
    placement.establish()

    assert placement.state() == {}
