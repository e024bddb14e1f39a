"""Closed forms of FLOPs and activations against torch's counter and what autograd keeps."""

from dataclasses import replace

import pytest
import torch

from benchmarks.measure import counted_flops, saved_bytes
from models.flops import forward_flops, training_flops
from models.network_options import NetworkOptions
from models.switch_dit import SwitchDiT
from training.cost.memory import activation_bytes

NUM_TIMESTEPS = 100

# E, k and what else differs from a small Switch-DiT.
NETWORKS = {
    "merged": (4, 2, {"expert_dispatch": "merged"}),
    "dispatched": (4, 3, {"expert_dispatch": "dispatched"}),
    "mlp": (3, 2, {"expert_kind": "mlp", "expert_hidden_ratio": 2.0}),
    "dtr": (1, 1, {"routing": "dtr"}),
    "dense": (1, 1, {"routing": "dense", "qk_norm": True}),
}


def network(name, size=16, width=64, depth=3, **changes):
    """A model and its options."""
    num_experts, top_k, options = NETWORKS[name]
    torch.manual_seed(0)
    options = NetworkOptions(
        input_size=(size, 2 * size),
        patch_size=2,
        in_channels=4,
        hidden_size=width,
        depth=depth,
        num_heads=4,
        num_classes=10,
        num_experts=num_experts,
        top_k=top_k,
        num_timesteps=NUM_TIMESTEPS,
        **options,
        **changes,
    )
    return SwitchDiT(options), options


def inputs(batch_size, size=16):
    x_t = torch.randn(batch_size, 4, size, 2 * size)
    t, y = torch.randint(0, NUM_TIMESTEPS, (batch_size,)), torch.randint(0, 10, (batch_size,))
    return x_t, t, y


@pytest.mark.parametrize("name", NETWORKS)
def test_flops_equal_those_of_the_counter(name):
    model, options = network(name)
    batch = inputs(5)

    def train():
        output = model(*batch)
        total = output.prediction.square().sum()
        if output.gate_table is not None:
            total = total + output.gate_table.square().sum()
        total.backward()

    forward = counted_flops(lambda: model(*batch))
    training = counted_flops(train)

    assert forward_flops(options, 5).total() == pytest.approx(forward, rel=0.01)
    assert training_flops(options, 5) == pytest.approx(training, rel=0.01)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_activations_are_what_autograd_keeps(name, precision):
    model, options = network(name, attention_kernel="fused")
    if precision == "bf16":
        model = model.bfloat16()
    batch = inputs(3)

    kept = saved_bytes(model, lambda: model(*batch))

    expected = activation_bytes(options, 3, precision=precision)
    assert expected.kept == pytest.approx(kept, rel=0.05)
    assert expected.recomputed == 0


def test_larger_networks_keep_as_much_as_computed():
    model, options = network("merged", size=32, width=96, depth=2)
    batch = inputs(2, size=32)

    kept = saved_bytes(model, lambda: model(*batch))

    assert activation_bytes(options, 2, precision="fp32").kept == pytest.approx(kept, rel=0.01)


def test_recomputing_keeps_the_inputs_of_blocks_and_then_one_block():
    model, options = network("merged", activation_checkpointing=True)
    batch = inputs(3)

    kept = saved_bytes(model, lambda: model(*batch))

    expected = activation_bytes(options, 3, precision="fp32")
    in_full = activation_bytes(
        replace(options, activation_checkpointing=False), 3, precision="fp32"
    )
    assert expected.kept == pytest.approx(kept, rel=0.05)
    assert in_full.kept - expected.kept < options.depth * expected.recomputed < in_full.kept


def test_batched_attention_keeps_the_weights_of_the_values():
    kept = {}
    for kernel in ("fused", "batched"):
        model, options = network("dense", attention_kernel=kernel)
        model = model.bfloat16()
        batch = inputs(3)
        kept[kernel] = saved_bytes(model, lambda model=model, batch=batch: model(*batch))

    T, H, D = options.num_tokens, options.num_heads, options.hidden_size
    weights, of_fused = 2 * H * T * T, T * (4 * H + 2 * D)  # a sum per token; a copy of the result
    assert kept["batched"] - kept["fused"] == 3 * options.depth * (weights - of_fused)


def test_autocast_keeps_norms_in_fp32_on_an_accelerator_and_less_on_a_cpu():
    model, options = network("merged", attention_kernel="fused")
    batch = inputs(3)

    def forward():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(*batch)

    kept = saved_bytes(model, forward)

    expected = activation_bytes(options, 3, precision="autocast").kept
    assert kept < expected < 1.25 * kept
