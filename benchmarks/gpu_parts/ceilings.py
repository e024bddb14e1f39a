"""Measure what the machine can do, and what XL/2's operations reach of it.

N images, T tokens, D width, E experts, K experts per sample.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.experts import measure
from benchmarks.gpu_parts.record import Record, Setting
from benchmarks.measure import best_seconds, product_rates

TERA, GIGA, MICRO = 1e12, 1e9, 1e-6
LAUNCHES = 10  # per timing, so that the first launch's latency is hidden
HEADS = 16
BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
CHOICES = ("math", "flash", "memory-efficient", "cuDNN")  # as torch numbers them
SIZES = ((64, 3, 2), (256, 3, 1), (256, 3, 2), (256, 8, 2), (256, 16, 2), (1024, 3, 2))  # T, E, K
MAX_LOSS = 1.15  # of what auto chooses, over the faster way


def measure_ceilings(setting: Setting, record: Record) -> None:
    """Products and copies at their best; XL's products by address, the merge, attention."""
    names = ("A B", "A B^T", "A^T B")
    products, copied = _large_products(setting), _copy_rate(setting)
    for name, rate in zip(names, products, strict=True):
        record.number(f"large bf16 product {name}, TFLOP/s", rate / TERA)
    record.number("copy on the device, TB/s", copied / TERA)
    record.number("product over copy, FLOP per byte", max(products) / copied)
    _measure_products(setting, record)
    _measure_merge(setting, record)
    _measure_attention(setting, record)


def _large_products(setting: Setting) -> tuple[float, ...]:
    if setting.is_tiny:  # a CPU's would grow until one takes long enough
        a = torch.randn(64, 64).bfloat16()
        return (2 * 64**3 / best_seconds(lambda: a @ a, setting.device),) * 3
    return product_rates(setting.device, torch.bfloat16)


def _copy_rate(setting: Setting) -> float:
    """Return bytes per second, read and written."""
    size = setting.pick(1 << 31, 1 << 20)
    source = torch.empty(size, device=setting.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * size / _seconds(setting, lambda: target.copy_(source))


def _seconds(setting: Setting, fn: Callable[[], Any]) -> float:
    return best_seconds(fn, setting.device, setting.pick(5, 1), setting.pick(LAUNCHES, 1))


def _measure_products(setting: Setting, record: Record) -> None:
    """A block's linear layers with weights at multiples of 16 bytes and 8 bytes off."""
    D, rows = setting.pick(1152, 64), setting.pick(8192, 64)
    draw = partial(torch.randn, device=setting.device, dtype=torch.bfloat16)
    flat = draw(4 * D * D + 64)
    for name, wide, narrow in (
        ("qkv", D, 3 * D),
        ("proj", D, D),
        ("fc1", D, 4 * D),
        ("fc2", 4 * D, D),
    ):
        x, gradient = draw(rows, wide), draw(rows, narrow)
        flops = 2 * rows * wide * narrow
        for offset in (0, 8):
            first = offset // flat.itemsize
            weight = flat[first : first + wide * narrow].view(narrow, wide)
            bias = flat[first : first + narrow]
            place = f"weights {offset} bytes off, TFLOP/s"
            sec = _seconds(setting, lambda x=x, w=weight, b=bias: F.linear(x, w, b))
            record.number(f"{name} forward, {place}", flops / sec / TERA)
            sec = _seconds(setting, lambda g=gradient, w=weight: g @ w)
            record.number(f"{name} to the input, {place}", flops / sec / TERA)
        sec = _seconds(setting, lambda g=gradient, x=x: g.T @ x)
        record.number(f"{name} to the weight, TFLOP/s", flops / sec / TERA)


def _measure_merge(setting: Setting, record: Record) -> None:
    """The three products that merge a block's experts: odd sizes, bound by memory."""
    D, N, E = setting.pick(1152, 64), setting.pick(32, 4), 3
    draw = partial(torch.randn, device=setting.device, dtype=torch.bfloat16)
    weights, gates, gradient = draw(E, D * D), draw(N, E), draw(N, D * D)
    moved = (N + E) * D * D * weights.itemsize
    for name, product in (
        ("merged matrices", lambda: gates @ weights),
        ("gradient of the experts", lambda: gates.T @ gradient),
        ("gradient of the gates", lambda: gradient @ weights.T),
    ):
        sec = _seconds(setting, product)
        record.number(f"{name}, us", sec / MICRO)
        record.number(f"{name}, GB/s", moved / sec / GIGA)


def _measure_attention(setting: Setting, record: Record) -> None:
    """Attention forward and backward with every kernel that takes it; which one torch chooses."""
    D, N, T = setting.pick(1152, 64), setting.pick(32, 2), setting.pick(256, 16)
    heads = setting.pick(HEADS, 4)
    qkv = torch.randn(N, T, 3, heads, D // heads, device=setting.device, dtype=torch.bfloat16)
    qkv.requires_grad_()

    def attend() -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        return F.scaled_dot_product_attention(q, k, v)

    target = torch.ones_like(attend())

    def step() -> None:
        torch.autograd.grad(attend(), qkv, target)

    record.number("attention as chosen, us", _seconds(setting, step) / MICRO)
    if not setting.is_gpu:
        return
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    chosen = CHOICES[torch._fused_sdp_choice(q, k, v)]
    record.remark(f"torch chooses {chosen} for attention with heads of {D // heads}")
    for name, backend in BACKENDS.items():
        with sdpa_kernel([backend]):
            try:
                record.number(f"attention by {name}, us", _seconds(setting, step) / MICRO)
            except RuntimeError as err:  # this kernel does not take these sizes, or is not there
                record.remark(f"{name}: {str(err).splitlines()[0]}")


def compare_expert_ways(setting: Setting, record: Record) -> None:
    """One block's affine experts, merged and dispatched; which way auto chooses."""
    losses = []
    for T, E, K in SIZES:
        N, tokens, D = setting.pick(32, 2), setting.pick(T, 16), setting.pick(1152, 64)
        cell = measure(N, tokens, D, E, K, setting.device, torch.bfloat16)
        losses.append(cell.auto_loss)
        size = f"T={T} E={E} K={K}"
        record.number(f"{size} merged, us", cell.merged_sec / MICRO)
        record.number(f"{size} dispatched, us", cell.dispatched_sec / MICRO)
        record.remark(f"{size}: auto {'merges' if cell.is_auto_merged else 'dispatches'}")
    record.number("time of what auto chooses over the faster way, at worst", max(losses))
    if setting.is_gpu:
        text = f"auto is never slower than {MAX_LOSS} of the faster way: {max(losses):.2f} at worst"
        record.check(max(losses) <= MAX_LOSS, text)
