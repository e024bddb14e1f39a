"""ds_configs/*.json: strict reading, merging with the preset, precision, refusals."""

import json
from pathlib import Path

import pytest
import torch

from data_tools.errors import ConfigError
from training.config.deepspeed_config import load_deepspeed_json, merge_deepspeed, stage_of
from training.config.precision import Hardware, explain_precision, precision_of
from training.config.preset import load_preset

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted((ROOT / "ds_configs").glob("*.json"))
WITH_BF16, WITHOUT_BF16 = Hardware("a new GPU", True), Hardware("an old CPU", False)


@pytest.fixture(scope="module")
def demo():
    return load_preset(str(ROOT / "tests/small.yaml"))


@pytest.fixture
def write(tmp_path):
    def write_file(content):
        path = tmp_path / "mine.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write_file


def test_the_five_files_are_there():
    names = [path.stem for path in FILES]

    assert names == ["zero0", "zero1", "zero2", "zero2_offload", "zero3"]
    assert [stage_of(load_deepspeed_json(path)) for path in FILES] == [0, 1, 2, 2, 3]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("hardware", [WITH_BF16, WITHOUT_BF16], ids=["bf16", "fp32"])
def test_deepspeed_itself_accepts_every_merged_file(path, hardware, demo):
    from deepspeed.runtime.config import DeepSpeedConfig

    merged = merge_deepspeed(path, demo, 1, hardware)
    parsed = DeepSpeedConfig(json.loads(json.dumps(merged)))

    assert parsed.zero_optimization_stage == stage_of(merged)
    assert parsed.train_batch_size == demo.optim.global_batch_size
    assert parsed.train_micro_batch_size_per_gpu == demo.optim.global_batch_size
    assert parsed.gradient_accumulation_steps == 1
    assert parsed.gradient_clipping == 1.0
    assert parsed.zero_allow_untested_optimizer
    assert not parsed.zero_force_ds_cpu_optimizer
    assert parsed.optimizer_name is None
    assert parsed.scheduler_name is None
    assert not parsed.monitor_config.tensorboard.enabled
    if stage_of(merged) == 0:
        assert not parsed.bfloat16_config.enabled
        assert parsed.torch_autocast_enabled == hardware.has_bf16
        assert parsed.torch_autocast_dtype == torch.bfloat16
    else:
        assert parsed.bfloat16_config.enabled == hardware.has_bf16
        assert parsed.grad_accum_dtype == "fp32"


def test_merging_does_not_depend_on_what_the_file_leaves_out(write, demo):
    path = write({"zero_optimization": {"stage": 2}})

    merged = merge_deepspeed(path, demo, 2, WITH_BF16)

    assert merged["train_batch_size"] == demo.optim.global_batch_size
    assert merged["train_micro_batch_size_per_gpu"] == 32
    assert merged["gradient_accumulation_steps"] == 1
    assert merged["gradient_clipping"] == 1.0
    assert precision_of(merged) == "fp32"


def test_an_empty_object_is_plain_data_parallelism(write, demo):
    merged = merge_deepspeed(write({}), demo, 1, WITH_BF16)

    assert merged["zero_optimization"]["stage"] == 0


def test_deepspeed_times_steps_only_to_print_them(write, demo):
    silent = merge_deepspeed(write({}), demo, 1, WITH_BF16)
    printing = merge_deepspeed(write({"steps_per_print": 10}), demo, 1, WITH_BF16)

    assert silent["timers"] == {"throughput": {"enabled": False}}
    assert "timers" not in printing


def test_numbers_that_agree_with_the_preset_are_accepted(write, demo):
    path = write({"train_batch_size": demo.optim.global_batch_size, "gradient_clipping": 1})

    assert (
        merge_deepspeed(path, demo, 2, WITH_BF16)["train_batch_size"]
        == demo.optim.global_batch_size
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_batch_size": 32}, "sets train_batch_size=32 but --global-batch-size is 64;"),
        (
            {"train_micro_batch_size_per_gpu": 16},
            "sets train_micro_batch_size_per_gpu=16 but --micro-batch-size is 32;",
        ),
        (
            {"gradient_accumulation_steps": 2},
            "sets gradient_accumulation_steps=2 but global batch / (ranks x micro-batch) is 1;",
        ),
        ({"gradient_clipping": 0.5}, "sets gradient_clipping=0.5 but --gradient-clipping is 1.0;"),
        ({"gradient_accumulation_steps": True}, "sets gradient_accumulation_steps=True but"),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}},
            '"auto" has no meaning for zero_optimization.reduce_bucket_size;',
        ),
    ],
)
def test_a_file_that_contradicts_the_preset_is_refused(content, message, write, demo):
    path = write(content)

    with pytest.raises(ConfigError) as error:
        merge_deepspeed(path, demo, 2, WITH_BF16)

    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


ZERO_2 = {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{\n "wandb": {\n  "a": 1,\n }\n}', ", line 3: trailing comma; the file must be strict"),
        ('{"wandb": [1, 2,\n]}', ", line 1: trailing comma;"),
        ('{"wandb": 1, "wandb": 2}', "sets 'wandb' twice; keep one."),
        ('{"wandb": {"a": 1, "a": 2}}', "sets 'a' twice;"),
        ('{\n // stage\n"wandb": 1}', ", line 2: JSON has no comments;"),
        ('{"gradient_clipping": NaN}', "NaN is not JSON;"),
        ("[]", "must hold one JSON object, not list."),
        ("", ", line 1: Expecting value, column 1;"),
        ({"gradient_cliping": 1}, "unknown key 'gradient_cliping'; did you mean 'gradient_clip"),
        ({"qqq": 1}, "unknown key 'qqq'; DeepSpeed would ignore it."),
        ({"optimizer": {"type": "AdamW"}}, "remove 'optimizer'; the optimizer is EMAAdamW"),
        ({"scheduler": {"type": "WarmupLR"}}, "remove 'scheduler'; the learning rate is set by"),
        ({"tensorboard": {"enabled": True}}, "remove 'tensorboard'; training writes TensorBoard"),
        ({"expert_parallel": {}}, "remove 'expert_parallel'; expert parallelism is set by"),
        ({"checkpoint": {"writer": {"type": "FAST"}}}, "remove checkpoint.writer; checkpoints are"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage must be 0, 1, 2 or 3, not"),
        ({"zero_optimization": {"stage": "2"}}, "stage must be 0, 1, 2 or 3, not '2'."),
        (
            {"zero_optimization": {"stage": 2, "compute_grad_norm": False}},
            "remove zero_optimization.compute_grad_norm; without it a gradient that is not finite",
        ),
        (
            {**ZERO_2, "bf16": {"enabled": True, "check_grad_overflow": False}},
            "remove bf16.check_grad_overflow; without it",
        ),
        ({"zero_optimization": 2}, "'zero_optimization' must be an object, not 2."),
        (
            {"zero_optimization": {"stage": 2, "overlap_com": True}},
            "unknown key 'zero_optimization.overlap_com'; did you mean 'overlap_comm'?",
        ),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}},
            "zero_optimization.reduce_bucket_size='big': Input should be a valid integer",
        ),
        (
            {"zero_optimization": {"stage": 2, "elastic_checkpoint": True}},
            "remove zero_optimization.elastic_checkpoint;",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
            "remove zero_optimization.zero_hpz_partition_size;",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
            'zero_optimization.offload_optimizer must be {"device": "cpu"} without a ratio;',
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param needs stage 3, not 2;",
        ),
        ({"fp16": {"enabled": True}}, "fp16 is not supported"),
        ({"bf16": {"enabled": "auto"}}, "bf16 at ZeRO stage 0 would accumulate gradients in bf16;"),
        ({**ZERO_2, "bf16": {"enabled": 1}}, 'bf16.enabled must be true, false or "auto", not 1.'),
        ({**ZERO_2, "bf16": {"enable": True}}, "unknown key 'bf16.enable'; did you mean 'enabled'"),
        (
            {**ZERO_2, "bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
            "remove bf16.bf16_master_weights_and_grads; the average of the weights needs fp32",
        ),
        (
            {**ZERO_2, "bf16": {"enabled": True}, "torch_autocast": {"enabled": True}},
            "enables both bf16 and torch_autocast;",
        ),
        (
            {**ZERO_2, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}},
            "data_types.grad_accum_dtype must be 'fp32', not 'bf16'.",
        ),
        (
            {"torch_autocast": {"enabled": True, "dtype": "float16"}},
            "torch_autocast.dtype must be 'bfloat16', not 'float16'.",
        ),
        (
            {**ZERO_2, "torch_autocast": {"enabled": "auto"}},
            "torch_autocast is for ZeRO stage 0, at stage 2 DeepSpeed would also send gradients in",
        ),
    ],
)
def test_a_file_that_cannot_be_honoured_is_refused(content, message, write):
    path = write(content)

    with pytest.raises(ConfigError) as error:
        load_deepspeed_json(path)

    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--deepspeed .*none.json: No such file"):
        load_deepspeed_json(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("file", "hardware", "precision", "line"),
    [
        (
            "zero2",
            WITH_BF16,
            "bf16",
            'precision: bf16 with fp32 master weights ({} sets bf16.enabled to "auto"; a new GPU '
            "multiplies bf16 natively)",
        ),
        (
            "zero2",
            WITHOUT_BF16,
            "fp32",
            'precision: fp32 ({} sets bf16.enabled to "auto"; an old CPU does not multiply bf16 '
            "natively)",
        ),
        (
            "zero0",
            WITH_BF16,
            "autocast",
            "precision: fp32 weights with products in bf16 ({} sets torch_autocast.enabled to "
            '"auto"; a new GPU multiplies bf16 natively)',
        ),
    ],
)
def test_the_precision_is_explained_in_one_line(file, hardware, precision, line, demo):
    path = ROOT / f"ds_configs/{file}.json"

    merged = merge_deepspeed(path, demo, 1, hardware)

    assert precision_of(merged) == precision
    assert explain_precision(path, load_deepspeed_json(path), merged, hardware) == line.format(path)


def test_bf16_can_be_forced_and_is_then_explained_as_slow(write, demo):
    path = write({**ZERO_2, "bf16": {"enabled": True}})

    merged = merge_deepspeed(path, demo, 1, WITHOUT_BF16)

    assert precision_of(merged) == "bf16"
    assert merged["data_types"]["grad_accum_dtype"] == "fp32"
    assert "7 to 100 times slower" in explain_precision(
        path, load_deepspeed_json(path), merged, WITHOUT_BF16
    )
