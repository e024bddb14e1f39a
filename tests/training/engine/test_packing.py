"""How ZeRO packs parameters: addresses for fast products; checkpoints of other orders."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from models.switch_dit import MODEL_SIZES, ModelSize
from tests.support.configs import small
from tests.support.ranks import run_ranks
from training.checkpoints.checkpointer import Checkpointer
from training.checkpoints.manifest import (
    MANIFEST,
    PARAMETER_ORDER,
    CheckpointManifest,
    Layout,
    TrainState,
    read_manifest,
)
from training.config.deepspeed_config import merge_deepspeed
from training.engine import build
from training.engine.deepspeed_internals import base_optimizer
from training.engine.expert_placement import ExpertPlacement
from training.engine.zero_weights import consolidated_weights

ALIGNMENT = 16  # bytes
DEPTH, WIDTH = 3, 64

NETWORKS = {
    "affine": {"num_experts": 3},
    "dispatched": {"num_experts": 5, "expert_dispatch": "dispatched", "qk_norm": True},
    "mlp": {"num_experts": 3, "expert_kind": "mlp", "expert_hidden_ratio": 0.5},
    "mlp of odd width": {"num_experts": 3, "expert_kind": "mlp", "expert_hidden_ratio": 0.4},
    "odd output": {"latent_channels": 3, "patch_size": 1, "learned_variance": False},
    "unconditional": {"num_classes": 0, "loss_weight": "uncertainty"},
    "muon": {"num_experts": 3, "optimizer": "muon"},
    "dtr": {"routing": "dtr", "patch_size": 1, "latent_channels": 1},
    "dense": {"routing": "dense", "patch_size": 1, "latent_channels": 3},
}
SHARED_OUT = {
    "affine": {"num_experts": 6},
    "muon": {"num_experts": 6, "optimizer": "muon", "gradient_clipping": 0.0},
    "mlp of odd width": {
        **{"num_experts": 6, "expert_kind": "mlp", "expert_hidden_ratio": 0.4},
        **{"gradient_clipping": 0.0},
    },
}


def configured(**values):
    values = {"patch_size": 8, "latent_size": 8, "global_batch_size": 4, **values}
    return small(**values)


def engine_of(config, world_size, folder, stage, is_reduced):
    MODEL_SIZES["demo"] = ModelSize(DEPTH, WIDTH, num_heads=4)  # quicker
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    path = folder / f"{torch.distributed.get_rank()}.json"
    path.write_text(json.dumps({"zero_optimization": zero, "bf16": {"enabled": is_reduced}}))
    return build.build_engine(config, merge_deepspeed(path, config, world_size))


def train_step(engine, rank, world_size):
    options = engine.module.options
    x = torch.full((4 // world_size, options.in_channels, *options.input_size), 1.0 + rank)
    group_t = torch.arange(4) * 200 + engine.global_steps
    t = group_t.view(world_size, -1)[rank]
    size = options.expert_parallel_size
    group_t = group_t.view(world_size // size, -1)[rank // size]
    output = engine(x, t, torch.zeros_like(t), group_t)
    loss = (output.prediction.float() - 1).square().mean()
    if output.loss_log_variance is not None:
        loss = loss + output.loss_log_variance.mean()
    engine.backward(loss)
    engine.step()
    return float(loss)


def addresses_in_use(engine, rank, world_size):
    """Return every parameter, with its address while the module that has it runs."""
    found = {}

    def look(module, *_):
        for parameter in module.parameters(recurse=False):
            if parameter.numel() > 0:
                found[id(parameter)] = parameter.data_ptr()

    for module in engine.module.modules():
        module.register_forward_pre_hook(look)
    train_step(engine, rank, world_size)
    # Some modules are not called but asked for their parameters.
    for parameter in engine.module.parameters():
        if parameter.numel() > 0:
            found.setdefault(id(parameter), parameter.data_ptr())
    return found


def check_addresses(rank, world_size, folder, networks, common):
    for stage in range(4):
        misaligned = 0
        for network, values in networks.items():
            config = configured(**values, **common)
            engine = engine_of(config, world_size, folder, stage, is_reduced=stage > 0)
            addresses = addresses_in_use(engine, rank, world_size)
            missing = []
            for name, parameter in engine.module.named_parameters():
                shape = getattr(parameter, "ds_shape", parameter.shape)
                place = f"{name} {tuple(shape)} of {network}, ZeRO {stage}"
                if (address := addresses.get(id(parameter))) is None:
                    missing.append(name)
                elif shape.numel() % 8 == 0:
                    assert address % ALIGNMENT == 0, place
                else:
                    assert len(shape) == 1 or "bias" in name, f"{place} is multiplied"
                    misaligned += address % ALIGNMENT != 0
            assert not missing, (network, stage, missing)
        if stage in (1, 2):
            assert misaligned, "the premise: some sizes are no multiple of 16 bytes"


@pytest.mark.processes
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_weight_begins_at_a_multiple_of_16_bytes(tmp_path, world_size):
    run_ranks(check_addresses, world_size, tmp_path, NETWORKS, {})


@pytest.mark.processes
@pytest.mark.parametrize("world_size", [2, 4])
def test_so_do_weights_of_experts_that_are_shared_out(tmp_path, world_size):
    common = {"expert_parallel_size": 2}
    run_ranks(check_addresses, world_size, tmp_path, SHARED_OUT, common)


def checkpointer(engine, config, layout, staging):
    stateless = {"state": dict, "load_state": lambda _: None, "use_slots": lambda _: None}
    objective = SimpleNamespace(**stateless)
    placement = ExpertPlacement(config, engine, objective)
    staging.mkdir(parents=True, exist_ok=True)
    return Checkpointer(engine, config.run, layout, "0" * 64, objective, placement, staging)


def state_of(engine):
    keys = (None, "exp_avg", "exp_avg_sq", *base_optimizer(engine).profiles)
    return [consolidated_weights(engine, key) for key in keys]


def check_old_orders(rank, world_size, folder, layouts):
    for number, (stage, size, is_reduced) in enumerate(layouts):
        values = {"num_experts": 3 * size, "expert_kind": "mlp", "expert_hidden_ratio": 0.4}
        config = configured(**values, gradient_clipping=0.0, expert_parallel_size=size)
        precision = "bf16" if is_reduced else "fp32"
        layout = Layout(world_size, size, stage, precision)
        staging = folder / str(number) / "staging"

        in_packing_order, build.in_packing_order = build.in_packing_order, list
        old = engine_of(config, world_size, folder, stage, is_reduced)
        build.in_packing_order = in_packing_order
        for _ in range(4):
            train_step(old, rank, world_size)
        saver = checkpointer(old, config, layout, staging)
        saver.begin(TrainState(4))
        assert saver.finish().problem is None
        manifest = read_manifest(staging.parent / "step-0000004")
        assert manifest.layout.parameter_order == 1

        new = engine_of(config, world_size, folder, stage, is_reduced)
        layout = dataclasses.replace(layout, parameter_order=PARAMETER_ORDER)
        checkpointer(new, config, layout, staging).load(staging.parent / manifest.tag, manifest)

        for stored, loaded in zip(state_of(old), state_of(new), strict=True):
            for name, value in stored.items():
                assert torch.equal(loaded[name], value), (name, stage)
        for _ in range(2):
            losses = [train_step(engine, rank, world_size) for engine in (old, new)]
            assert losses[0] == losses[1], stage
        for stored, loaded in zip(state_of(old), state_of(new), strict=True):
            for name, value in stored.items():
                torch.testing.assert_close(loaded[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("world_size", "layouts"),
    [
        (1, [(0, 1, False), (1, 1, True), (2, 1, True), (3, 1, True)]),
        (2, [(0, 2, False), (1, 1, True), (2, 2, True), (3, 2, False)]),
    ],
)
def test_a_checkpoint_in_the_order_of_the_modules_goes_on_as_it_would_have(
    tmp_path, world_size, layouts
):
    run_ranks(check_old_orders, world_size, tmp_path, layouts)


def test_a_checkpoint_of_this_order_is_refused_by_programs_that_know_the_other_only():
    for order, number in ((1, 1), (PARAMETER_ORDER, 2)):
        layout = Layout(1, 1, 2, "bf16", order)
        manifest = CheckpointManifest("step-0000001", TrainState(1), layout, "", 1, {})
        assert json.loads(MANIFEST.dumps(manifest))["format_version"] == number
