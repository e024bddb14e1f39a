"""What expert parallelism cannot do, refused before a process group exists.

DeepSpeed 0.19.8 takes most of these and trains on wrong gradients, or stops in the middle with a
traceback. What it gets wrong without expert parallelism too is refused in
config/deepspeed_config.py, an expert-parallel size that changes on resume in
checkpoints/manifest.py, unequal batches of the ranks in `plan_batch`.
"""

from pathlib import Path
from typing import Any

from data_tools.errors import ConfigError
from training.config.deepspeed_config import load_deepspeed_json, stage_of
from training.config.network import network_options
from training.config.tree import Config

# With fewer values a rank may hold none of a group, and its optimizer state does not load again.
MIN_EXPERT_VALUES_PER_RANK = 2


def check_expert_parallelism(config: Config, deepspeed_path: Path, world_size: int) -> None:
    """Raise ConfigError for the first thing that does not go with the expert-parallel size.

    Args:
        config: the resolved configuration.
        deepspeed_path: the DeepSpeed JSON file.
        world_size: number of ranks.
    """
    deepspeed_json = load_deepspeed_json(deepspeed_path)
    if config.run.expert_parallel_size == 1:
        return
    _check_sizes(config, world_size)
    _check_file(config, deepspeed_json, deepspeed_path)


def _check_sizes(config: Config, world_size: int) -> None:
    model, size = config.model, config.run.expert_parallel_size
    if model.routing != "switch":
        raise ConfigError(
            f"--expert-parallel-size {size} needs --routing switch, since {model.routing} has no "
            "experts to share out; use --expert-parallel-size 1."
        )
    if model.num_experts % size:
        raise ConfigError(
            f"--expert-parallel-size {size} does not divide --num-experts {model.num_experts}; "
            "use a divisor, so that every rank holds equally many."
        )
    if world_size % size:
        raise ConfigError(
            f"--expert-parallel-size {size} does not divide the {world_size} rank(s); start a "
            f"multiple of {size} ranks or lower it."
        )
    num_values, num_holders = expert_values(config) // size, world_size // size
    if num_values < MIN_EXPERT_VALUES_PER_RANK * num_holders:
        raise ConfigError(
            f"--expert-parallel-size {size} leaves {num_values} values of experts to {num_holders} "
            "ranks that would share them, too few for ZeRO to shard; use fewer ranks."
        )


def expert_values(config: Config) -> int:
    """Count the parameters of all experts of all blocks."""
    network = network_options(config)
    D, H = network.hidden_size, network.expert_hidden_size
    of_one = D * D + D if network.expert_kind == "affine" else 2 * D * H + H + D
    return network.depth * network.num_experts * of_one


def _check_file(config: Config, deepspeed_json: dict[str, Any], path: Path) -> None:
    size, clipping = config.run.expert_parallel_size, config.optim.gradient_clipping
    if stage_of(deepspeed_json) == 0 and clipping > 0:
        raise ConfigError(
            f"--gradient-clipping {clipping} with --expert-parallel-size {size} at ZeRO stage 0 "
            f"({path}) would clip by a wrong norm (DeepSpeed #8475); use ds_configs/zero1.json or "
            "--gradient-clipping 0."
        )
    zero = deepspeed_json.get("zero_optimization", {})
    for key in ("contiguous_gradients", "reduce_scatter"):
        if zero.get(key) is False:
            raise ConfigError(
                f"{path}: zero_optimization.{key} must be true with --expert-parallel-size {size}; "
                "remove the key."
            )
