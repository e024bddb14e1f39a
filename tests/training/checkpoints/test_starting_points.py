"""Runs that start from other runs, and runs on unusual data: the real trainer on two ranks."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from data_tools.errors import ConfigError
from tests.support.launch import run_jobs
from tests.support.synthetic import make_dataset, random_moments
from training.checkpoints.manifest import EMA_FILE, RAW_FILE, latest_checkpoint
from training.config.command_line import parse_command_line
from training.engine.build import build_model
from training.main import dry_run
from training.monitoring.event_files import read_metrics
from training.ranks.process_group import Ranks
from training.run.directory import INIT_FILE, load_config
from training.run.init_from import check_warm_start

pytestmark = pytest.mark.processes

# name: (2C, H, W) of the stored moments, number of classes
DATA = {
    "plain": ((8, 4, 4), 3),
    "unconditional": ((32, 4, 6), 0),
    "one-class": ((8, 6, 4), 1),
    "many-classes": ((64, 4, 4), 10_000),
}
UNUSUAL = [name for name in DATA if name != "plain"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data sets, runs and what the runs have printed."""
    folder = tmp_path_factory.mktemp("starting")
    for name, (shape, num_classes) in DATA.items():
        moments = random_moments(shape)
        make_dataset(folder / "data" / name, [16], True, num_classes, shape, moments)
    for stage in (1, 2, 3):
        values = {"zero_optimization": {"stage": stage}}
        (folder / f"zero{stage}.json").write_text(json.dumps(values))
        values["bf16"] = {"enabled": True}
        (folder / f"bf16-zero{stage}.json").write_text(json.dumps(values))

    def job(name, source, *flags, data="plain", file="zero2", steps=1):
        (channels, height, width), num_classes = DATA[data]
        return [
            *("--preset", "tests/small.yaml", "--deepspeed", folder / f"{file}.json"),
            *("--data", folder / "data" / data, "--run-dir", folder / name),
            *("--latent-channels", channels // 2, "--latent-size", height, "--latent-width", width),
            *("--num-classes", num_classes, "--num-experts", 4, "--global-batch-size", 8),
            *("--warmup-steps", 0, "--max-steps", steps, "--log-every", 1, "--save-every", 2),
            *("--sample-every", 0, "--ema-decays", 0.5, "--no-ema-warmup"),
            *(() if source is None else ("--init-from", source)),
            *flags,
        ]

    dense, ep2 = ("--routing", "dense"), ("--expert-parallel-size", 2)
    still = ("--lr", 1e-30)  # no step moves a weight
    sparse = folder / "sparse"
    output = run_jobs(
        2,
        [
            job("dense", None, *dense, steps=4),
            job("dense-again", folder / "dense", *dense),
            job("sparse", folder / "dense", steps=4),
            job("sparse-from-dense-ep2", folder / "dense", *ep2),
            job("sparse-again", sparse),
            job("sparse-ep2", sparse, *ep2),
            job("sparse-ep2", None, *ep2, steps=2),
            job("sparse-bf16-z1", sparse, *still, file="bf16-zero1"),
            job("sparse-bf16-z2-ep2", sparse, *still, *ep2, file="bf16-zero2"),
            *(job(f"data-{name}", None, data=name, steps=2) for name in UNUSUAL),
            job("sparse-z3", sparse, file="zero3"),
            job("sparse-bf16-z3", sparse, *still, file="bf16-zero3"),
            job("sparse-bf16-z3-ep2", sparse, *still, *ep2, file="bf16-zero3"),
        ],
        folder,
    )
    (folder / "output.txt").write_text(output)
    return folder


def first_losses(run_dir):
    return [read_metrics(run_dir)[0][key] for key in ("loss/mse", "loss/vlb")]


def test_upcycling_a_trained_dit_is_exact_at_step_0(folder):
    """The same batch through the dense model and through those with new experts."""
    expected = first_losses(folder / "dense-again")

    assert expected != first_losses(folder / "dense")
    for name in ("sparse", "sparse-from-dense-ep2"):
        assert first_losses(folder / name) == pytest.approx(expected, rel=1e-6), name


def test_every_layout_starts_from_the_same_experts(folder):
    expected = first_losses(folder / "sparse-again")

    assert expected != first_losses(folder / "sparse")
    for name in ("sparse-ep2", "sparse-z3"):
        assert first_losses(folder / name) == pytest.approx(expected, rel=1e-5), name


def test_an_older_checkpoint_can_be_chosen(folder):
    config = load_config(folder / "sparse-again")

    def start_from(tag):
        source = f"{folder / 'sparse'}:{tag}"
        return check_warm_start(replace(config, run=replace(config.run, init_from=source)))

    checkpoints = folder / "sparse" / "checkpoints"
    assert start_from("step-0000002").file == str(checkpoints / "step-0000002" / EMA_FILE)
    with pytest.raises(ConfigError, match=r"sparse:step-0000003: no 'step-0000003'; did you mean"):
        start_from("step-0000003")


def test_a_dry_run_tells_what_would_be_loaded(folder):
    flags = ["--preset", "tests/small.yaml", "--data", folder / "data" / "plain"]
    flags += ["--latent-size", 4, "--num-classes", 3, "--init-from", folder / "dense"]
    flags += ["--run-dir", folder / "none", "--dry-run"]

    text = dry_run(parse_command_line([str(flag) for flag in flags]), Ranks(0, 1, 0))

    assert f"\n# initial weights\n--init-from {folder / 'dense'}: DiT or DTR (this" in text
    assert not (folder / "none").exists()


def test_a_warm_start_counts_from_zero_and_averages_from_the_loaded_weights(folder):
    before = load_file(latest_checkpoint(folder / "sparse") / EMA_FILE)
    started = latest_checkpoint(folder / "sparse-again")
    raw, ema = load_file(started / RAW_FILE), load_file(started / EMA_FILE)

    assert started.name == "step-0000001"
    moved = 0
    for name, value in before.items():
        torch.testing.assert_close(ema[name], 0.5 * value + 0.5 * raw[name])
        moved += not torch.equal(raw[name], value)
    assert moved > len(before) / 2


@pytest.mark.parametrize("name", ["bf16-z1", "bf16-z2-ep2", "bf16-z3", "bf16-z3-ep2"])
def test_bf16_training_starts_from_the_fp32_values(folder, name):
    source = load_file(latest_checkpoint(folder / "sparse") / EMA_FILE)

    for file in (RAW_FILE, EMA_FILE):
        for key, value in load_file(latest_checkpoint(folder / f"sparse-{name}") / file).items():
            assert torch.equal(value, source[key]), key
    assert any(not torch.equal(value, value.bfloat16().float()) for value in source.values())


def test_the_report_is_printed_and_written(folder):
    source = latest_checkpoint(folder / "dense") / EMA_FILE
    record = json.loads((folder / "sparse" / INIT_FILE).read_text())
    output = (folder / "output.txt").read_text()

    assert record["file"] == str(source)
    assert record["kind"] == "DiT or DTR (this program)"
    assert record["matched_tensors"] == len(load_file(source))
    assert len(record["freshly_initialised"]) == 2 + 2 * 6
    assert "routing (dense -> switch)" in record["differing_options"]
    assert f"--init-from {folder / 'dense'}: DiT or DTR (this program)\n" in output
    assert not (folder / "dense" / INIT_FILE).exists()


def test_a_run_goes_on_without_the_source_that_it_began_with(folder):
    output, run_dir = (folder / "output.txt").read_text(), folder / "sparse-ep2"

    assert [record["step"] for record in read_metrics(run_dir)] == [1, 2]
    assert output.count(f"continuing {run_dir}; --init-from was applied when it started\n") == 1
    assert output.count(f"--init-from {folder / 'sparse'}: ") == 7
    assert load_config(run_dir).run.init_from == str(folder / "sparse")


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_data_trains_and_its_model_predicts(folder, name):
    run_dir = folder / f"data-{name}"
    (channels, height, width), num_classes = DATA[name]
    losses = [record["loss/total"] for record in read_metrics(run_dir)]
    model = build_model(load_config(run_dir))
    model.load_state_dict(load_file(latest_checkpoint(run_dir) / EMA_FILE))

    x = torch.zeros(2, channels // 2, height, width)
    labels = torch.tensor([0, num_classes])
    with torch.no_grad():
        prediction = model(x, torch.tensor([5, 5]), labels).prediction

    assert losses[1] < losses[0]
    assert prediction.shape == (2, channels, height, width)
    assert prediction.isfinite().all()
