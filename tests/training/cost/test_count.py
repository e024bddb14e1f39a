"""Parameters, memory per rank and the text of --dry-run."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from training.config.command_line import parse_command_line
from training.config.deepspeed_config import merge_deepspeed
from training.config.precision import Hardware
from training.config.preset import load_preset
from training.config.tree import CONFIG
from training.cost.closed_forms import checkpoint_bytes, count_parameters, describe
from training.cost.memory import model_memory
from training.count import main

ROOT = Path(__file__).resolve().parents[3]


def memory(stage, precision="bf16", world_size=4, expert_parallel_size=1, num_averages=1):
    return model_memory(
        100,
        40,
        stage=stage,
        precision=precision,
        world_size=world_size,
        expert_parallel_size=expert_parallel_size,
        num_averages=num_averages,
    )


@pytest.mark.parametrize(
    ("preset", "total"),
    [("s", 38_201_156), ("b", 151_604_804), ("l", 533_485_672), ("xl", 786_505_076)],
)
def test_the_papers_sizes_have_the_official_parameter_counts(preset, total):
    count = count_parameters(load_preset(preset))

    assert (count.total, count.trainable) == (total, total)
    assert sum(count.parts.values()) == total


@pytest.mark.parametrize("preset", ["demo", "s"])
def test_experts_are_one_affine_map_of_the_width_each(preset):
    depth, width = {"demo": (6, 128), "s": (12, 384)}[preset]

    assert count_parameters(load_preset(preset)).experts == depth * 3 * (width * width + width)


def test_a_sample_meets_k_of_the_experts():
    preset = load_preset("s")
    other = parse_command_line(["--preset", "s", "--num-experts", "8", "--top-k", "3"]).config
    of_one = 12 * (384 * 384 + 384)

    assert count_parameters(preset).active == count_parameters(preset).total - of_one
    assert count_parameters(other).active == count_parameters(other).total - 5 * of_one


@pytest.mark.parametrize("routing", ["dtr", "dense"])
def test_without_experts_every_parameter_is_active(routing):
    count = count_parameters(parse_command_line(["--routing", routing]).config)

    assert count.experts == 0 and count.active == count.total


@pytest.mark.parametrize(
    ("stage", "precision", "expected"),
    [
        (0, "fp32", (400, 400, 1200)),
        (0, "autocast", (400, 400, 1200)),
        (1, "fp32", (400, 400, 400)),
        (1, "bf16", (200, 600, 400)),
        (2, "bf16", (200, 100, 400)),
        (2, "fp32", (400, 100, 400)),
        (3, "bf16", (50, 100, 400)),
    ],
)
def test_each_zero_stage_shards_one_thing_more(stage, precision, expected):
    assert memory(stage, precision) == expected


def test_expert_parallelism_divides_the_experts_that_are_held():
    assert memory(2, expert_parallel_size=4).weights == 2 * (60 + 40 / 4)
    assert memory(2, expert_parallel_size=4).optimizer == memory(2).optimizer


def test_every_average_is_one_more_fp32_state():
    for stage, shards in ((0, 1), (2, 4)):
        more = memory(stage, num_averages=3).optimizer - memory(stage).optimizer
        assert more == 2 * 4 * 100 / shards


def test_a_checkpoint_holds_every_average_twice():
    one = parse_command_line([]).config
    three = parse_command_line(["--ema-decays", "0.9,0.99", "--ema-stds", "0.1"]).config

    assert (
        checkpoint_bytes(three) - checkpoint_bytes(one) == 2 * 2 * 4 * count_parameters(one).total
    )


def test_one_rank_keeps_everything():
    for stage in (1, 2, 3):
        assert sum(memory(stage, "fp32", world_size=1)) == 100 * (4 + 4 + 16)


def test_the_dry_run_shows_configuration_sizes_memory_and_steps():
    config = parse_command_line(["--micro-batch-size", "8", "--global-batch-size", "64"]).config
    path = ROOT / "ds_configs/zero2_offload.json"
    merged = merge_deepspeed(path, config, 2, Hardware("a GPU", True))
    data = SimpleNamespace(num_samples=1600, num_classes=10)

    text = describe(config, merged, 2, data)

    sections = dict(part.split("\n", 1) for part in text.removeprefix("# ").split("\n\n# "))
    shown = yaml.safe_load(sections["configuration"])
    assert CONFIG.parse(shown, "configuration") == config.to_dict()
    assert yaml.safe_load(sections["DeepSpeed"]) == merged
    assert f"{count_parameters(config).total:,} parameters" in sections["model"]
    assert "2 rank(s), ZeRO stage 2, bf16 with fp32 master weights" in sections["memory per rank"]
    assert "offloaded" in sections["memory per rank"]
    assert "activations of a micro-batch of 8" in sections["memory per rank"]
    assert "GFLOP per image, in micro-batches of 8" in sections["FLOPs"]
    assert "1,600 samples, 10 classes; 25.0 steps of 64 per epoch" in sections["data"]


def test_the_dry_run_works_before_there_is_data():
    config = load_preset("xl")
    merged = merge_deepspeed(ROOT / "ds_configs/zero2.json", config, 8, Hardware("a GPU", True))

    assert "datasets/imagenet256 is not there yet" in describe(config, merged, 8)


def test_the_command_prints_sizes_for_ranks_that_are_not_here(capsys):
    main(["--preset", "xl", "--world-size", "64", "--bf16", "--micro-batch-size", "4"])

    text = capsys.readouterr().out
    assert "786,505,076 parameters" in text
    assert "forward and backward 771.89, experts merged" in text
    assert "64 rank(s), ZeRO stage 2, bf16 with fp32 master weights" in text
    assert "configuration" not in text


def test_the_command_refuses_what_training_refuses(capsys):
    for arguments, message in (
        (["--world-size", "0"], "--world-size must be at least 1, not 0."),
        (["--world-size", "3"], "--global-batch-size 32 is not divisible by 3 ranks"),
        (["--top-k", "9"], "--top-k 9 is more than --num-experts 3"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err
