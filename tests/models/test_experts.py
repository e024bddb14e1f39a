import copy
import math
from types import SimpleNamespace

import pytest
import torch

from models.experts import AffineExperts, MlpExperts, _grouped_or_loop
from models.gate import ExpertProduct, build_plan
from models.moe import make_experts
from tests.support import reference_routing
from tests.support.tiny_models import tiny_options

MERGED, GROUPED, LOOP = ExpertProduct.MERGED, ExpertProduct.GROUPED, ExpertProduct.LOOP
ORACLE = {AffineExperts: reference_routing.affine_expert, MlpExperts: reference_routing.mlp_expert}
WIDTH, NUM_EXPERTS = 6, 5
GROUPED_MM = torch.nn.functional.grouped_mm


def random_experts(kind, width=WIDTH, num_experts=NUM_EXPERTS):
    """Experts whose parameters are all random, so that nothing is hidden by zeros."""
    generator = torch.Generator().manual_seed(0)
    options = tiny_options(
        hidden_size=width, num_experts=num_experts, expert_kind=kind, expert_hidden_ratio=1.4
    )
    experts = make_experts(options).double()
    for parameter in experts.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return experts


def random_batch(width=WIDTH, num_experts=NUM_EXPERTS, num_samples=4, num_tokens=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_samples, num_tokens, width, generator=generator).double()
    probs = torch.randn(num_samples, num_experts, generator=generator).double().softmax(-1)
    return x.requires_grad_(), probs.requires_grad_()


def route(probs, top_k, product, renormalize=False):
    """The plan of one block, for samples whose gate values are `probs` (N, E)."""
    t = torch.arange(len(probs))
    plan = build_plan(probs[None], t, top_k, renormalize=renormalize, product=product)
    return plan.blocks()[0]


def apply(experts, x, plan):
    return experts(x, plan.expert_weight, plan.rows)


def gradients(output, tensors):
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(output.shape, generator=generator).to(output)
    return torch.autograd.grad((output * target).sum(), tensors)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize(("kind", "product"), [("affine", MERGED), ("affine", LOOP), ("mlp", LOOP)])
def test_experts_equal_the_loop_in_outputs_and_gradients(kind, product, top_k, renormalize):
    experts, (x, probs) = random_experts(kind), random_batch()
    parameters = list(experts.parameters())

    found = apply(experts, x, route(probs, top_k, product, renormalize))
    expected = reference_routing.mixture_of(
        ORACLE[type(experts)], x, probs, parameters, top_k, renormalize
    )

    torch.testing.assert_close(found, expected)
    tensors = [x, probs, *parameters]
    torch.testing.assert_close(gradients(found, tensors), gradients(expected, tensors))


@pytest.mark.parametrize("kind", ["affine", "mlp"])
@pytest.mark.parametrize("num_samples", [1, 9])
def test_the_grouped_product_equals_the_loop(kind, num_samples):
    experts = random_experts(kind, width=8).bfloat16()
    if kind == "mlp":
        experts = MlpExperts(8, NUM_EXPERTS, 16).bfloat16()
        for parameter in experts.parameters():
            parameter.data.normal_(std=0.3)
    x, probs = random_batch(width=8, num_samples=num_samples)
    x = x.detach().bfloat16().requires_grad_()
    tensors = [x, probs, *experts.parameters()]

    assert experts.choose_product(num_tokens=3, top_k=2) is GROUPED
    grouped = apply(experts, x, route(probs, 2, GROUPED))
    looped = apply(experts, x, route(probs, 2, LOOP))

    torch.testing.assert_close(grouped, looped, rtol=0.02, atol=0.02)
    found, expected = gradients(grouped, tensors), gradients(looped, tensors)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("kind", "product"),
    [("affine", MERGED), ("affine", LOOP), ("affine", GROUPED), ("mlp", LOOP), ("mlp", GROUPED)],
)
def test_an_idle_expert_gets_a_zero_gradient(kind, product):
    dtype = torch.bfloat16 if product is GROUPED else torch.float64
    experts = random_experts(kind, width=40).to(dtype)  # 40 and 56 suit the grouped product
    x = torch.ones(3, 2, 40, dtype=dtype)
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.0, 0.1]]).expand(3, -1)

    apply(experts, x, route(probs, 4, product)).sum().backward()

    for parameter in experts.parameters():
        is_zero = parameter.grad.flatten(1).eq(0).all(dim=1)
        assert is_zero.tolist() == [False, False, False, True, False]


@pytest.mark.parametrize(
    ("kind", "product"),
    [("affine", MERGED), ("affine", LOOP), ("affine", GROUPED), ("mlp", LOOP), ("mlp", GROUPED)],
)
def test_a_rank_without_samples_still_gives_every_expert_a_gradient(kind, product):
    experts = random_experts(kind)
    x = torch.zeros(0, 3, WIDTH).double()

    output = apply(experts, x, route(torch.zeros(0, NUM_EXPERTS).double(), 2, product))
    output.sum().backward()

    assert output.shape == (0, 3, WIDTH)
    for parameter in experts.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


@pytest.mark.parametrize("kind", ["affine", "mlp"])
def test_shared_gate_values_equal_those_values_repeated(kind):
    experts, (x, probs) = random_experts(kind), random_batch()
    product = experts.choose_product(num_tokens=3, top_k=2, is_shared=True)
    tensors = [x, probs, *experts.parameters()]

    shared = apply(experts, x, route(probs[:1], 2, product))
    repeated = apply(experts, x, route(probs[:1].expand(4, -1), 2, LOOP))

    torch.testing.assert_close(shared, repeated)
    torch.testing.assert_close(gradients(shared, tensors), gradients(repeated, tensors))


def test_merged_experts_are_accurate_in_float32():
    experts, (x, probs) = random_experts("affine"), random_batch()
    exact = apply(experts, x, route(probs, 2, LOOP))

    merged = apply(experts.float(), x.float(), route(probs.float(), 2, MERGED))

    torch.testing.assert_close(merged.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("product", [MERGED, LOOP])
def test_one_expert_equals_a_dense_layer(product):
    experts, (x, _) = random_experts("affine", num_experts=1), random_batch()

    output = apply(experts, x, route(torch.ones(4, 1).double(), 1, product))

    dense = torch.nn.functional.linear(x, experts.weight[0].T, experts.bias[0])
    torch.testing.assert_close(output, dense)


@pytest.mark.parametrize(("kind", "product"), [("affine", MERGED), ("affine", LOOP), ("mlp", LOOP)])
def test_autocast_multiplies_in_bf16_and_leaves_gradients_in_fp32(kind, product):
    experts, (x, probs) = random_experts(kind).float(), random_batch()
    exact = apply(experts, x.float(), route(probs, 2, product))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = apply(experts, x.float(), route(probs, 2, product))
    output.sum().backward()

    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), exact, rtol=0.05, atol=0.05)
    assert all(p.grad.dtype == torch.float32 for p in experts.parameters())


def test_few_tokens_are_dispatched_and_many_are_merged():
    def choice(num_tokens, top_k, dispatch="auto", num_experts=3):
        experts = AffineExperts(8, num_experts, dispatch)
        return experts.choose_product(num_tokens, top_k)

    assert choice(256, top_k=2) is MERGED
    assert choice(16, top_k=2) is choice(256, top_k=1) is LOOP
    assert choice(16, top_k=2, dispatch="merged") is MERGED
    assert choice(256, top_k=2, dispatch="dispatched") is LOOP
    assert choice(256, top_k=2, num_experts=1) is LOOP  # as in one expert per rank


def test_an_accelerator_is_never_waited_for_by_choice_of_auto():
    with torch.device("meta"):
        experts = AffineExperts(128, 3)

    assert experts.choose_product(num_tokens=16, top_k=2) is MERGED
    assert experts.bfloat16().choose_product(num_tokens=16, top_k=2) is GROUPED


def test_a_gpu_merges_by_bytes_and_width():
    def choice(num_tokens, top_k, width=1152, num_experts=3):
        with torch.device("meta"):  # any but a CPU
            experts = AffineExperts(width, num_experts).bfloat16()
        return experts.choose_product(num_tokens, top_k)

    assert choice(256, top_k=2) is choice(256, top_k=1) is choice(1024, top_k=2) is MERGED
    assert choice(64, top_k=2) is choice(16, top_k=2) is GROUPED
    assert choice(64, top_k=2, width=384) is MERGED
    assert choice(64, top_k=2, num_experts=16) is GROUPED


@pytest.mark.parametrize(
    ("capability", "product"),
    [((8, 0), LOOP), ((9, 0), GROUPED), ((10, 3), GROUPED), ((12, 0), LOOP)],
)
def test_a_gpu_groups_where_torch_has_one_kernel(monkeypatch, capability, product):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    weight = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)

    assert _grouped_or_loop(weight, 1152) is product


class _Rough(torch.autograd.Function):
    """A grouped product as on GPUs: particular about addresses, careless of starved experts."""

    @staticmethod
    def forward(ctx, samples, weight, ends):
        assert weight.data_ptr() % 16 == 0, "expected data_ptr to be aligned to 16 bytes"
        ctx.save_for_backward(samples, weight, ends)
        return GROUPED_MM(samples, weight, offs=ends)

    @staticmethod
    def backward(ctx, gradient):
        samples, weight, ends = ctx.saved_tensors
        samples, weight = (part.detach().requires_grad_() for part in (samples, weight))
        with torch.enable_grad():
            output = GROUPED_MM(samples, weight, offs=ends)
        of_samples, of_weight = torch.autograd.grad(output, (samples, weight), gradient)
        of_weight[ends.diff(prepend=torch.zeros_like(ends[:1])) == 0] = math.nan
        return of_samples, of_weight, None


@pytest.mark.parametrize("kind", ["affine", "mlp"])
@pytest.mark.parametrize("starved", [0, 3, NUM_EXPERTS - 1])
def test_a_rough_grouped_product_does_no_harm(monkeypatch, kind, starved):
    experts = random_experts(kind, width=40).bfloat16()
    for parameter in experts.parameters():  # at an odd address, as ZeRO may pack it
        packed = torch.empty(parameter.numel() + 1, dtype=torch.bfloat16)
        parameter.data = packed[1:].view_as(parameter).copy_(parameter.data)
        assert parameter.data_ptr() % 16
    x, probs = random_batch(width=40)
    x = x.detach().bfloat16().requires_grad_()
    probs = probs.detach().index_fill(1, torch.tensor(starved), 0.0).requires_grad_()
    tensors = [x, probs, *experts.parameters()]
    smooth = apply(experts, x, route(probs, NUM_EXPERTS - 1, GROUPED))
    expected = gradients(smooth, tensors)

    monkeypatch.setattr(
        torch.nn.functional, "grouped_mm", lambda x, w, offs: _Rough.apply(x, w, offs)
    )
    rough = apply(experts, x, route(probs, NUM_EXPERTS - 1, GROUPED))

    assert torch.equal(rough, smooth)
    for found, wanted in zip(gradients(rough, tensors), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("parallel_size", [2, 3, 6])
def test_shared_out_mlp_experts_start_as_on_one_rank(parallel_size):
    def drawn(size, group_rank):
        torch.manual_seed(3)
        options = tiny_options(
            hidden_size=WIDTH, num_experts=6, expert_kind="mlp", expert_parallel_size=size
        )
        experts = make_experts(options, group_rank)
        return experts.fc1_weight, torch.randn(1)

    whole, next_draw = drawn(1, 0)
    parts = [drawn(parallel_size, rank) for rank in range(parallel_size)]

    assert torch.equal(torch.cat([weight for weight, _ in parts]), whole)
    assert all(torch.equal(draw, next_draw) for _, draw in parts)
    assert len({weight[0, 0].item() for weight in whole}) == 6


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("affine", ["weight", "bias"]),
        ("mlp", ["fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"]),
    ],
)
def test_state_dict_names_experts_one_by_one(kind, names):
    experts = random_experts(kind)

    state = experts.state_dict()

    expected = {f"deepspeed_experts.{i}.{name}" for i in range(NUM_EXPERTS) for name in names}
    assert set(state) == expected
    stacked = experts.get_parameter(names[0])
    assert torch.equal(state[f"deepspeed_experts.1.{names[0]}"], stacked[1])


@pytest.mark.parametrize("kind", ["affine", "mlp"])
@pytest.mark.parametrize("is_stacked", [True, False])
def test_both_forms_of_names_are_loaded(kind, is_stacked):
    source = random_experts(kind)
    target = copy.deepcopy(source)
    for parameter in target.parameters():
        parameter.data.zero_()
    state = dict(source.named_parameters()) if is_stacked else source.state_dict()

    target.load_state_dict(state)

    for name, parameter in target.named_parameters():
        assert torch.equal(parameter, source.get_parameter(name))


def test_a_missing_expert_is_reported_by_name():
    state = random_experts("affine").state_dict()
    del state["deepspeed_experts.1.weight"]

    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight"'):
        random_experts("affine").load_state_dict(state)
