"""Attend within samples: torch's fused kernel, or on some CPUs batched products in bf16.

Torch's kernel for CPUs multiplies bf16 in small blocks, at a fraction of the rate of a product over
all heads. Three products over a few samples at a time, with a softmax between them, take half of
its time or less where the CPU has instructions for bf16 (benchmarks/attention.py). Scores and their
gradients are fp32 in both, and what is multiplied with values, queries and keys is rounded to bf16.

N batch, H heads, T tokens, d = D / H width of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KERNELS = ("auto", "fused", "batched")
# Scores that are worked on at a time, per thread: 1 MiB of fp32, which stay in a core's cache.
SCORES_PER_THREAD = 1 << 18
MOST_TOKENS = 512  # with more, torch's kernel was faster
# A constant: compiled blocks can read it. Where a CPU has tiles for products (AMX), torch's kernel
# uses them, and nothing was measured.
MULTIPLIES_BF16_WITHOUT_TILES = (
    torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
)


def attend(q: Tensor, k: Tensor, v: Tensor, kernel: str = "auto") -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v, (N, H, T, d).

    Args:
        q: queries (N, H, T, d); k: keys; v: values.
        kernel: "fused" is torch's; "batched" are products in bf16 on a CPU, and torch's kernel for
            anything else; "auto" is batched where it was found to be faster.
    """
    is_batched = kernel == "batched" or (kernel == "auto" and batching_is_faster(q.shape[2]))
    if not is_batched or q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v)
    return _batched(q, k, v, torch.is_grad_enabled())[0]


def batching_is_faster(num_tokens: int) -> bool:
    """Tell whether batched products were found to be faster for T tokens on CPUs like this one.

    The answer depends on nothing but T and the kind of CPU, so that a run that goes on computes as
    before.
    """
    return MULTIPLIES_BF16_WITHOUT_TILES and num_tokens <= MOST_TOKENS


# An operator, so that compiled blocks call it as it is: what it sets is not for the compiler.
@torch.library.custom_op("switch_dit::batched_attention", mutates_args=())
def _batched(q: Tensor, k: Tensor, v: Tensor, keeps_weights: bool) -> tuple[Tensor, Tensor]:
    """Return the result (N, H, T, d) and the weights of the values, both bf16.

    The weights are (N, H, T, T), or empty unless the backward pass will need them.
    """
    N, H, T, d = q.shape
    result, weights = _room_for_result(q), _room_for_weights(q, keeps_weights)
    for part in _batched_parts(N, H, T):
        P = _fp32_product(q[part], k[part], d**-0.5).softmax(-1).to(q.dtype)
        result[part] = P @ v[part]
        if keeps_weights:
            weights[part] = P
    return result, weights


@_batched.register_fake
def _batched_like(q: Tensor, k: Tensor, v: Tensor, keeps_weights: bool) -> tuple[Tensor, Tensor]:
    return _room_for_result(q), _room_for_weights(q, keeps_weights)


@torch.library.custom_op("switch_dit::batched_attention_backward", mutates_args=())
def _batched_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, result: Tensor, weights: Tensor
) -> Tensor:
    """Return the gradients of q, k and v as the parts of one tensor (N, T, 3, H, d)."""
    N, H, T, d = q.shape
    grads = _room_for_grads(q)
    grad_q, grad_k, grad_v = (g.transpose(1, 2) for g in grads.unbind(2))
    for part in _batched_parts(N, H, T):
        P, g = weights[part], grad[part]
        grad_v[part] = P.transpose(-2, -1) @ g
        # With dP = g v^T: dS = P * (dP - sum_j P dP), and that sum is g . result.
        mean = (g.float() * result[part]).sum(-1, keepdim=True).mul_(d**-0.5)
        grad_scores = _fp32_product(g, v[part], d**-0.5).sub_(mean).mul_(P).to(q.dtype)
        grad_q[part] = grad_scores @ k[part]
        grad_k[part] = grad_scores.transpose(-2, -1) @ q[part]
    return grads


@_batched_backward.register_fake
def _batched_backward_like(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, result: Tensor, weights: Tensor
) -> Tensor:
    return _room_for_grads(q)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:3], *output)


def _differentiate_batched(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = _batched_backward(grad, *ctx.saved_tensors)
    return *(g.transpose(1, 2) for g in grads.unbind(2)), None


_batched.register_autograd(_differentiate_batched, setup_context=_keep_for_backward)


def _room_for_result(q: Tensor) -> Tensor:
    """Make room for (N, H, T, d), of which (N, T, H d) is a view."""
    N, H, T, d = q.shape
    return q.new_empty(N, T, H, d).transpose(1, 2)


def _room_for_weights(q: Tensor, is_kept: bool) -> Tensor:
    N, H, T, _ = q.shape
    return q.new_empty(N if is_kept else 0, H, T, T)


def _room_for_grads(q: Tensor) -> Tensor:
    """Make room for the gradients of queries, keys and values, in the layout of their layer."""
    N, H, T, d = q.shape
    return q.new_empty(N, T, 3, H, d)


def _batched_parts(N: int, H: int, T: int) -> list[tuple[slice, slice]]:
    """Split samples, or heads where one sample is too large, so that scores stay in the caches."""
    heads = max(1, torch.get_num_threads() * SCORES_PER_THREAD // (T * T))
    samples = max(1, heads // H)
    return [
        (slice(n, n + samples), slice(h, h + heads))
        for n in range(0, N, samples)
        for h in range(0, H, heads)
    ]


def _fp32_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return scale * a b^T, (n, H, T, T) fp32, of bf16 a and b: no digit of the sums is lost."""
    n, H, T, d = a.shape
    a, b = (x.float().contiguous().view(n * H, T, d) for x in (a, b))
    out = a.new_empty(n * H, T, T)
    with _fp32_factors_are_bf16():
        # beta 0: what is in `out` is not read
        torch.baddbmm(out, a, b.transpose(1, 2), beta=0, alpha=scale, out=out)
    return out.view(n, H, T, T)


@contextmanager
def _fp32_factors_are_bf16() -> Iterator[None]:
    """Let oneDNN take fp32 factors for bf16 ones; sums stay fp32. It may ignore this."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
