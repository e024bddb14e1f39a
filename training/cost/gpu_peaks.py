"""List the peak speeds of GPUs, which MFU is measured against."""

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
    """Return the peak speed of a device in bf16, TFLOP/s; None for one that is not listed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    found = (peak for part, peak in _BF16_TFLOPS.items() if re.search(rf"\b{part}\b", name))
    return next(found, None)
