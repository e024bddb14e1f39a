"""Build the DeepSpeed engine of a run: model, optimizer groups, ZeRO; set its learning rate."""

import os
from collections.abc import Callable, Iterable
from math import gcd
from typing import Any

import torch

from models.matrices import matrix_shapes
from models.switch_dit import SwitchDiT
from training.config.deepspeed_config import MAX_STAGE, stage_of
from training.config.network import network_options
from training.config.tree import Config, OptimConfig
from training.engine.average_profiles import profiles_of
from training.engine.compiling import with_compiling_decided
from training.engine.deepspeed_internals import (
    base_optimizer,
    import_muon_uncompiled,
    make_steps_lean,
    silence_memory_lines,
)
from training.engine.interface import Engine
from training.engine.matrix_updates import MatrixUpdates, mark_matrix
from training.engine.optimizer import IS_MATRIX, AgreeingEMAAdamW, EMAAdamW
from training.engine.zero_weights import set_full_value

DENSE_GROUP, MATRIX_GROUP = "dense", "matrices"
LR_FACTOR = "lr_factor"  # entry of a group: its learning rate over that of the others
WIRE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALIGNED_NUMBERS = 8  # in bf16, 16 bytes

# Lists a model's parameters, or some of them, each with this rank's share of its first value.
InitialValues = Callable[[torch.nn.Module], Iterable[tuple[torch.nn.Parameter, torch.Tensor]]]


def build_model(
    config: Config, *, expert_parallel_size: int = 1, shards_weights: bool = False
) -> SwitchDiT:
    """Build the network of a configuration, freshly initialised from its seed.

    Args:
        config: the run's configuration.
        expert_parallel_size: ranks that share the experts; 1 gives a model that needs no process
            group, whatever the configuration trains with.
        shards_weights: the model is for ZeRO 3.
    """
    torch.manual_seed(config.run.seed_of("init"))  # the same start on every rank
    return SwitchDiT(
        network_options(
            config, expert_parallel_size=expert_parallel_size, shards_weights=shards_weights
        )
    )


def in_packing_order(parameters: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """Order parameters so that ZeRO, which packs them end to end, leaves weights aligned.

    GPUs multiply matrices fast, and grouped ones at all, only at addresses that are multiples of 16
    bytes: 8 numbers in bf16. So parameters whose size is a multiple of 8 come first, which all
    matrices are, then those of 4, 2 and 1. Each then starts at a multiple of as much. Under ZeRO 3
    this matters where one rank holds whole parameters; parts are put together anew for each use.

    The order is part of what a checkpoint's flat tensors mean: a change needs a new
    `PARAMETER_ORDER` (training/checkpoints/manifest.py).
    """
    return sorted(parameters, key=lambda parameter: -gcd(parameter.numel(), ALIGNED_NUMBERS))


def choose_operators(is_deterministic: bool) -> None:
    """Let torch use operators that repeat bit for bit only, or any, from now on."""
    torch.use_deterministic_algorithms(is_deterministic)
    # Nothing here reads memory before it is written, so filling it would only take time.
    torch.utils.deterministic.fill_uninitialized_memory = False
    if is_deterministic:  # cuBLAS reads this when it multiplies for the first time
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def build_engine(
    config: Config,
    deepspeed_config: dict[str, Any],
    initial_values: InitialValues | None = None,
) -> Engine:
    """Wrap the model for training. All ranks must call this, after the process group exists.

    Args:
        config: the run's configuration.
        deepspeed_config: the resolved DeepSpeed JSON; it names no optimizer, because the averages
            of the weights are state of ours.
        initial_values: list the parameters that do not start freshly initialised.
    """
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    choose_operators(config.run.deterministic)
    import_muon_uncompiled()
    silence_memory_lines()
    stage = stage_of(deepspeed_config)
    config = with_compiling_decided(config, stage)
    model = build_model(
        config,
        expert_parallel_size=config.run.expert_parallel_size,
        shards_weights=stage == MAX_STAGE,
    )
    if initial_values is not None:
        with torch.no_grad():
            for parameter, value in initial_values(model):
                parameter.copy_(value)
    # ZeRO needs experts in groups of their own, named by DeepSpeed; without expert parallelism
    # this is one group.
    optim = config.optim
    groups = split_params_into_different_moe_groups_for_optimizer(_groups(model, optim))
    # ZeRO 3 packs all groups end to end. Experts that one rank holds whole must come before parts
    # of the rest, whose sizes depend on the number of ranks.
    groups.sort(key=lambda group: group["name"] in (MATRIX_GROUP, DENSE_GROUP))
    optimizer_class = AgreeingEMAAdamW if stage == 0 else EMAAdamW
    optimizer = optimizer_class(
        groups,
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        weight_decay=optim.weight_decay,
        fused=True,  # one pass over memory instead of a dozen
        profiles=profiles_of(optim),
        momentum=optim.muon_momentum,
    )
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config, dist_init_required=False
    )
    if optim.optimizer == "muon":
        optimizer.orthogonalise = MatrixUpdates(engine, WIRE_DTYPES[optim.muon_wire])
    if initial_values is not None and next(model.parameters()).dtype != torch.float32:
        # DeepSpeed has made the fp32 masters of weights that it had rounded to bf16 before.
        for parameter, value in initial_values(model):
            set_full_value(engine, parameter, None, value.float())
    make_steps_lean(engine)
    return engine


def _groups(model: SwitchDiT, optim: OptimConfig) -> list[dict[str, Any]]:
    """Put parameters into groups: matrices apart if Muon updates them."""
    named = dict(model.named_parameters())
    dense = {"params": in_packing_order(named.values()), "name": DENSE_GROUP, IS_MATRIX: False}
    if optim.optimizer != "muon":
        return [dense]
    shapes = matrix_shapes({name: tuple(param.shape) for name, param in named.items()})
    for name, shape in shapes.items():
        mark_matrix(named[name], shape)
    dense["params"] = in_packing_order(p for name, p in named.items() if name not in shapes)
    factor = 1.0 if optim.muon_lr is None else optim.muon_lr / optim.lr
    matrices = {"params": [named[name] for name in shapes], "name": MATRIX_GROUP}
    return [matrices | {IS_MATRIX: True, LR_FACTOR: factor}, dense]


def set_learning_rate(engine: Engine, lr: float) -> None:
    """Set the rate of all parameter groups for the next step."""
    for group in base_optimizer(engine).param_groups:
        group["lr"] = lr * group.get(LR_FACTOR, 1.0)
