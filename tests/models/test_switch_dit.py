import copy

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from models.layers import Attention
from models.network_options import NetworkOptions
from models.switch_dit import MODEL_SIZES, SwitchDiT, SwitchDiTOutput
from tests.support.ranks import run_ranks
from tests.support.tiny_models import TINY, batch, loss_of, tiny_model


@pytest.mark.parametrize(
    ("size", "num_parameters"),
    [("S", 38_201_156), ("B", 151_604_804), ("L", 533_485_672), ("XL", 786_505_076)],
)
def test_parameter_counts_are_those_of_the_paper(size, num_parameters):
    with torch.device("meta"):
        model = SwitchDiT(
            NetworkOptions(
                input_size=(32, 32),
                patch_size=2,
                in_channels=4,
                num_classes=1000,
                num_experts=3,
                top_k=2,
                **MODEL_SIZES[size]._asdict(),
            )
        )

    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


def test_a_new_model_predicts_zero():
    torch.manual_seed(0)

    output = SwitchDiT(NetworkOptions(**TINY))(*batch())

    assert torch.equal(output.prediction, torch.zeros(5, 8, 4, 6))


def test_the_output_has_the_same_type_in_training_and_evaluation():
    model = tiny_model()

    for is_training in (True, False):
        output = model.train(is_training)(*batch())
        assert isinstance(output, SwitchDiTOutput)
        assert output.prediction.shape == (5, 8, 4, 6)
        assert output.gate_table.shape == (3, 50, 4)
        assert output.plan.expert_index.shape == (3, 5, 2)


def test_a_prediction_does_not_depend_on_the_other_samples():
    model, (x_t, t, y) = tiny_model(), batch()

    together = model(x_t, t, y).prediction
    alone = torch.cat([model(x_t[[i]], t[[i]], y[[i]]).prediction for i in range(5)])

    torch.testing.assert_close(together, alone)


def test_patches_come_back_to_their_place():
    model = SwitchDiT(NetworkOptions(**TINY))
    image = torch.arange(8 * 4 * 6.0).view(1, 8, 4, 6)
    patches = torch.stack(
        [
            image[0, :, row : row + 2, column : column + 2].permute(1, 2, 0).flatten()
            for row in range(0, 4, 2)
            for column in range(0, 6, 2)
        ]
    )

    assert torch.equal(model._unpatchify(patches[None]), image)


def test_every_parameter_gets_a_gradient():
    model = tiny_model()

    loss_of(model(*batch(num_samples=1))).backward()

    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == []


def test_activation_checkpointing_changes_nothing():
    plain, checkpointed = tiny_model(), tiny_model(activation_checkpointing=True)

    for model in (plain, checkpointed):
        loss_of(model(*batch())).backward()

    for (name, expected), found in zip(
        plain.named_parameters(), checkpointed.parameters(), strict=True
    ):
        assert torch.equal(found.grad, expected.grad), name


def test_bf16_weights_keep_the_routing_in_float32():
    model = tiny_model()
    rounded = copy.deepcopy(model).bfloat16()
    model.load_state_dict(rounded.state_dict())

    exact, output = model(*batch()), rounded(*batch())

    assert output.prediction.dtype == torch.bfloat16
    assert output.gate_table.dtype == output.plan.expert_weight.dtype == torch.float32
    assert torch.equal(output.gate_table, exact.gate_table)
    difference = (output.prediction.float() - exact.prediction).norm()
    assert difference < 0.02 * exact.prediction.norm()


def test_blocks_compile_without_graph_breaks():
    model = tiny_model(expert_dispatch="merged")
    expected = model(*batch())

    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)

    torch.testing.assert_close(model(*batch()).prediction, expected.prediction)


@pytest.mark.parametrize(
    ("channels", "patch_size", "input_size", "num_classes", "learned_variance"),
    [
        (4, 1, (4, 6), 1, True),
        (16, 2, (4, 6), 10_000, False),
        (32, 4, (8, 4), 10, True),
        (4, 8, (8, 24), 0, False),
    ],
)
def test_any_latents_and_any_classes(
    channels, patch_size, input_size, num_classes, learned_variance
):
    model = tiny_model(
        in_channels=channels,
        patch_size=patch_size,
        input_size=input_size,
        num_classes=num_classes,
        learned_variance=learned_variance,
    )
    x_t, t = torch.randn(3, channels, *input_size), torch.tensor([0, 7, 49])

    labelled = model(x_t, t, torch.full((3,), max(num_classes - 1, 0))).prediction
    without = model(x_t, t, torch.full((3,), num_classes)).prediction

    assert labelled.shape == (3, channels * (1 + learned_variance), *input_size)
    assert torch.equal(labelled, without) == (num_classes == 0)


def test_queries_and_keys_are_normalised_if_asked_for():
    names, plain = set(tiny_model(qk_norm=True).state_dict()), set(tiny_model().state_dict())
    assert names - plain == {f"blocks.{i}.attn.{q}_norm.weight" for i in range(3) for q in "qk"}

    torch.manual_seed(0)
    attention, x = Attention(16, 2, qk_norm=True), torch.randn(3, 5, 16)
    attention.q_norm.weight.data.uniform_()
    expected = attention(x)
    q, k, v = attention.qkv(x).view(3, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
    q, k = (y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    scores = ((q * attention.q_norm.weight) @ k.mT / 8**0.5).softmax(-1)

    by_hand = attention.proj((scores @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(by_hand, expected)
    attention.bfloat16()
    rounded = attention.q_norm(x.bfloat16().view(3, 5, 2, 8))
    assert rounded.dtype == torch.bfloat16


def test_learnt_weights_of_the_loss_come_out_of_the_forward_pass():
    output = tiny_model(has_loss_uncertainty=True)(*batch())

    assert output.loss_log_variance.shape == (50,)
    assert output.loss_log_variance.requires_grad
    assert tiny_model()(*batch()).loss_log_variance is None


def test_an_unconditional_model_has_the_null_class_only():
    model = tiny_model(num_classes=0)
    x_t, t, _ = batch()

    assert model.y_embedder.embedding_table.num_embeddings == 1
    assert model(x_t, t, torch.zeros_like(t)).prediction.shape == (5, 8, 4, 6)


def test_names_are_those_of_checkpoints():
    names = set(tiny_model().state_dict())

    expected = {
        "x_embedder.proj.weight",
        "t_embedder.mlp.2.bias",
        "y_embedder.embedding_table.weight",
        "gate.weight",
        "blocks.2.attn.qkv.weight",
        "blocks.2.mlp.fc2.bias",
        "blocks.2.adaLN_modulation.1.weight",
        "blocks.2.mixture.deepspeed_moe.experts.deepspeed_experts.3.weight",
        "final_layer.linear.bias",
    }
    assert expected <= names
    # DeepSpeed takes every other name that holds this word for a part of an expert.
    marker = ".deepspeed_moe.experts.deepspeed_experts."
    assert not [name for name in names if "expert" in name.replace(marker, "")]


def check_shared_out_models(rank, world_size):
    """Initial values, predictions and averaged gradients with experts shared out over ranks."""
    check_shared_out_model({"expert_dispatch": "merged"}, rank, world_size)
    check_shared_out_model({"expert_kind": "mlp", "renormalize_gates": True}, rank, world_size)


def check_shared_out_model(options, rank, world_size):
    shared_out = {"expert_parallel_size": world_size, "activation_checkpointing": True, **options}
    single, shared = tiny_model(**options), tiny_model(**shared_out)
    for module in shared.modules():
        if hasattr(module, "set_deepspeed_parallelism"):
            module.set_deepspeed_parallelism()
    held = slice(rank * 4 // world_size, (rank + 1) * 4 // world_size)

    def share(name, tensor):
        return tensor[held] if ".experts." in name else tensor

    torch.manual_seed(1)
    new = dict(SwitchDiT(NetworkOptions(**{**TINY, **options})).named_parameters())
    torch.manual_seed(1)
    for name, parameter in SwitchDiT(NetworkOptions(**{**TINY, **shared_out})).named_parameters():
        assert torch.equal(parameter, share(name, new[name])), name

    parameters = dict(shared.named_parameters())
    for name, parameter in single.named_parameters():
        parameters[name].data.copy_(share(name, parameter.data))
    x_t, t, y = batch(num_samples=3 * world_size)
    own = slice(3 * rank, 3 * rank + 3)

    expected, found = single(x_t, t, y), shared(x_t[own], t[own], y[own], group_t=t)
    loss_of(expected).backward()
    loss_of(found).backward()

    torch.testing.assert_close(found.prediction, expected.prediction[own])
    assert torch.equal(found.plan.expert_index, expected.plan.expert_index[:, own])
    for name, parameter in single.named_parameters():
        gradient = parameters[name].grad
        if ".experts." not in name:
            torch.distributed.all_reduce(gradient)
        torch.testing.assert_close(
            gradient / world_size, share(name, parameter.grad), rtol=1e-4, atol=1e-6, msg=name
        )


@pytest.mark.processes
def test_a_model_with_shared_out_experts_equals_one_process():
    run_ranks(check_shared_out_models, 2)


@pytest.mark.parametrize(
    ("options", "has_autocast"),
    [
        ({"expert_dispatch": "merged"}, False),
        ({"expert_dispatch": "dispatched"}, True),
        ({"expert_kind": "mlp"}, True),
    ],
)
def test_a_training_step_reads_no_value_of_a_tensor(options, has_autocast):
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_autocast)
    with FakeTensorMode(), autocast:  # its tensors have no values; reading one is an error
        x_t = torch.zeros(5, 4, 4, 6)
        t = y = torch.zeros(5, dtype=torch.int64)
        output = SwitchDiT(NetworkOptions(**TINY, **options))(x_t, t, y)
        loss_of(output).backward()
        with pytest.raises(DataDependentOutputException):
            output.prediction.sum().item()


@pytest.mark.gpu
def test_a_training_step_never_waits_for_the_device():
    model = tiny_model().cuda()
    x_t, t, y = (tensor.cuda() for tensor in batch())
    loss_of(model(x_t, t, y)).backward()

    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_of(model(x_t, t, y)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"patch_size": 1},
        {"input_size": (4, 4), "patch_size": 4},  # one token
        {"in_channels": 3, "learned_variance": False, "num_classes": 0},
        {"expert_dispatch": "merged", "renormalize_gates": True},
        {"expert_dispatch": "dispatched", "activation_checkpointing": True},
        {"expert_kind": "mlp"},
        {"routing": "dtr"},
        {"routing": "dense", "qk_norm": True, "has_loss_uncertainty": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_stream_and_its_gradients_are_contiguous(options, dtype, memory_format):
    """Else GPUs mix two layouts in every operation on it, and copy it for every norm."""
    model = tiny_model(**options).to(dtype)
    seen = []

    def look(_module, arguments, output=None):
        for tensor in (*arguments, output):
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 3 and tensor.shape[1] > 1:
                seen.append(tensor.is_contiguous())
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: seen.append(gradient.is_contiguous()))

    for block in model.blocks:
        block.register_forward_hook(look)
        block.norm1.register_forward_hook(look)
        block.norm2.register_forward_hook(look)
    model.final_layer.norm_final.register_forward_hook(look)
    x_t = torch.randn(5, model.options.in_channels, *model.options.input_size)
    output = model(
        x_t.to(memory_format=memory_format),
        torch.arange(5) * 9,
        torch.zeros(5, dtype=torch.long) + model.options.num_classes,
    )
    output.prediction.float().square().mean().backward()

    assert all(seen)
    assert bool(seen) == (model.options.num_tokens > 1)
