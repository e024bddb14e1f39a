"""Attention by batched products against float64, beside torch's kernel."""

import pytest
import torch
from torch import Tensor

from models import attention
from models.attention import KERNELS, attend, batching_is_faster
from models.layers import Attention
from tests.support.tiny_models import batch, tiny_model

# Of torch's kernel, in bf16. Without fp32 scores it would be 2 to 5 times, by their size.
WORST_ERROR = 1.5
CASES = {  # spread of the queries, mean of the values, T, d
    "scores as at the start": (0.3, 0.0, 64, 32),
    "scores of a few units": (1.0, 0.0, 256, 64),
    "scores of tens": (4.0, 0.0, 256, 64),
    "values with a mean": (1.0, 2.0, 256, 72),
    "one token": (1.0, 0.0, 1, 64),
    "an odd number of tokens": (1.0, 0.0, 37, 24),
}


def queries_keys_values(
    spread: float, mean: float, T: int, d: int, N: int = 2, H: int = 3
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(N, T, 3, H, d, generator=generator)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    return [x.bfloat16() for x in (q * spread, k, v + mean)]


def with_gradients(kernel: str, qkv: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Return the result and the gradients of queries, keys and values."""
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    result = attend(*leaves, kernel)
    result.backward(grad.to(result.dtype))
    return [result.detach(), *(x.grad for x in leaves)]


def error(found: Tensor, right: Tensor) -> float:
    return ((found.double() - right).norm() / right.norm()).item()


@pytest.mark.parametrize("case", CASES)
def test_result_and_gradients_are_as_exact_as_those_of_torchs_kernel(case):
    spread, mean, T, d = CASES[case]
    qkv = queries_keys_values(spread, mean, T, d)
    grad = (torch.randn(qkv[0].shape) + mean / 2).bfloat16()
    right = with_gradients("fused", [x.double() for x in qkv], grad.double())
    torchs = with_gradients("fused", qkv, grad)
    ours = with_gradients("batched", qkv, grad)
    for ours_found, torchs_found, exact in zip(ours, torchs, right, strict=True):
        if exact.norm() > 0:  # with one token, scores do not matter
            assert error(ours_found, exact) <= WORST_ERROR * error(torchs_found, exact) + 1e-12
        else:
            assert ours_found.norm() <= 1e-2


def test_no_digit_depends_on_how_the_scores_are_split(monkeypatch):
    T, d = 32, 16  # large enough for oneDNN: torch multiplies very small matrices otherwise
    qkv = queries_keys_values(1.0, 0.0, T, d)
    whole = with_gradients("batched", qkv, qkv[0])
    for heads in (1, 2):
        per_thread = heads * T * T // torch.get_num_threads()
        monkeypatch.setattr(attention, "SCORES_PER_THREAD", per_thread)
        split = with_gradients("batched", qkv, qkv[0])
        assert all(torch.equal(a, b) for a, b in zip(whole, split, strict=True))


def test_weights_are_kept_for_the_backward_pass_only():
    qkv = queries_keys_values(1.0, 0.0, 16, 8)
    with torch.no_grad():
        drawn = attend(*qkv, "batched")
    assert torch.equal(drawn, attend(*(x.requires_grad_() for x in qkv), "batched"))
    assert attention._batched(*qkv, True)[1].shape == (2, 3, 16, 16)
    assert attention._batched(*qkv, False)[1].numel() == 0


def test_the_operators_are_what_the_compiler_takes_them_for():
    qkv = [x.requires_grad_() for x in queries_keys_values(1.0, 0.0, 16, 8)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(attention._batched, (*qkv, True), test_utils=checks)
    with torch.no_grad():
        kept = attention._batched(*qkv, True)
        torch.library.opcheck(
            attention._batched_backward, (kept[0], *qkv, *kept), test_utils=checks
        )


@pytest.mark.parametrize("kernel", KERNELS)
def test_fp32_is_torchs_kernel_bit_for_bit(kernel):
    q, k, v = (x.float() for x in queries_keys_values(1.0, 0.0, 16, 8))
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.equal(attend(q, k, v, kernel), fused)


def test_auto_looks_at_the_kind_of_cpu_and_at_the_tokens(monkeypatch):
    for is_such_a_cpu, T, is_batched in ((True, 256, True), (True, 1024, False), (False, 9, False)):
        monkeypatch.setattr(attention, "MULTIPLIES_BF16_WITHOUT_TILES", is_such_a_cpu)
        assert batching_is_faster(T) is is_batched


def test_compiled_blocks_call_it_without_a_break():
    layer = Attention(24, 3, kernel="batched").bfloat16()
    x = torch.randn(2, 16, 24).bfloat16()
    plain = layer(x)
    layer.compile(backend="aot_eager", fullgraph=True)
    compiled = layer(x)
    assert torch.equal(compiled, plain)
    compiled.sum().backward()
    assert layer.qkv.weight.grad.norm() > 0


def test_autocast_and_the_precision_of_other_products_change_nothing():
    layer = Attention(24, 3, kernel="batched").bfloat16()
    x = torch.randn(2, 16, 24).bfloat16()
    plain = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), plain)
    precision = torch.backends.mkldnn.matmul.fp32_precision
    assert torch.equal(layer(x), plain)
    assert torch.backends.mkldnn.matmul.fp32_precision == precision
    try:
        torch.set_float32_matmul_precision("high")
        assert torch.equal(layer(x), plain)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"activation_checkpointing": True}])
def test_a_network_learns_alike_with_either_kernel(options):
    losses = {}
    for kernel in ("fused", "batched"):
        network = tiny_model(attention_kernel=kernel, **options).bfloat16()
        loss = network(*batch()).prediction.float().square().mean()
        loss.backward()
        losses[kernel] = [loss, *(p.grad.float().norm() for p in network.parameters())]
    for fused, batched in zip(*losses.values(), strict=True):
        torch.testing.assert_close(batched, fused, rtol=0.1, atol=1e-2)
