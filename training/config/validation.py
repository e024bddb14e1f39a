"""Check a configuration before a process group exists: refuse values that do not fit together.

The checks are cheap and come to the same on every rank. A mistake is one sentence that begins with
the flag or the file at fault. Two things are refused elsewhere: in config/deepspeed_config.py a
DeepSpeed file that no run could use, in checkpoints/resume_point.py a checkpoint that this run must
not continue from.
"""

import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from data_tools.errors import ConfigError, count_of
from data_tools.shards.manifest import DatasetManifest
from models.loss_weights import FLOW_ONLY, NUM_CLUSTERS
from models.sampler import methods_for
from models.schedule import MIN_LINEAR_TIMESTEPS
from models.switch_dit import MODEL_SIZES
from models.timestep_sampling import MODE_SCALE_MAX, MODE_SCALE_MIN
from training.config.deepspeed_config import (
    MAX_STAGE,
    load_deepspeed_json,
    plan_batch,
    stage_of,
)
from training.config.learning_rate import check_schedule
from training.config.network import network_options
from training.config.tree import Config
from training.config.wording import either

# With fewer values a rank may hold none of a group, and its optimizer state does not load again.
MIN_EXPERT_VALUES_PER_RANK = 2


def validate(config: Config, deepspeed_path: Path, world_size: int) -> None:
    """Check a resolved configuration, its DeepSpeed file and a number of ranks.

    Raises:
        ConfigError: for the first thing that does not fit.
    """
    _check_model(config)
    _check_routing(config)
    _check_objective(config)
    _check_averages(config)
    check_schedule(config)
    deepspeed_json = load_deepspeed_json(deepspeed_path)
    if config.run.expert_parallel_size > 1:
        _check_expert_sizes(config, world_size)
        _check_expert_zero(config, deepspeed_json, deepspeed_path)
    _check_compiling(config, deepspeed_json, deepspeed_path)
    _check_intervals_and_streams(config)
    plan_batch(config, world_size)


def lacks_compiler(config: Config, device: torch.device) -> bool:
    """Tell whether torch.compile is wanted but would find no compiler for its C++ on the CPU."""
    return (
        config.model.compile_blocks and device.type == "cpu" and shutil.which(_compiler()) is None
    )


def check_compiler(config: Config, device: torch.device) -> None:
    """Refuse to compile blocks for a CPU without a C++ compiler."""
    if lacks_compiler(config, device):
        raise ConfigError(
            f"--compile-blocks needs a C++ compiler on the CPU and there is no {_compiler()}; "
            "install one, name another in the environment variable CXX, or use "
            "--no-compile-blocks."
        )


def _compiler() -> str:
    """Name the one that torch.compile calls."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


def _check_model(config: Config) -> None:
    model, diffusion = config.model, config.diffusion
    for flag, side in zip(("--latent-size", "--latent-width"), model.latent_shape[1:], strict=True):
        if side % model.patch_size:
            raise ConfigError(
                f"--patch-size {model.patch_size} does not divide {flag} {side}; use 2, 4 or 8 on "
                "a latent size that is a multiple of it."
            )
    if config.run.sample_steps > diffusion.num_timesteps:
        raise ConfigError(
            f"--sample-steps {config.run.sample_steps} is more than --num-timesteps "
            f"{diffusion.num_timesteps}; use at most that many."
        )
    methods = methods_for(diffusion.objective)
    if config.run.sample_method not in (None, *methods):
        raise ConfigError(
            f"--sample-method {config.run.sample_method} does not fit --objective "
            f"{diffusion.objective}; use {either(methods)}."
        )


def _check_routing(config: Config) -> None:
    model = config.model
    if model.top_k > model.num_experts:
        raise ConfigError(
            f"--top-k {model.top_k} is more than --num-experts {model.num_experts}; "
            f"use 1 to {model.num_experts}."
        )
    if model.expert_kind == "mlp" and model.expert_dispatch == "merged":
        raise ConfigError(
            "--expert-dispatch merged needs --expert-kind affine, since MLPs do not merge; use "
            "--expert-dispatch auto."
        )
    hidden_size = MODEL_SIZES[model.size].hidden_size
    if model.routing == "dtr" and hidden_size * model.dtr_beta < 1:
        raise ConfigError(
            f"--dtr-beta {model.dtr_beta} opens none of the {hidden_size} channels of --size "
            f"{model.size}; use at least {1 / hidden_size:.4f}."
        )


def _check_objective(config: Config) -> None:
    diffusion = config.diffusion
    weight, sampling = diffusion.loss_weight, diffusion.timestep_sampling
    if diffusion.objective == "flow" and diffusion.learned_variance:
        raise ConfigError(
            "--learned-variance does not go with --objective flow, whose sampling steps have no "
            "variance; use --no-learned-variance or another objective."
        )
    if weight in FLOW_ONLY and diffusion.objective != "flow":
        raise ConfigError(
            f"--loss-weight {weight} is defined for --objective flow, not "
            f"{diffusion.objective}; use constant, min_snr, p2 or uncertainty."
        )
    if weight == "uncertainty" and diffusion.num_timesteps < NUM_CLUSTERS:
        raise ConfigError(
            f"--loss-weight uncertainty needs at least {NUM_CLUSTERS} timesteps, one for each of "
            f"its clusters, not --num-timesteps {diffusion.num_timesteps}."
        )
    if (
        diffusion.objective != "flow"
        and diffusion.noise_schedule == "linear"
        and diffusion.num_timesteps < MIN_LINEAR_TIMESTEPS
    ):
        raise ConfigError(
            f"--num-timesteps {diffusion.num_timesteps} is too few for --noise-schedule linear, "
            f"whose last step would hold more than all noise; use {MIN_LINEAR_TIMESTEPS} or more, "
            "or cosine."
        )
    scale = diffusion.mode_scale
    if sampling == "mode" and not MODE_SCALE_MIN <= scale <= MODE_SCALE_MAX:
        raise ConfigError(
            f"--mode-scale {scale} is not between {MODE_SCALE_MIN:g} and {MODE_SCALE_MAX:.4f}, "
            "outside of which mode sampling is no density; choose one inside."
        )
    if sampling == "logit_normal" and not math.isfinite(diffusion.timestep_mean):
        raise ConfigError(f"--timestep-mean must be finite, not {diffusion.timestep_mean}.")


def _check_averages(config: Config) -> None:
    optim = config.optim
    if not (optim.ema_decays or optim.ema_stds):
        raise ConfigError(
            "--ema-decays and --ema-stds are both empty, but samples are drawn from an average; "
            "give one, e.g. --ema-decays 0.9999."
        )
    if optim.ema_snapshot_every and not optim.ema_stds:
        raise ConfigError(
            f"--ema-snapshot-every {optim.ema_snapshot_every} stores power-function averages, but "
            "--ema-stds names none; use --ema-stds 0.05,0.1 or --ema-snapshot-every 0."
        )


def _check_compiling(config: Config, deepspeed_json: dict[str, Any], deepspeed_path: Path) -> None:
    """Refuse to compile blocks whose weights ZeRO 3 fetches: torch compiles and then gives up."""
    if config.model.compile_blocks and stage_of(deepspeed_json) == MAX_STAGE:
        raise ConfigError(
            f"--compile-blocks: blocks do not compile at ZeRO stage {MAX_STAGE} of "
            f"--deepspeed {deepspeed_path}; use --no-compile-blocks, or ZeRO stage 0, 1 or 2."
        )


def _check_expert_sizes(config: Config, world_size: int) -> None:
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


def _check_expert_zero(config: Config, deepspeed_json: dict[str, Any], path: Path) -> None:
    """Refuse what DeepSpeed 0.19.8 takes, to train on wrong gradients or to stop in the middle."""
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


def _check_intervals_and_streams(config: Config) -> None:
    run, streams, batch = config.run, config.data.data_streams, config.optim.global_batch_size
    if run.rebalance_every and run.placement != "balanced":
        raise ConfigError(
            f"--rebalance-every {run.rebalance_every} needs --placement balanced, since "
            f"{run.placement} does not follow the gates; use --rebalance-every 0."
        )
    if run.rebalance_every % run.save_every:
        raise ConfigError(
            f"--rebalance-every {run.rebalance_every} is no multiple of --save-every "
            f"{run.save_every}, but experts move only right before a checkpoint; use "
            f"{-(-run.rebalance_every // run.save_every) * run.save_every}."
        )
    if batch % streams:
        raise ConfigError(
            f"--data-streams {streams} does not divide --global-batch-size {batch}; use a divisor "
            "of it, best a multiple of the number of nodes."
        )


def check_data(config: Config, manifest: DatasetManifest) -> None:
    """Refuse a data set that is not what the model takes."""
    model, where = config.model, f"--data {config.data.data}"
    holds = (manifest.latent_channels, manifest.latent_height, manifest.latent_width)
    takes = model.latent_shape
    if holds != takes:
        raise ConfigError(
            f"{where} holds latents of {_shape(holds)} (channels x height x width) but the model "
            f"takes {_shape(takes)}; set --latent-channels, --latent-size and, unless they are "
            "square, --latent-width, or encode the images at another size."
        )
    if manifest.num_classes > model.num_classes > 0:
        raise ConfigError(
            f"{where} has {count_of(manifest.num_classes, 'class')} but the model has "
            f"--num-classes {model.num_classes}; use --num-classes {manifest.num_classes}."
        )
    if model.num_classes > 0 and manifest.num_classes == 0:
        raise ConfigError(
            f"{where} has no classes but the model has --num-classes {model.num_classes}; use "
            "--num-classes 0 or encode a class-per-folder tree."
        )
    if config.data.horizontal_flip and not manifest.has_flip:
        raise ConfigError(
            f"{where} was encoded without mirrored images; use --no-horizontal-flip or encode "
            "with them."
        )


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in shape)
