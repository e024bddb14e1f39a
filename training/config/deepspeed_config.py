"""The DeepSpeed JSON: read strictly, checked, and merged with the configuration.

ds_configs/*.json own memory, precision and communication. Batch, accumulation and clipping belong
to the preset: they are "auto" in the file and filled in here. What DeepSpeed 0.19.8 would accept
and get wrong is refused here, each with the reason.
"""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pydantic

from data_tools.errors import ConfigError
from data_tools.user_files.user_text import TextError, read_text
from training.config.precision import PRECISION_BLOCKS, Hardware, detect_hardware
from training.config.tree import Config
from training.config.wording import did_you_mean, shown

MAX_STAGE = 3
AUTO = "auto"

# DeepSpeed ignores a top-level key that it does not know, so a typo would pass unnoticed.
# fmt: off
KNOWN_KEYS = frozenset({
    "activation_checkpointing", "aio", "bf16", "checkpoint", "comet", "comms_logger",
    "communication_data_type", "csv_monitor", "data_types", "disable_allgather",
    "dump_state", "flops_profiler", "fp16", "gradient_accumulation_steps",
    "gradient_clipping", "log_level", "memory_breakdown", "steps_per_print", "timers",
    "torch_autocast",
    "train_batch_size", "train_micro_batch_size_per_gpu", "wall_clock_breakdown", "wandb",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
})
# fmt: on
NUMBER_KEYS = ("steps_per_print",)
SWITCH_KEYS = (
    "disable_allgather",
    "dump_state",
    "memory_breakdown",
    "wall_clock_breakdown",
)
REFUSED_KEYS = {
    "optimizer": "the optimizer is EMAAdamW, set by the preset (lr, beta1, beta2, weight_decay)",
    "scheduler": "the learning rate is set by the preset (lr, warmup_steps)",
    "tensorboard": "training writes TensorBoard itself, under the run directory",
    "elasticity": "a step is always the preset's global_batch_size",
    "expert_parallel": "expert parallelism is set by --expert-parallel-size",
    "tensor_parallel": "the model has no tensor-parallel layers",
    "pipeline": "the model has no pipeline stages",
    "data_efficiency": "the order of the samples is the data stream's",
    "compile": "blocks are compiled by --compile-blocks",
    "gradient_allreduce_op": "a step's gradient is the mean over its samples",
    "gradient_predivide_factor": "gradients are averaged in fp32, which needs no scaling before",
    "prescale_gradients": "gradients are averaged in fp32, which needs no scaling before",
    "sequence_parallel_size": "the model has no sequence-parallel attention",
    "use_data_before_expert_parallelism": "ranks of an expert-parallel group are consecutive",
}


# Where these are on, weights or optimizer state lie where engine/deepspeed_internals.py does not
# look for them.
UNSUPPORTED_ZERO_KEYS = (
    "zenflow",
    "super_offload",
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
    "mics_shard_size",
)


def load_deepspeed_json(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed configuration as strict JSON and refuse what this system cannot honour."""
    try:
        text = read_text(path)
    except OSError as err:
        raise ConfigError(
            f"--deepspeed {path}: {err.strerror}; give one of ds_configs/*.json."
        ) from err
    except TextError as err:
        raise ConfigError(f"{path} is not UTF-8 text; write plain JSON.") from err
    values = _parse_strictly(text, path)
    _check_keys(values, path)
    _check_zero(values, path)
    _check_precision(values, path)
    _check_guards(values, path)
    _check_against_deepspeed(values, path)
    return values


def _parse_strictly(text: str, path: Path) -> dict[str, Any]:
    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"{path} sets '{key}' twice; keep one.")
        return dict(pairs)

    def refuse_constant(name: str) -> None:
        raise ConfigError(f"{path}: {name} is not JSON; write a number.")

    try:
        values = json.loads(
            text, object_pairs_hook=refuse_duplicates, parse_constant=refuse_constant
        )
    except json.JSONDecodeError as err:
        line, reason = err.lineno, f"{err.msg}, column {err.colno}"
        for comma in re.finditer(r",(\s*)[}\]]", text):
            if comma.start() <= err.pos < comma.end():  # Python 3.13 points at the comma
                line, reason = text.count("\n", 0, comma.start()) + 1, "trailing comma"
        if text[err.pos : err.pos + 1] in ("/", "#"):
            reason = "JSON has no comments"
        raise ConfigError(f"{path}, line {line}: {reason}; the file must be strict JSON.") from err
    except (ValueError, RecursionError) as err:  # a number of thousands of digits, or brackets
        raise ConfigError(f"{path}: {err}; write a plain JSON object.") from err
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold one JSON object, not {type(values).__name__}.")
    return values


def _check_keys(values: dict[str, Any], path: Path) -> None:
    for key, value in values.items():
        if key in REFUSED_KEYS:
            raise ConfigError(f"{path}: remove '{key}'; {REFUSED_KEYS[key]}.")
        if key not in KNOWN_KEYS:
            hint = did_you_mean(key, sorted(KNOWN_KEYS), "; DeepSpeed would ignore it.")
            raise ConfigError(f"{path}: unknown key '{key}'{hint}")
        blocks = ("bf16", "fp16", "torch_autocast", "zero_optimization", "data_types", "checkpoint")
        if key in blocks and not isinstance(value, dict):
            raise ConfigError(f"{path}: '{key}' must be an object, not {shown(value)}.")
        if key in NUMBER_KEYS and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ConfigError(f"{path}: '{key}' must be a number, not {shown(value)}.")
        if key in SWITCH_KEYS and not isinstance(value, bool):
            raise ConfigError(f"{path}: '{key}' must be true or false, not {shown(value)}.")
    checkpoint = values.get("checkpoint", {})
    for key in ("writer", "load_universal", "parallel_write", "use_node_local_storage"):
        if checkpoint.get(key):
            raise ConfigError(
                f"{path}: remove checkpoint.{key}; checkpoints are written by DeepSpeed's plain "
                "writer, the only one whose files load again, and published whole."
            )


def _check_zero(values: dict[str, Any], path: Path) -> None:
    zero = values.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if type(stage) is not int or not 0 <= stage <= MAX_STAGE:
        raise ConfigError(
            f"{path}: zero_optimization.stage must be 0, 1, 2 or 3, not {shown(stage)}."
        )
    if zero.get("elastic_checkpoint"):
        raise ConfigError(
            f"{path}: remove zero_optimization.elastic_checkpoint; such a checkpoint cannot be "
            "loaded again with this optimizer."
        )
    for key in UNSUPPORTED_ZERO_KEYS:
        if zero.get(key):
            raise ConfigError(
                f"{path}: remove zero_optimization.{key}; the average of the weights does not "
                "work with it."
            )
    if zero.get("stage3_module_granularity_threshold"):
        raise ConfigError(
            f"{path}: remove zero_optimization.stage3_module_granularity_threshold; the gradients "
            "of embeddings break with it."
        )
    for key in ("offload_optimizer", "offload_param"):
        offload = zero.get(key) or {}
        if offload.get("device") == "nvme" or offload.get("ratio", 1.0) != 1.0:
            raise ConfigError(
                f'{path}: zero_optimization.{key} must be {{"device": "cpu"}} without a ratio; '
                "the average of the weights is not found anywhere else."
            )
    if zero.get("offload_param") and stage != MAX_STAGE:
        raise ConfigError(
            f"{path}: zero_optimization.offload_param needs stage 3, not {stage}; remove it."
        )


def _check_guards(values: dict[str, Any], path: Path) -> None:
    """Refuse what would let a gradient that is not finite reach the weights unseen."""
    for block, key in (("zero_optimization", "compute_grad_norm"), ("bf16", "check_grad_overflow")):
        if values.get(block, {}).get(key) is False:
            raise ConfigError(
                f"{path}: remove {block}.{key}; without it a gradient that is not finite is "
                "applied, and all weights with it become NaN."
            )


def _check_against_deepspeed(values: dict[str, Any], path: Path) -> None:
    """Let DeepSpeed's own schema judge the blocks that have one."""
    # Imported late: DeepSpeed reads DS_ACCELERATOR when it is imported.
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for block, schema in (
        ("zero_optimization", DeepSpeedZeroConfig),
        ("bf16", DeepSpeedBF16Config),
    ):
        given = values.get(block, {})
        known = {field.alias or name for name, field in schema.model_fields.items()}
        for key in given:
            if key not in known:
                hint = did_you_mean(key, sorted(known), "; see ds_configs/README.md.")
                raise ConfigError(f"{path}: unknown key '{block}.{key}'{hint}")
        try:
            schema(**given)
        except pydantic.ValidationError as err:
            first = err.errors()[0]
            where = ".".join(str(part) for part in (block, *first["loc"]))
            raise ConfigError(f"{path}: {where}={shown(first['input'])}: {first['msg']}.") from err


def _check_precision(values: dict[str, Any], path: Path) -> None:
    bf16, autocast = values.get("bf16", {}), values.get("torch_autocast", {})
    for name, block in (("bf16", bf16), ("torch_autocast", autocast)):
        enabled = block.get("enabled", False)
        if type(enabled) is not bool and enabled != AUTO:
            raise ConfigError(
                f'{path}: {name}.enabled must be true, false or "auto", not {enabled!r}.'
            )
    if values.get("fp16", {}).get("enabled"):
        raise ConfigError(
            f"{path}: fp16 is not supported (DeepSpeed refuses it on a CPU, and its loss scaling "
            'skips optimizer steps); use "bf16": {"enabled": "auto"}.'
        )
    for key in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):
        if bf16.get(key):
            raise ConfigError(
                f"{path}: remove bf16.{key}; the average of the weights needs fp32 masters "
                "(bf16 cannot hold a change of 1e-4)."
            )
    if bf16.get("enabled") and autocast.get("enabled"):
        raise ConfigError(f"{path} enables both bf16 and torch_autocast; keep one.")
    if bf16.get("enabled") and stage_of(values) == 0:
        raise ConfigError(
            f"{path}: bf16 at ZeRO stage 0 would accumulate gradients in bf16; use "
            '"torch_autocast": {"enabled": "auto", "dtype": "bfloat16"} as ds_configs/zero0.json.'
        )
    dtype = values.get("data_types", {}).get("grad_accum_dtype", "fp32")
    if dtype != "fp32":
        raise ConfigError(f"{path}: data_types.grad_accum_dtype must be 'fp32', not {dtype!r}.")
    dtype = autocast.get("dtype", "bfloat16")
    if dtype not in ("bfloat16", "bf16", "torch.bfloat16"):
        raise ConfigError(f"{path}: torch_autocast.dtype must be 'bfloat16', not {dtype!r}.")
    if autocast.get("enabled") and (stage := stage_of(values)):
        raise ConfigError(
            f"{path}: torch_autocast is for ZeRO stage 0, at stage {stage} DeepSpeed would also "
            'send gradients in bf16; use "bf16": {"enabled": "auto"} as ds_configs/zero2.json.'
        )


def stage_of(values: dict[str, Any]) -> int:
    """Return the ZeRO stage of a checked or merged configuration."""
    return values.get("zero_optimization", {}).get("stage", 0)


class BatchPlan(NamedTuple):
    """How a global batch is cut into forward passes."""

    micro_batch_size: int  # samples per rank and forward pass
    gradient_accumulation_steps: int  # forward passes per step


def plan_batch(config: Config, world_size: int) -> BatchPlan:
    """Divide the global batch over the ranks; every forward pass has the same number of samples."""
    total, micro = config.optim.global_batch_size, config.optim.micro_batch_size
    if total % world_size:
        lower = max(world_size, total // world_size * world_size)
        raise ConfigError(
            f"--global-batch-size {total} is not divisible by {world_size} ranks; use a multiple "
            f"of {world_size} such as {lower}."
        )
    micro = total // world_size if micro is None else micro
    if total % (world_size * micro):
        raise ConfigError(
            f"--global-batch-size {total} is not divisible by {world_size} ranks x micro-batch "
            f"{micro} = {world_size * micro}; use a multiple of {world_size * micro} or another "
            "--micro-batch-size."
        )
    return BatchPlan(micro, total // (world_size * micro))


def merge_deepspeed(
    path: Path, config: Config, world_size: int, hardware: Hardware | None = None
) -> dict[str, Any]:
    """Fill the file's "auto" values and return the dict for `deepspeed.initialize(config=...)`.

    Args:
        path: the DeepSpeed JSON file.
        config: the resolved configuration, owner of batch, accumulation and clipping.
        world_size: number of ranks.
        hardware: decides what "auto" precision means; None = this machine.
    """
    hardware = hardware or detect_hardware()
    merged = copy.deepcopy(load_deepspeed_json(path))
    plan = plan_batch(config, world_size)
    owned = {
        "train_batch_size": (config.optim.global_batch_size, "--global-batch-size"),
        "train_micro_batch_size_per_gpu": (plan.micro_batch_size, "--micro-batch-size"),
        "gradient_accumulation_steps": (
            plan.gradient_accumulation_steps,
            "global batch / (ranks x micro-batch)",
        ),
        "gradient_clipping": (config.optim.gradient_clipping, "--gradient-clipping"),
    }
    for key, (value, owner) in owned.items():
        stated = merged.get(key, AUTO)
        if stated != AUTO and (isinstance(stated, bool) or stated != value):
            raise ConfigError(
                f'{path} sets {key}={stated!r} but {owner} is {value}; write "auto" in the file '
                "or change the preset or flag."
            )
        merged[key] = value
    for name in PRECISION_BLOCKS:
        if merged.get(name, {}).get("enabled") == AUTO:
            merged[name]["enabled"] = hardware.has_bf16
    if merged.get("bf16", {}).get("enabled"):
        merged.setdefault("data_types", {})["grad_accum_dtype"] = "fp32"
    merged.setdefault("zero_optimization", {}).setdefault("stage", 0)
    # DeepSpeed's timer of throughput waits for the device twice in every micro-step.
    if "steps_per_print" not in merged:  # else DeepSpeed is asked to print what it times
        merged.setdefault("timers", {"throughput": {"enabled": False}})
    merged["zero_allow_untested_optimizer"] = True  # EMAAdamW; ZeRO knows its own by exact type
    merged["zero_force_ds_cpu_optimizer"] = False  # offloading, too, steps EMAAdamW
    for where in _find_auto(merged):
        raise ConfigError(f'{path}: "auto" has no meaning for {where}; state a value.')
    return merged


def _find_auto(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _find_auto(value, f"{prefix}{key}.")
        elif value == AUTO and key != "keep_in_fp32_modules":
            yield prefix + key
