"""Training on any layout equals training in one process: the real launcher, 1, 2 and 4 ranks."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.support.alike import assert_trained_alike
from tests.support.configs import stated
from tests.support.launch import run_jobs
from training.checkpoints.average_snapshots import SNAPSHOT_DIR
from training.checkpoints.manifest import EMA_FILE, RAW_FILE, latest_checkpoint
from training.monitoring.event_files import read_metrics

pytestmark = pytest.mark.processes

STEPS = 6
RELATIVE = 1e-5
BF16_RELATIVE = 1e-2  # bf16 keeps 8 bits: 0.4 % per rounding, averaged over many
# Every job trains the same tiny problem: 4 experts, batch 8, fp32.
COMMON = [
    *("--num-experts", 4, "--global-batch-size", 8, "--warmup-steps", 2, "--max-steps", STEPS),
    *("--log-every", 1, "--save-every", 3, "--sample-every", 0),
    *("--ema-stds", 0.05),  # a second average, beside the preset's
]

# Averaged weights are swapped in and out in the middle of training.
GRIDS = ["--sample-every", 3, "--sample-count", 2, "--sample-steps", 2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, demo_latents):
    """Train every layout; returns a function from a run's name to its directory."""
    folder = tmp_path_factory.mktemp("runs")

    def fp32(stage):
        path = folder / f"zero{stage}.json"
        zero = {"stage": stage}
        if stage == 3:
            zero["stage3_param_persistence_threshold"] = 0
        path.write_text(json.dumps({"zero_optimization": zero}))
        return path

    def job(name, stage_or_file, *flags):
        file = fp32(stage_or_file) if isinstance(stage_or_file, int) else stage_or_file
        clipping = 0 if stage_or_file == 0 else 1.0
        common = ["--deepspeed", file, "--run-dir", folder / name, "--data", demo_latents]
        return [*common, *COMMON, "--gradient-clipping", clipping, *flags]

    def bf16(name, file, *flags):
        # Four tokens a sample, because a CPU without bf16 instructions is very slow at it.
        return job(name, stated(folder, file, True), "--patch-size", 8, *GRIDS, *flags)

    # Together: whatever keeps state between steps beside weights and moments, and both densities.
    options = [
        *("--prior-matching-every", 4, "--loss-weight", "uncertainty", "--timestep-stratified"),
        *("--timestep-sampling", "logit_normal", "--ema-stds", "0.05,0.1", "--qk-norm"),
        *("--ema-snapshot-every", 3, "--renormalize-gates"),
    ]
    mlp = ("--expert-kind", "mlp", "--expert-hidden-ratio", 0.5)
    flow = ("--objective", "flow", "--routing", "dense")
    dtr = ("--objective", "v", "--routing", "dtr", "--learned-variance")
    ep2, ep4 = ("--expert-parallel-size", 2), ("--expert-parallel-size", 4)
    muon = ("--optimizer", "muon", "--muon-lr", 4e-3, "--weight-decay", 0.1, *mlp)
    strided = ("--placement", "strided")
    mixture = ("--data", f"{demo_latents}=2,{demo_latents}", "--data-streams", 2)
    top_1, all_mlp = ("--top-k", 1), (*mlp, "--top-k", 4)
    # Clipping is on in all of them.
    everything = ("--micro-batch-size", 2, "--activation-checkpointing", *GRIDS)
    # ZeRO 3 comes last: it replaces torch's linear layer for the rest of the process by one that
    # rounds differently.
    run_jobs(
        1,
        [
            job("reference", 2),
            job("unclipped", 2, "--gradient-clipping", 0),
            job("w1-accumulation", 2, "--micro-batch-size", 2),
            job("w1-recomputed", 2, "--activation-checkpointing"),
            job("w1-z1", 1),
            job("w1-z0-unclipped", 0),
            job("w1-offload", stated(folder, "zero2_offload", False)),
            job("resumed", 2, "--max-steps", 3),
            job("resumed", 2),
            job("four-tokens", 2, "--patch-size", 8),
            job("sampled", 2, *GRIDS),
            job("options", 2, *options),
            job("options-resumed", 2, *options, "--max-steps", 3),
            job("options-resumed", 2, *options),
            job("mixture", 2, *mixture),
            job("mixture-resumed", 2, *mixture, "--max-steps", 3),
            job("mixture-resumed", 2, *mixture),
            job("mlp", 2, *mlp),
            job("flow", 2, *flow),
            job("dtr", 2, *dtr),
            job("top-1", 2, *top_1),
            job("all-mlp", 2, *all_mlp),
            job("muon", 2, *muon),
            job("muon-unclipped", 0, *muon),
            job("w1-z3", 3),
        ],
        folder,
    )
    run_jobs(
        2,
        [
            job("w2-z2", 2),
            job("w2-z0-ep2-unclipped", 0, *ep2),
            job("w2-z1-ep2", 1, *ep2),
            job("w2-z2-ep2", 2, *ep2),
            job("w2-z2-ep2-accumulation", 2, *ep2, "--micro-batch-size", 2),
            job("w2-z2-ep2-recomputed", 2, *ep2, "--activation-checkpointing"),
            job("w2-z2-ep2-resumed", 2, *ep2, "--max-steps", 3),
            job("w2-z2-ep2-resumed", 2, *ep2),
            job("w2-z2-ep2-options", 2, *ep2, *options, "--micro-batch-size", 2),
            job("w2-z2-ep2-mixture", 2, *ep2, *mixture, "--micro-batch-size", 2),
            job("w2-z2-ep2-mlp", 2, *ep2, *mlp, *GRIDS),
            job("w2-z1-flow", 1, *flow, *GRIDS),
            job("w2-z1-muon", 1, *muon, "--micro-batch-size", 2),
            job("w2-z0-ep2-muon-unclipped", 0, *muon, *ep2),
            job("w2-z2-ep2-muon", 2, *muon, *ep2, *GRIDS, *strided),
            job("w2-z2-ep2-muon-resumed", 2, *muon, *ep2, *GRIDS, *strided, "--max-steps", 3),
            job("w2-z2-ep2-muon-resumed", 2, *muon, *ep2, *GRIDS, *strided),
            job("muon-elsewhere", 2, *muon, *ep2, "--max-steps", 3),
            job("w2-z2-dtr", 2, *dtr, "--activation-checkpointing"),
            bf16("bf16-z0", "zero0", "--gradient-clipping", 0),
            bf16("bf16-z1", "zero1"),
            bf16("bf16-z2", "zero2"),
            bf16("bf16-offload", "zero2_offload"),
            bf16("bf16-z1-ep2", "zero1", *ep2),
            bf16("bf16-z2-ep2", "zero2", *ep2),
            bf16("bf16-z2-ep2-resumed", "zero2", *ep2, "--max-steps", 3),
            bf16("bf16-z2-ep2-resumed", "zero2", *ep2),
            job("w2-z3", 3),
            job("w2-z3-sampled", 3, *GRIDS),
            job("w2-z3-options", 3, *options),
            job("w2-z3-mlp", 3, *mlp),
            job("w2-z3-ep2", 3, *ep2, *everything),
            job("w2-z3-ep2-resumed", 3, *ep2, *everything, "--max-steps", 3),
            job("w2-z3-ep2-resumed", 3, *ep2, *everything),
            job("muon-elsewhere", 3, *muon),
            bf16("bf16-z3", "zero3"),
            bf16("bf16-z3-ep2", "zero3", *ep2),
        ],
        folder,
    )
    run_jobs(
        4,
        [
            job("w4-z2-ep2", 2, *ep2),
            job("w4-z1-ep4", 1, *ep4, *top_1),
            job("w4-z3", 3),
            job("w4-z3-ep2", 3, *ep2, *all_mlp),
            job("w4-z3-ep2-muon", 3, *ep2, *muon),
            # As shipped: small parameters are kept whole, weights are fetched ahead.
            job("w4-z3-ep4", stated(folder, "zero3", False), *ep4, *everything[2:]),
        ],
        folder,
    )
    return lambda name: folder / name


def weights(run_dir, file):
    return load_file(latest_checkpoint(run_dir) / file)


def weight_files(run_dir):
    """Names of the newest checkpoint's weights and averages."""
    names = sorted(path.name for path in latest_checkpoint(run_dir).glob("*.safetensors"))
    assert {EMA_FILE, "ema-std0.050.safetensors", RAW_FILE} <= set(names)
    return names


CLIPPED = [
    "w1-accumulation",
    "w1-recomputed",
    "w1-z1",
    "w1-z3",
    "w1-offload",
    "w2-z2",
    "w2-z3",
    "w2-z1-ep2",
    "w2-z2-ep2",
    "w2-z2-ep2-accumulation",
    "w2-z2-ep2-recomputed",
    "w2-z3-ep2",
    "w4-z2-ep2",
    "w4-z3",
    "w4-z3-ep4",
]
LAYOUTS = [("reference", name) for name in CLIPPED]
LAYOUTS += [("unclipped", name) for name in ("w1-z0-unclipped", "w2-z0-ep2-unclipped")]
LAYOUTS += [("options", name) for name in ("w2-z2-ep2-options", "w2-z3-options")]
LAYOUTS += [("mixture", "w2-z2-ep2-mixture")]
LAYOUTS += [("mlp", "w2-z2-ep2-mlp"), ("mlp", "w2-z3-mlp")]
LAYOUTS += [("top-1", "w4-z1-ep4"), ("all-mlp", "w4-z3-ep2")]
MUON = ("w2-z1-muon", "w2-z2-ep2-muon", "muon-elsewhere", "w4-z3-ep2-muon")
LAYOUTS += [("muon", name) for name in MUON]
LAYOUTS += [("muon-unclipped", "w2-z0-ep2-muon-unclipped")]
LAYOUTS += [("flow", "w2-z1-flow"), ("dtr", "w2-z2-dtr")]


@pytest.mark.parametrize(("reference", "name"), LAYOUTS)
def test_losses_norms_and_loads_equal_one_process(runs, reference, name):
    expected, got = read_metrics(runs(reference)), read_metrics(runs(name))

    assert [record["step"] for record in got] == list(range(1, STEPS + 1))
    for wanted, record in zip(expected, got, strict=True):
        for key, value in wanted.items():
            if key == "optim/grad_norm" and key not in record:
                assert "z0" in name, "only ZeRO 0 without clipping computes no norm"
            elif not key.startswith(("speed/", "memory/")):
                assert record[key] == pytest.approx(value, rel=RELATIVE, abs=1e-7), key


@pytest.mark.parametrize(("reference", "name"), LAYOUTS)
def test_weights_and_their_averages_equal_one_process(runs, reference, name):
    files = weight_files(runs(reference))

    assert weight_files(runs(name)) == files
    for file in files:
        assert_trained_alike(weights(runs(name), file), weights(runs(reference), file), file)


def test_snapshots_hold_the_averages_of_their_step(runs):
    folder = runs("w2-z2-ep2-options") / SNAPSHOT_DIR

    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        f"std{std}-step-{step:07d}.safetensors" for std in ("0.050", "0.100") for step in (3, 6)
    ]
    for std in ("0.050", "0.100"):
        stored = load_file(folder / f"std{std}-step-0000006.safetensors")
        expected = weights(runs("w2-z2-ep2-options"), f"ema-std{std}.safetensors")
        assert all(torch.equal(stored[key], value) for key, value in expected.items())


def test_training_moves_exactly_the_experts_that_saw_a_sample(runs):
    raw, ema = weights(runs("reference"), RAW_FILE), weights(runs("reference"), EMA_FILE)
    records = read_metrics(runs("reference"))

    used_experts = 0
    for block in range(6):
        key = f"blocks.{block}.mixture.deepspeed_moe.experts.weight"
        assert not torch.equal(raw[key], ema[key])
        for expert in range(4):
            tag = f"moe_load/block_{block:02d}/expert_{expert}"
            # The adaLN-Zero start passes no gradient to the experts before the third step: the
            # final layer learns first, then the blocks' gates.
            is_used = any(record[tag] > 0 for record in records[2:])
            assert bool(raw[key][expert].any()) == is_used, "experts start at zero"
            used_experts += is_used
    assert 6 * 2 <= used_experts < 6 * 4, "the comparison covers a starved expert"


@pytest.mark.parametrize(
    ("uninterrupted", "resumed"),
    [
        ("reference", "resumed"),
        ("options", "options-resumed"),
        ("mixture", "mixture-resumed"),
        ("w2-z2-ep2", "w2-z2-ep2-resumed"),
        ("w2-z3-ep2", "w2-z3-ep2-resumed"),
        ("w2-z2-ep2-muon", "w2-z2-ep2-muon-resumed"),
        ("bf16-z2-ep2", "bf16-z2-ep2-resumed"),
    ],
)
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(runs, uninterrupted, resumed):
    def exact(record):
        return {k: v for k, v in record.items() if not k.startswith(("speed/", "memory/"))}

    expected, got = read_metrics(runs(uninterrupted)), read_metrics(runs(resumed))
    assert [exact(record) for record in got] == [exact(record) for record in expected]
    for file in weight_files(runs(uninterrupted)):
        expected, got = weights(runs(uninterrupted), file), weights(runs(resumed), file)
        assert all(torch.equal(got[key], value) for key, value in expected.items())


def test_expert_loads_sum_to_top_k(runs):
    for record in read_metrics(runs("w2-z2-ep2")):
        for block in range(6):
            load = [record[f"moe_load/block_{block:02d}/expert_{e}"] for e in range(4)]
            assert sum(load) == pytest.approx(2.0)


BF16_RUNS = ["z0", "z1", "z2", "z3", "offload", "z1-ep2", "z2-ep2", "z3-ep2"]


@pytest.mark.parametrize("name", BF16_RUNS)
def test_bf16_follows_fp32_and_keeps_fp32_averages(runs, name):
    run_dir = runs(f"bf16-{name}")
    expected, got = read_metrics(runs("four-tokens")), read_metrics(run_dir)

    for wanted, record in zip(expected, got, strict=True):
        for key in ("loss/total", "loss/mse", "loss/prior"):
            assert record[key] == pytest.approx(wanted[key], rel=BF16_RELATIVE), key
    # fp32 values that bf16 cannot hold: the average was kept on the masters.
    ema = weights(run_dir, EMA_FILE)["blocks.0.mlp.fc1.weight"]
    assert not torch.equal(ema, ema.bfloat16().float())


@pytest.mark.parametrize("name", BF16_RUNS)
def test_a_grid_of_samples_is_drawn_on_every_layout(runs, name):
    grids = sorted(path.name for path in (runs(f"bf16-{name}") / "samples").iterdir())

    assert grids == ["0000003.png", "0000006.png"]


def test_drawing_samples_leaves_the_training_bit_identical(runs):
    for drawn, plain in (("sampled", "reference"), ("w2-z3-sampled", "w2-z3")):
        for file in (EMA_FILE, RAW_FILE):
            expected, got = weights(runs(plain), file), weights(runs(drawn), file)
            assert all(torch.equal(got[key], value) for key, value in expected.items())
