import functools

import pytest
import torch
from torch._dynamo.utils import counters

from models.network_options import NetworkOptions
from models.routing import ChannelRouter
from models.switch_dit import MODEL_SIZES, SwitchDiT
from tests.support import reference_routing
from tests.support.tiny_models import batch, loss_of, tiny_model, tiny_options

KINDS = {
    "dense": {"routing": "dense"},
    "dtr": {"routing": "dtr"},
    "affine": {"expert_dispatch": "merged"},
    "dispatched": {"expert_dispatch": "dispatched"},
    "mlp": {"expert_kind": "mlp"},
    "mlp, renormalised, every expert": {
        "expert_kind": "mlp",
        "expert_hidden_ratio": 0.5,
        "top_k": 4,
        "renormalize_gates": True,
    },
    "renormalised": {"renormalize_gates": True},
    "one expert": {"num_experts": 1, "top_k": 1},
}


@pytest.fixture(params=sorted(KINDS))
def options(request):
    return KINDS[request.param]


@pytest.mark.parametrize(
    ("size", "millions"), [("S", 33.0), ("B", 130.5), ("L", 458.1), ("XL", 675.1)]
)
def test_a_dense_model_has_the_parameters_of_dit(size, millions):
    shape = {"input_size": (32, 32), "patch_size": 2, "in_channels": 4, "num_classes": 1000}
    with torch.device("meta"):
        model = SwitchDiT(
            NetworkOptions(
                **shape, num_experts=3, top_k=2, routing="dense", **MODEL_SIZES[size]._asdict()
            )
        )

    count = sum(p.numel() for p in model.parameters()) + model.pos_embed.numel()  # DiT counts both
    assert count / 1e6 == pytest.approx(millions, abs=0.05)
    of_block = {
        f"blocks.0.{name}.{kind}"
        for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
        for kind in ("weight", "bias")
    }
    names = {name for name, _ in model.named_parameters()}
    assert {name for name in names if name.startswith("blocks.0.")} == of_block
    assert {name.split(".")[0] for name in names} == {
        "x_embedder",
        "t_embedder",
        "y_embedder",
        "blocks",
        "final_layer",
    }


@pytest.mark.parametrize("routing", ["dense", "dtr"])
def test_without_experts_there_are_no_gates_and_no_plan(routing):
    model = tiny_model(routing=routing)

    output = model(*batch())
    output.prediction.square().mean().backward()

    assert (model.num_experts, model.top_k) == (0, 0)
    assert output.gate_table is None and output.plan is None
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("num_timesteps", "width", "alpha", "beta"),
    [(1000, 16, 4.0, 0.8), (10, 24, 1.0, 0.5), (2, 12, 2.0, 0.1), (50, 8, 3.0, 1.0)],
)
def test_channel_masks_equal_the_loop(num_timesteps, width, alpha, beta):
    options = tiny_options(
        hidden_size=width, num_timesteps=num_timesteps, dtr_alpha=alpha, dtr_beta=beta
    )
    router = ChannelRouter(options)

    expected = reference_routing.channel_mask(num_timesteps, width, alpha, beta)

    assert torch.equal(router.mask_minus_one.double() + 1, torch.from_numpy(expected))


def test_masks_that_leave_all_channels_open_change_nothing():
    dense, open_masks = tiny_model(routing="dense"), tiny_model(routing="dtr", dtr_beta=1.0)
    masked = tiny_model(routing="dtr", dtr_beta=0.5)

    expected = dense(*batch()).prediction

    assert torch.equal(open_masks(*batch()).prediction, expected)
    assert not torch.allclose(masked(*batch()).prediction, expected)


def test_a_closed_channel_passes_by_the_block():
    torch.manual_seed(0)
    x, c = torch.randn(2, 3, 16), torch.randn(2, 16)
    model = tiny_model(routing="dtr", dtr_beta=0.5)
    t = torch.tensor([0, 49])
    mask = model.gate.route(model.t_embedder, t, x, model.blocks, None).per_block[0]

    block = model.blocks[0]
    inside = torch.where(mask == 0, x, 0.0)  # what the block sees
    change = block._dense(inside, c) - inside

    assert mask.eq(0).sum(-1).flatten().tolist() == [8, 8]
    torch.testing.assert_close(block(x, c, mask), x + change)


def test_samples_that_share_a_timestep_may_share_its_routing(options):
    model, (x_t, _, y) = tiny_model(**options), batch()

    for t in (0, 17, 49):
        repeated = model(x_t, torch.full((5,), t), y)
        shared = model(x_t, torch.tensor([t]), y)

        torch.testing.assert_close(shared.prediction, repeated.prediction)
        assert shared.gate_table is None
        if model.num_experts:
            index = shared.plan.expert_index
            assert torch.equal(index.expand(-1, 5, -1), repeated.plan.expert_index)


def test_a_single_sample_has_its_gate_table(options):
    output = tiny_model(**options)(*batch(num_samples=1))

    has_experts = "routing" not in options
    assert (output.gate_table is not None) == has_experts


def test_every_kind_of_experts_trains_every_parameter(options):
    model = tiny_model(**options)

    output = model(*batch())
    (loss_of(output) if model.num_experts else output.prediction.square().mean()).backward()

    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("dispatch", ["merged", "dispatched"])
def test_all_ways_to_multiply_give_equal_predictions_and_gradients(dispatch):
    expected, found = tiny_model(), tiny_model(expert_dispatch=dispatch)

    for model in (expected, found):
        loss_of(model(*batch())).backward()

    for (name, parameter), other in zip(
        expected.named_parameters(), found.parameters(), strict=True
    ):
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["affine", "mlp"])
def test_gates_are_computed_in_fp32_whatever_the_weights_are(kind):
    options = {"expert_kind": kind, "renormalize_gates": True, "top_k": 3}
    for dtype in (torch.bfloat16, torch.float16):
        rounded = tiny_model(**options).to(dtype)
        exact = tiny_model(**options)
        exact.load_state_dict(rounded.state_dict())

        found, expected = rounded(*batch()), exact(*batch())

        assert found.prediction.dtype == dtype
        assert torch.equal(found.gate_table, expected.gate_table)
        assert torch.equal(found.plan.expert_index, expected.plan.expert_index)
        assert torch.equal(found.plan.expert_weight, expected.plan.expert_weight)


def test_shared_out_experts_need_a_timestep_per_sample():
    model = tiny_model()
    model.blocks[0].mixture.group_rank_and_size = lambda: (0, 2)
    x_t, _, y = batch()

    with pytest.raises(AssertionError, match="repeat t"):
        model(x_t, torch.tensor([3]), y)


@pytest.mark.parametrize(
    ("options", "is_whole"),
    [
        ({"expert_dispatch": "merged", "qk_norm": True}, True),
        ({"routing": "dtr"}, True),
        ({"expert_kind": "mlp"}, False),  # in fp32 its loop stays outside
        ({"expert_dispatch": "merged", "activation_checkpointing": True}, True),
    ],
)
def test_compiled_blocks_compute_and_are_saved_as_they_are(monkeypatch, options, is_whole):
    # Everything but the generation of code, which takes half a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    counters.clear()
    plain, compiled = tiny_model(**options), tiny_model(**options, compile_blocks=True)

    for model in (plain, compiled):
        model(*batch()).prediction.square().mean().backward()

    assert list(compiled.state_dict()) == list(plain.state_dict())
    for (name, expected), found in zip(
        plain.named_parameters(), compiled.parameters(), strict=True
    ):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert bool(counters["graph_break"]) != is_whole
    if is_whole:
        assert counters["stats"]["unique_graphs"] == 1  # all blocks share it


def test_grouped_products_compile_without_graph_breaks():
    model = tiny_model(expert_kind="mlp").bfloat16()
    expected = model(*batch()).prediction

    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)

    torch.testing.assert_close(model(*batch()).prediction, expected)
