"""Losses that are not finite or jump: what is left out, what is reported, what ends the run."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_tools.shards.manifest import DatasetManifest
from data_tools.shards.records import RecordLayout
from data_tools.stream.order import StreamOrder
from models.diffusion import LossTerms
from tests.support.alike import assert_trained_alike
from tests.support.configs import FP32, stated
from tests.support.launch import run
from tests.support.synthetic import seal
from training.checkpoints.manifest import EMA_FILE, RAW_FILE, latest_checkpoint
from training.engine.non_finite import (
    MicroStepRecord,
    describe_non_finite,
    poison_non_finite,
)
from training.engine.objective import SampleLosses
from training.monitoring.event_files import read_metrics

NAN_FLOAT16 = b"\x00\x7e"
STEPS = 5
BATCH = 8
COMMON = [
    *("--num-experts", 4, "--global-batch-size", BATCH, "--warmup-steps", 2, "--max-steps", STEPS),
    *("--log-every", 1, "--save-every", 100, "--sample-every", 0, "--seed", 0),
]


def with_nan_at(latents, folder, positions):
    """A copy of a data set in which the samples at these stream positions hold NaN."""
    shutil.copytree(latents, folder)
    manifest = DatasetManifest.load(folder)
    sizes = [shard.num_samples for shard in manifest.shards]
    layout = RecordLayout((8, 16, 16), has_flip=True)
    for position in positions:
        sample = int(StreamOrder(sizes, seed=0, window=16).sample_ids(position, position + 1)[0])
        shard = next(i for i in range(len(sizes)) if sample < sum(sizes[: i + 1]))
        start = (sample - sum(sizes[:shard])) * layout.stride
        with open(folder / manifest.shards[shard].name, "r+b") as file:
            for offset in (layout.moments_offset, layout.flip_offset):
                file.seek(start + offset + 512 + len(layout.npy_header))  # after the tar header
                file.write(NAN_FLOAT16)
    seal(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, demo_latents, train_forked):
    """Five steps on every ZeRO stage; one sample of the third step, on the last rank, is NaN."""
    folder = tmp_path_factory.mktemp("stability")
    data = with_nan_at(demo_latents, folder / "data", [2 * BATCH + 7])

    def job(name, stage, *flags):
        file = stage if isinstance(stage, Path) else stated(folder, f"zero{stage}", False)
        common = ["--deepspeed", file, "--run-dir", folder / name]
        clipping = ["--gradient-clipping", 0]
        return [*common, "--data", data, *COMMON, *clipping, *flags]

    def bf16(name, *flags):
        # Four tokens a sample, because a CPU without bf16 instructions is very slow at it.
        return job(f"bf16-{name}", stated(folder, name, True), "--patch-size", 8, *flags)

    for alone in (job("reference", 2), bf16("zero2_offload")):
        train_forked(*alone, num_ranks=1)
    jobs = [
        job("z0", 0),
        job("z0-ep2", 0, "--expert-parallel-size", 2),
        job("z1", 1),
        job("z2-ep2", 2, "--expert-parallel-size", 2, "--micro-batch-size", 2),
        bf16("zero1"),
        bf16("zero2", "--micro-batch-size", 2),
        job("z3-ep2", 3, "--expert-parallel-size", 2),
        bf16("zero3"),
    ]
    return folder, "".join(train_forked(*each, num_ranks=2) for each in jobs)


@pytest.mark.processes
@pytest.mark.precision
def test_the_step_is_reported_with_rank_and_timesteps(runs):
    _, output = runs
    lines = [line for line in output.splitlines() if "step 3 left out" in line]

    assert len(lines) == 8
    for line in lines:
        assert "rank 1: total is nan, mse is nan" in line and "at timesteps" in line
        assert "rank 0" not in line


@pytest.mark.processes
@pytest.mark.precision
def test_zero_1_in_bf16_prints_nothing_of_its_memory(runs):
    _, output = runs

    assert "Max_MA" not in output


@pytest.mark.processes
@pytest.mark.precision
@pytest.mark.parametrize("name", ["z0", "z0-ep2", "z1", "z2-ep2", "z3-ep2"])
def test_every_layout_leaves_the_same_step_out_on_all_ranks(runs, name):
    folder, _ = runs
    expected, got = read_metrics(folder / "reference"), read_metrics(folder / name)

    assert [record["optim/skipped_steps"] for record in got] == [0, 0, 1, 1, 1]
    for wanted, record in zip(expected, got, strict=True):
        if record["step"] != 3:  # of which only the ranks with finite losses are counted
            assert record["loss/total"] == pytest.approx(wanted["loss/total"], rel=1e-5)
    for file in (EMA_FILE, RAW_FILE):
        expected = load_file(latest_checkpoint(folder / "reference") / file)
        got = load_file(latest_checkpoint(folder / name) / file)
        assert_trained_alike(got, expected, file)


@pytest.mark.processes
@pytest.mark.precision
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero2_offload", "zero3"])
def test_bf16_leaves_the_step_out_and_trains_on(runs, name):
    folder, _ = runs
    records = read_metrics(folder / f"bf16-{name}")

    assert [record["optim/skipped_steps"] for record in records] == [0, 0, 1, 1, 1]
    assert all(math.isfinite(record["loss/total"]) for record in records[3:])


@pytest.mark.processes
@pytest.mark.precision
def test_too_many_steps_in_a_row_end_the_run_in_one_sentence(demo_latents, tmp_path):
    data = with_nan_at(demo_latents, tmp_path / "data", [BATCH * step for step in range(STEPS)])

    output = run(
        *("python", "training/main.py", "--data", data, "--run-dir", tmp_path / "run", *COMMON),
        *("--deepspeed", FP32, "--max-skipped-steps", 1),
        expect=2,
    )

    assert "error: step 2 left out: rank 0: total is nan, mse is nan" in output
    assert "2 step(s) in a row were left out and --max-skipped-steps is 1." in output
    assert "Traceback" not in output and not (tmp_path / "run/checkpoints/latest").exists()


def record(total, mse, t, vlb=0.0):
    terms = LossTerms(*(torch.tensor(total if n == 0 else 1.0) for n in range(4)))
    mse = torch.tensor(mse)
    samples = SampleLosses(mse, torch.full_like(mse, vlb))
    return MicroStepRecord(terms, samples, torch.tensor(t))


def test_a_cause_names_the_timesteps_that_were_not_finite(single_process_group):
    records = [record(1.0, [1.0], [7]), record(math.inf, [1.0, math.inf, math.nan], [3, 4, 5])]

    assert describe_non_finite(records) == "rank 0: total is inf at timesteps 4, 5"
    assert describe_non_finite(records[:1]) == (
        "a gradient is not finite although every loss is; rank 0 at timesteps 7"
    )
    only_vlb = describe_non_finite([record(math.inf, [1.0], [9], vlb=math.inf)])
    assert only_vlb == "rank 0: total is inf at timesteps 9"
    many = describe_non_finite([record(math.nan, [math.nan] * 11, list(range(11)))])
    assert many.endswith("at timesteps 0, 1, 2, 3, 4, 5, 6, 7 and 3 more")


def test_an_infinite_loss_has_gradients_that_are_not_finite():
    x = torch.tensor([1.0, 2.0], requires_grad=True)

    poison_non_finite(x.sum() + math.inf).backward()
    assert x.grad.isnan().all()
    x.grad = None
    poison_non_finite(x.sum()).backward()
    assert torch.equal(x.grad, torch.ones(2))
