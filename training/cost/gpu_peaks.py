"""Peaks of GPUs, for the share of them that a model's products reach (MFU)."""

import re

import torch

# Dense bf16 products, TFLOP/s, from the vendor's data sheets; a longer name goes first.
_BF16_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A10": 125.0,
    "L4": 121.0,
}


def peak_tflops(device: torch.device) -> float | None:
    """Return what a device does at most in bf16, TFLOP/s; None if that is not known here."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    found = (peak for part, peak in _BF16_TFLOPS.items() if re.search(rf"\b{part}\b", name))
    return next(found, None)
