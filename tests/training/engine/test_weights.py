"""The weights of a running engine: before there is an average, in snapshots, and in files."""

import dataclasses
import json
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from data_tools.errors import ConfigError
from data_tools.stream.order import ORDER_VERSION
from tests.support.ranks import run_ranks
from training.checkpoints.average_snapshots import save_snapshots
from training.checkpoints.checkpointer import Checkpointer
from training.checkpoints.manifest import (
    CHECKPOINT_DIR,
    EMA_FILE,
    LATEST_FILE,
    MANIFEST_FILE,
    RAW_FILE,
    CheckpointManifest,
    Layout,
    TrainState,
    read_manifest,
    record_of,
    tag_of,
)
from training.checkpoints.weight_files import NonFiniteWeightsError, check_weights, write_weights
from training.config.deepspeed_config import merge_deepspeed
from training.config.preset import load_preset
from training.engine.build import build_engine, build_model
from training.engine.deepspeed_internals import base_optimizer
from training.engine.expert_placement import ExpertPlacement
from training.engine.zero_weights import consolidated_weights, ema_weights
from training.run.weights import find_weights

STDS = (0.05, 0.1)
MOVED = "final_layer.linear.weight"  # by the first steps: adaLN-Zero passes no gradient on


def small(**run):
    """A model of one token a sample."""
    config = load_preset(str(Path(__file__).resolve().parents[3] / "tests/small.yaml"))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, patch_size=8, num_experts=4),
        optim=dataclasses.replace(
            config.optim, ema_stds=STDS, global_batch_size=2, gradient_clipping=0.0
        ),
        run=dataclasses.replace(config.run, **run),
    )


def raw_and_averages(engine):
    return [consolidated_weights(engine, key) for key in (None, *base_optimizer(engine).profiles)]


def inputs_of(rank):
    return torch.full((1, 4, 16, 16), 1.0 + rank), torch.tensor([rank]), torch.tensor([0])


def train_step(engine, rank, world_size):
    output = engine(*inputs_of(rank), torch.arange(world_size))
    engine.backward((output.prediction - 1).square().mean())
    engine.step()


def checkpointer(engine, config, layout):
    stateless = {"state": dict, "load_state": lambda _: None, "use_slots": lambda _: None}
    objective = SimpleNamespace(**stateless)
    placement = ExpertPlacement(config, engine, objective)
    staging = Path(config.run.run_dir) / CHECKPOINT_DIR / ".staging-x"
    staging.mkdir(parents=True, exist_ok=True)
    return Checkpointer(engine, config.run, layout, "0" * 64, objective, placement, staging)


def check_without_updates(engine, build, config, layout):
    """As when the first steps are skipped; returns the engine that has loaded the checkpoint."""
    run_dir = Path(config.run.run_dir)
    raw, *averages = raw_and_averages(engine)
    for average in averages:
        assert all(torch.equal(average[key], value) for key, value in raw.items())
    with ema_weights(engine):
        assert base_optimizer(engine).num_updates == 0
    assert save_snapshots(engine, run_dir, 0) is None
    assert not (run_dir / "ema_snapshots").exists()

    saver = checkpointer(engine, config, layout)
    saver.begin(TrainState())
    assert saver.finish().problem is None
    engine, folder = build(), run_dir / CHECKPOINT_DIR / tag_of(0)
    checkpointer(engine, config, layout).load(folder, read_manifest(folder))
    return engine


@torch.no_grad()
def check_computing_with_averages(engine, config, rank, world_size):
    before = raw_and_averages(engine)
    with ema_weights(engine):
        predicted = engine(*inputs_of(rank), torch.arange(world_size)).prediction
    after = raw_and_averages(engine)
    again = engine(*inputs_of(rank), torch.arange(world_size)).prediction
    for kept, now in zip(before, after, strict=True):
        assert all(torch.equal(now[key], value) for key, value in kept.items())
    if rank == 0:
        for weights, prediction in zip(before[:2], (again, predicted), strict=True):
            model = build_model(config)
            model.load_state_dict(weights)
            wanted = model(*inputs_of(rank)).prediction
            torch.testing.assert_close(prediction, wanted)
            assert not torch.allclose(wanted, again if prediction is predicted else predicted)


def check_snapshots(engine, run_dir, rank):
    assert save_snapshots(engine, run_dir, 3) is None
    raw, _, *averages = raw_and_averages(engine)
    for std, average in zip(STDS, averages, strict=True):
        file = run_dir / "ema_snapshots" / f"std{std:.3f}-step-0000003.safetensors"
        stored = load_file(file)
        assert all(torch.equal(stored[key], value) for key, value in average.items())
        assert rank != 0 or not torch.equal(stored[MOVED], raw[MOVED])
        with safe_open(file, framework="pt") as opened:
            about = opened.metadata()
        assert (about["step"], about["num_updates"], about["std"]) == ("3", "2", str(std))

    # All ranks hear of a disk that rank 0 alone has written to.
    torch.distributed.barrier()
    problem = save_snapshots(engine, run_dir / CHECKPOINT_DIR / LATEST_FILE, 4)
    assert "Not a directory" in problem


def check_engine(rank, world_size, folder):
    for stage, expert_parallel_size in ((0, 2), (2, 2), (3, 2)):
        run_dir = folder / f"z{stage}"
        config = small(expert_parallel_size=expert_parallel_size, run_dir=str(run_dir))
        path = folder / f"rank{rank}-z{stage}.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        build = partial(build_engine, config, merge_deepspeed(path, config, world_size))
        layout = Layout(world_size, expert_parallel_size, stage, "fp32")
        engine = check_without_updates(build(), build, config, layout)

        train_step(engine, rank, world_size)
        # The first step's weights are the whole of a power-function average.
        raw, _, *averages = raw_and_averages(engine)
        for average in averages:
            assert all(torch.equal(average[key], value) for key, value in raw.items())
        train_step(engine, rank, world_size)
        check_computing_with_averages(engine, config, rank, world_size)
        check_snapshots(engine, run_dir, rank)


@pytest.mark.processes
def test_averages_begin_as_the_weights_and_are_stored_whole_on_every_zero_stage(tmp_path):
    run_ranks(check_engine, 2, tmp_path)


@pytest.fixture(scope="module")
def run_with_checkpoint(tmp_path_factory):
    """A run directory with a checkpoint of all its averages, and its configuration."""
    run_dir, config = tmp_path_factory.mktemp("run"), small()
    folder = run_dir / CHECKPOINT_DIR / tag_of(7)
    folder.mkdir(parents=True)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in build_model(config).named_parameters()}
    weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for name in (EMA_FILE, "ema-std0.050.safetensors", "ema-std0.100.safetensors", RAW_FILE):
        write_weights(folder / name, weights)
    files = {path.name: record_of(path) for path in folder.iterdir()}
    layout = Layout(1, 1, 2, "fp32")
    manifest = CheckpointManifest(folder.name, TrainState(7), layout, "", ORDER_VERSION, files)
    (folder / MANIFEST_FILE).write_text(json.dumps(dataclasses.asdict(manifest)))
    (folder.parent / LATEST_FILE).write_text(folder.name)
    return run_dir, config


@pytest.mark.parametrize(
    ("choice", "file"),
    [
        ({}, EMA_FILE),
        ({"ema": "0.999"}, EMA_FILE),
        ({"ema": "std0.100"}, "ema-std0.100.safetensors"),
        ({"is_raw": True, "checkpoint": "step-0000007"}, RAW_FILE),
    ],
)
def test_weights_are_found_by_what_they_hold(run_with_checkpoint, choice, file):
    run_dir, config = run_with_checkpoint

    assert find_weights(run_dir, config, **choice) == run_dir / "checkpoints/step-0000007" / file


def test_any_file_of_the_runs_model_can_be_given(run_with_checkpoint):
    run_dir, config = run_with_checkpoint
    path = run_dir / "checkpoints/step-0000007/ema-std0.050.safetensors"

    assert find_weights(run_dir, config, file=path) == path


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ({"ema": "std0.1"}, "--ema: the run has no average 'std0.1'; did you mean 'std0.100'?"),
        ({"ema": "x"}, "--ema: the run has no average 'x'; choose one of: 0.999, std0.050, std"),
        ({"ema": "0.999", "is_raw": True}, "--ema and --raw both choose the weights; give one"),
        ({"checkpoint": "step-3"}, "--checkpoint: no 'step-3'; "),
        ({"file": "none"}, "--weights none: there is no such file; give a .safetensors file."),
        ({"file": __file__}, "is damaged or no safetensors file ("),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(run_with_checkpoint, choice, sentence):
    run_dir, config = run_with_checkpoint
    choice = {key: Path(value) if key == "file" else value for key, value in choice.items()}

    with pytest.raises(ConfigError) as error:
        find_weights(run_dir, config, **choice)

    assert sentence in str(error.value)


def test_weights_of_another_model_are_refused(run_with_checkpoint):
    run_dir, config = run_with_checkpoint
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, patch_size=4))

    with pytest.raises(ConfigError, match="is of another model: x_embedder.proj.weight has shape"):
        check_weights(run_dir / "checkpoints/step-0000007" / EMA_FILE, other)


def test_weights_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_weights(path, {"a": torch.zeros(2)})

    with pytest.raises(NonFiniteWeightsError, match="^a holds values that are not finite$"):
        write_weights(path, {"a": torch.tensor([1.0, torch.nan])})
    with monkeypatch.context() as patched, pytest.raises(OSError, match="full"):
        patched.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
        write_weights(path, {"a": torch.ones(2)})

    assert [item.name for item in tmp_path.iterdir()] == ["a.safetensors"]
    assert not load_file(path)["a"].any()
