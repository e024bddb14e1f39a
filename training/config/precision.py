"""Find a run's precision: what the hardware can multiply, and what the DeepSpeed file asks for."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data_tools.errors import ConfigError
from data_tools.process.accelerator import has_gpu

PRECISION_NAMES = {
    "fp32": "fp32",
    "bf16": "bf16 with fp32 master weights",
    "autocast": "fp32 weights with products in bf16",
}
PRECISION_BLOCKS = ("bf16", "torch_autocast")
BF16_VARIABLE = "SWITCH_DIT_BF16"


class Hardware(NamedTuple):
    """The hardware that "auto" in a DeepSpeed file depends on."""

    name: str
    has_bf16: bool


def detect_hardware() -> Hardware:
    """Ask torch whether this machine's accelerator, or else its CPU, multiplies bf16 natively.

    $SWITCH_DIT_BF16 answers instead: 1 = it does, 0 = it does not; unset or empty = ask torch.
    A CPU without bf16 instructions emulates them: measured 1 to 20 GFLOP/s, by the layout of the
    product, against 140 in fp32 (benchmarks/train_step.py --peak-only).

    Raises:
        ConfigError: the variable has another value.
    """
    has_cuda = has_gpu()
    name = torch.cuda.get_device_name() if has_cuda else "this CPU"
    if stated := os.environ.get(BF16_VARIABLE):
        if stated not in ("0", "1"):
            raise ConfigError(
                f"{BF16_VARIABLE}={stated}: must be 1 (the hardware multiplies bf16), 0 (it does "
                "not) or unset (torch is asked)."
            )
        return Hardware(f"{name}, by {BF16_VARIABLE}={stated},", stated == "1")
    if has_cuda:
        return Hardware(name, torch.cuda.is_bf16_supported(including_emulation=False))
    return Hardware(name, torch.ops.mkldnn._is_mkldnn_bf16_supported())


def precision_of(merged: dict[str, Any]) -> str:
    """Return "bf16", "autocast" (fp32 weights, bf16 products) or "fp32"."""
    if merged.get("bf16", {}).get("enabled"):
        return "bf16"
    return "autocast" if merged.get("torch_autocast", {}).get("enabled") else "fp32"


def explain_precision(
    path: Path, stated: dict[str, Any], merged: dict[str, Any], hardware: Hardware | None = None
) -> str:
    """Return the one line that says which precision is used and why.

    Args:
        path: the DeepSpeed JSON file.
        stated: its content.
        merged: what became of it.
        hardware: None = this machine.
    """
    hardware = hardware or detect_hardware()
    name = next((b for b in PRECISION_BLOCKS if stated.get(b, {}).get("enabled")), "bf16")
    setting = json.dumps(stated.get(name, {}).get("enabled", False))
    chosen = PRECISION_NAMES[precision_of(merged)]
    verb = "multiplies" if hardware.has_bf16 else "does not multiply"
    slow = "" if chosen == "fp32" or hardware.has_bf16 else ", so it is 7 to 100 times slower"
    return (
        f"precision: {chosen} ({path} sets {name}.enabled to {setting}; {hardware.name} {verb} "
        f"bf16 natively{slow})"
    )
