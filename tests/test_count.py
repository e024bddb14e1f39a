"""Parameters, memory per rank and the text of --dry-run."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from training.command_line import parse_command_line
from training.count import ParameterCount, count_parameters, describe, memory_per_rank
from training.deepspeed_config import merge_deepspeed
from training.precision import Hardware
from training.preset import load_preset

ROOT = Path(__file__).resolve().parents[1]
COUNT = ParameterCount(total=100, trainable=100, experts=40, parts={})


def memory(stage, precision="bf16", world_size=4, expert_parallel_size=1):
    return memory_per_rank(
        COUNT,
        stage=stage,
        precision=precision,
        world_size=world_size,
        expert_parallel_size=expert_parallel_size,
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


@pytest.mark.parametrize(
    ("stage", "precision", "expected"),
    [
        (0, "fp32", (400, 400, 1200)),
        (0, "autocast", (400, 400, 1200)),
        (1, "bf16", (200, 400, 400)),
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
    assert yaml.safe_load(sections["configuration"]) == config.to_dict()
    assert yaml.safe_load(sections["DeepSpeed"]) == merged
    assert f"{count_parameters(config).total:,} parameters" in sections["model"]
    assert "2 rank(s), ZeRO stage 2, bf16 with fp32 master weights" in sections["memory per rank"]
    assert "offloaded" in sections["memory per rank"]
    assert "Activations" in sections["memory per rank"]
    assert "1,600 samples, 10 classes; 25.0 steps of 64 per epoch" in sections["data"]


def test_the_dry_run_works_before_there_is_data():
    config = load_preset("xl")
    merged = merge_deepspeed(ROOT / "ds_configs/zero2.json", config, 8, Hardware("a GPU", True))

    assert "datasets/imagenet256 is not there yet" in describe(config, merged, 8)
