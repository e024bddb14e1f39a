"""Memory in closed form against what DeepSpeed allocates on two ranks."""

import dataclasses
import gc
import os
from pathlib import Path

import pytest
import torch

from tests.support.ranks import run_ranks
from training.config.deepspeed_config import merge_deepspeed
from training.config.precision import Hardware
from training.config.preset import load_preset
from training.cost.closed_forms import count_parameters, num_averages
from training.cost.memory import model_memory

ROOT = Path(__file__).resolve().parents[3]
WORLD_SIZE = 2
# Stage, bf16 weights, expert-parallel size, optimizer.
# ZeRO 3 comes last: it replaces torch's linear layer.
LAYOUTS = [
    (0, False, 1, "adamw"),
    (0, False, 2, "muon"),
    (1, False, 1, "adamw"),
    (1, True, 1, "adamw"),
    (2, False, 2, "adamw"),
    (2, True, 1, "muon"),
    (3, True, 1, "adamw"),
    (3, False, 2, "muon"),
]
SMALL = 1000  # elements of DeepSpeed's buckets, which are no part of the closed form


def configuration(expert_parallel_size, optimizer):
    config = load_preset(str(ROOT / "tests/small.yaml"))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_experts=4),
        optim=dataclasses.replace(
            config.optim,
            optimizer=optimizer,
            global_batch_size=2 * WORLD_SIZE,
            micro_batch_size=1,
            ema_decays=(0.9, 0.99),
            ema_stds=(0.1,),
        ),
        run=dataclasses.replace(config.run, expert_parallel_size=expert_parallel_size),
    )


def deepspeed_configuration(config, stage, has_bf16):
    path = ROOT / f"ds_configs/zero{stage}.json"
    merged = merge_deepspeed(path, config, WORLD_SIZE, Hardware("these ranks", has_bf16))
    if stage > 0:
        buckets = {"reduce_bucket_size": SMALL, "allgather_bucket_size": SMALL}
        merged["zero_optimization"].update(buckets, overlap_comm=False)
    if stage == 3:
        merged["zero_optimization"].update(
            stage3_param_persistence_threshold=0,
            stage3_prefetch_bucket_size=SMALL,
            stage3_max_live_parameters=SMALL,
            stage3_max_reuse_distance=0,
        )
    return merged


def storages():
    """Every storage that a tensor of this process refers to: address and bytes."""
    gc.collect()
    # Not isinstance, which wakes deprecated modules that answer for their class.
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    kept = (t.untyped_storage() for t in tensors if t.device.type == "cpu")
    return {s.data_ptr(): s.nbytes() for s in kept if s.data_ptr()}


def train_micro_steps(engine, count):
    dtype = next(engine.module.parameters()).dtype
    group_t = torch.tensor([5] * WORLD_SIZE)
    for i in range(count):
        output = engine(
            torch.zeros(1, 4, 16, 16, dtype=dtype), group_t[:1], torch.tensor([1]), group_t
        )
        engine.backward(output.prediction.float().square().mean() + output.gate_table.mean())
        del output
        if i < count - 1:
            engine.step()


def compare_with_engines(_rank, world_size):
    os.chdir(ROOT)
    from training.engine.build import build_engine

    for stage, has_bf16, expert_parallel_size, optimizer in LAYOUTS:
        config = configuration(expert_parallel_size, optimizer)
        count = count_parameters(config)
        expected = model_memory(
            count.total,
            count.experts,
            stage=stage,
            precision="bf16" if has_bf16 else "fp32",
            world_size=world_size,
            expert_parallel_size=expert_parallel_size,
            num_averages=num_averages(config),
            num_in_matrices=count.matrices if optimizer == "muon" else 0,
            num_in_expert_matrices=count.expert_matrices if optimizer == "muon" else 0,
        )
        before = storages()
        engine = build_engine(config, deepspeed_configuration(config, stage, has_bf16))
        train_micro_steps(engine, 3)  # into the second step, so that all states exist

        now = storages()
        found = sum(size for address, size in now.items() if before.get(address) != size)
        assert found == pytest.approx(sum(expected), rel=0.03), (stage, has_bf16, expected)
        engine.destroy()
        del engine


@pytest.mark.processes
def test_weights_gradients_and_optimizer_take_what_the_closed_form_says():
    run_ranks(compare_with_engines, WORLD_SIZE)
