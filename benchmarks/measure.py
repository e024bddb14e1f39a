"""Measure rates of products, FLOPs, bytes kept for the backward pass, and waits for the device."""

import ctypes
import gc
import math
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import models.attention  # noqa: F401  its operators are counted

aten = torch.ops.aten

PEAK_REPEATS = 5
CUDA_LAUNCHES = 20  # of a small product per timing, to hide what starting it costs
MIN_PRODUCT_SEC = 0.02  # a product that takes less is too small to show the peak
LARGEST_PRODUCT = {"cpu": 4096, "cuda": 16384}


def synchronise(device: torch.device) -> None:
    """Wait for everything that was started on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(
    fn: Callable[[], Any], device: torch.device, repeats: int = PEAK_REPEATS, inner: int = 1
) -> float:
    """Return the shortest of several timings of fn, one call.

    Args:
        fn: what is timed; called once beforehand.
        device: that it runs on.
        repeats: timings.
        inner: calls per timing, so that a launch's latency is hidden on an accelerator.
    """
    fn()
    best = float("inf")
    for _ in range(repeats):
        synchronise(device)
        started = time.perf_counter()
        for _ in range(inner):
            fn()
        synchronise(device)
        best = min(best, (time.perf_counter() - started) / inner)
    return best


def product_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float, float]:
    """Measure FLOP/s of large square products A B, A B^T and A^T B.

    A linear layer's forward, backward to its input and backward to its weight have these layouts,
    and libraries may favour one. The size grows until a product takes long enough to tell.
    """
    size = 256
    while True:
        a = torch.randn(size, size, device=device).to(dtype)
        b = torch.randn(size, size, device=device).to(dtype)
        layouts = (lambda a=a, b=b: a @ b, lambda a=a, b=b: a @ b.T, lambda a=a, b=b: a.T @ b)
        seconds = [best_seconds(product, device) for product in layouts]
        if min(seconds) > MIN_PRODUCT_SEC or size >= LARGEST_PRODUCT[device.type]:
            return tuple(2 * size**3 / elapsed_sec for elapsed_sec in seconds)
        size *= 2


def model_product_rate(
    device: torch.device, dtype: torch.dtype, num_rows: int, hidden_size: int, mlp_hidden: int
) -> float:
    """Measure FLOP/s of a block's linear layers, forward, weighted by their FLOPs.

    Args:
        device: where.
        dtype: of the products.
        num_rows: tokens of the batch, N * T.
        hidden_size: D.
        mlp_hidden: hidden width of the MLP.
    """
    D = hidden_size
    flops = elapsed_sec = 0.0
    for wide, narrow in ((D, 3 * D), (D, D), (D, mlp_hidden), (mlp_hidden, D)):
        x = torch.randn(num_rows, wide, device=device).to(dtype)
        weight = torch.randn(narrow, wide, device=device).to(dtype)
        inner = CUDA_LAUNCHES if device.type == "cuda" else 1
        elapsed_sec += best_seconds(lambda x=x, w=weight: F.linear(x, w), device, inner=inner)
        flops += 2 * num_rows * wide * narrow
    return flops / elapsed_sec


def counted_flops(fn: Callable[[], Any]) -> int:
    """Run fn under torch's counter and return its floating-point operations.

    The backward pass of attention counts twice the forward, as everything else; torch would add
    the scores that the fused kernels compute a second time, and knows no kernel of the CPU.
    """
    attention = {
        torch.ops.switch_dit.batched_attention: _attention_flops,
        torch.ops.switch_dit.batched_attention_backward: _attention_backward_flops,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
        aten._scaled_dot_product_flash_attention_backward: _attention_backward_flops,
        aten._scaled_dot_product_efficient_attention_backward: _attention_backward_flops,
        aten._scaled_dot_product_cudnn_attention_backward: _attention_backward_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        fn()
    return counter.get_total_flops()


def _attention_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return 4 * q[0] * q[1] * q[2] * k[2] * q[3]


def _attention_backward_flops(_: Any, q: Any, k: Any, *__: Any, **___: Any) -> int:
    return 8 * q[0] * q[1] * q[2] * k[2] * q[3]


class SavedTensors:
    """Counts the memory that a forward pass keeps for its backward pass.

    Attributes:
        num_bytes: of all storages kept, each once, parameters apart.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._sizes: dict[int, int] = {}
        self._parameters = {p.untyped_storage().data_ptr() for p in parameters}
        self._kept: list[Tensor] = []  # so that no address is used twice

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self._sizes[storage.data_ptr()] = storage.nbytes()
            self._kept.append(tensor.detach())
        return tensor

    @property
    def num_bytes(self) -> int:
        """Bytes kept."""
        return sum(self._sizes.values())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the forward pass that runs inside."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield


def saved_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Return the bytes that `forward` keeps for its backward pass, parameters apart."""
    saved = SavedTensors(model.parameters())
    with saved.watching():
        output = forward()
    del output
    return saved.num_bytes


RESET_PEAK = "5"  # what Linux takes in /proc/PID/clear_refs for it

HOST_READS = frozenset(
    {"cpu", "numpy", "tolist", "item", "__bool__", "__int__", "__float__", "__index__", "__array__"}
    | {"is_nonzero", "equal", "allclose"}
    | {"nonzero", "argwhere", "masked_select", "unique", "bincount"}  # sizes depend on values
)
HOST_MARK = "_benchmark_is_on_host"
INDEXING = frozenset({"__getitem__", "__setitem__"})  # by a mask: its true values are counted


class HostReads(TorchFunctionMode):
    """Counts the calls whose result the host would wait for on an accelerator, by name.

    What `.cpu()` returns, and what is computed from nothing but such tensors, is on the host
    already and read for free, as it would be beside an accelerator. It sees calls from Python on
    any device, also in a backward pass that Tensor.backward starts. What C++ waits for shows on
    CUDA only: `cuda_waits`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run, and count unless all operands are on the host."""
        kwargs = kwargs or {}
        if func is Tensor.backward:
            with self:  # this method runs unwatched, and so would all of the backward pass
                return _backward(*args, **kwargs)
        name = getattr(func, "__name__", "")
        operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        is_on_host = bool(operands) and all(hasattr(x, HOST_MARK) for x in operands)
        is_copy = name == "cpu" or (name == "to" and _names_the_cpu(args[1:], kwargs))
        is_mask_index = name in INDEXING and any(x.dtype == torch.bool for x in operands[1:])
        if operands and not is_on_host and (name in HOST_READS or is_copy or is_mask_index):
            self.counts["cpu" if is_copy else name] += 1
        result = func(*args, **kwargs)
        if is_copy and not is_on_host:
            result = result.clone()  # on a CPU it is the tensor itself, which stays unread
        if is_copy or is_on_host:
            for x in tree_leaves(result):
                if isinstance(x, Tensor):
                    setattr(x, HOST_MARK, True)
        return result


def _backward(
    tensor: Tensor, gradient: Tensor | None = None, retain_graph: bool | None = None, **_: Any
) -> None:
    """Do what Tensor.backward does; torch's public ways there switch off the mode around them."""
    gradient = torch.ones_like(tensor) if gradient is None else gradient
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward(
        *((tensor,), (gradient,), bool(retain_graph), False, ()),
        allow_unreachable=True,
        accumulate_grad=True,
    )


def _names_the_cpu(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Say whether Tensor.to is asked for the CPU by name; a device object is some tensor's own."""
    return "cpu" in [x for x in (*args, *kwargs.values()) if isinstance(x, str)]


def cuda_waits(fn: Callable[[], Any]) -> Counter[str]:
    """Run fn on CUDA and count by source line where the host waited for the device."""
    torch.cuda.synchronize()
    previous = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(action="ignore"):  # that the mode does not see everything
        torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fn()
    finally:
        torch.cuda.set_sync_debug_mode(previous)
    return Counter(
        f"{os.path.relpath(w.filename)}:{w.lineno}"
        for w in caught
        if "synchroniz" in str(w.message)
    )


class SentBytes:
    """Counts what this process sends to others through DeepSpeed's all-to-alls.

    Attributes:
        num_bytes: sent to other ranks; what a rank keeps for itself is not.
        num_calls: all-to-alls.
    """

    def __init__(self) -> None:
        self.num_bytes = self.num_calls = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the exchanges that run inside."""
        import deepspeed.comm

        exchange = deepspeed.comm.all_to_all_single

        def counting(
            output: Tensor,
            tensor: Tensor,
            output_split_sizes: list[int] | None = None,
            input_split_sizes: list[int] | None = None,
            group: Any = None,
            **kwargs: Any,
        ) -> Any:
            rank, size = (deepspeed.comm.get_rank(group), deepspeed.comm.get_world_size(group))
            rows = tensor.shape[0]
            kept = rows // size if input_split_sizes is None else input_split_sizes[rank]
            row_bytes = tensor[0].nbytes if rows else 0
            self.num_bytes += (rows - kept) * row_bytes
            self.num_calls += 1
            return exchange(output, tensor, output_split_sizes, input_split_sizes, group, **kwargs)

        deepspeed.comm.all_to_all_single = counting
        try:
            yield
        finally:
            deepspeed.comm.all_to_all_single = exchange


def peak_growth(fn: Callable[[], Any], device: torch.device) -> float:
    """Run fn and return by how many bytes memory grew at its peak.

    On CUDA that is memory of tensors. On a CPU it is resident memory, which Linux alone lets a
    process watch from a chosen moment; NaN elsewhere.
    """
    gc.collect()
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    if sys.platform != "linux":
        fn()
        return math.nan
    ctypes.CDLL(None).malloc_trim(0)  # else memory freed before could be used without growing
    Path("/proc/self/clear_refs").write_text(RESET_PEAK, encoding="utf-8")
    before = _resident_bytes("VmRSS")
    fn()
    return _resident_bytes("VmHWM") - before


def _resident_bytes(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)[1])


def describe_machine(device: torch.device) -> str:
    """Name the processor or accelerator, its instruction set and how busy it is."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return (
            f"{torch.cuda.get_device_name(device)}, {total / 2**30:.0f} GiB "
            f"({free / 2**30:.0f} free), torch {torch.__version__}"
        )
    bf16 = "with" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "without"
    return (
        f"CPU {torch.backends.cpu.get_cpu_capability()} {bf16} bf16 instructions, "
        f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.2f}, torch {torch.__version__}"
    )
