"""List the peak speeds of GPUs, which MFU is measured against."""

import re

import torch

# Dense bf16 products with sums in fp32, TFLOP/s, from the vendor's data sheets and, for RTX, the
# white papers of Ada and Blackwell. Data sheets name the speed with sparsity: half of it is here.
# Without it in the name a chip is the one with SXM sockets. A longer name goes first.
_BF16_TFLOPS = {
    "GB300": 2500.0,
    "GB200": 2500.0,
    "B300": 2250.0,
    "B200": 2250.0,
    "GH200": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H800 PCIe": 756.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L20": 119.5,
    "L4": 121.0,
    "RTX PRO 6000 Blackwell Workstation": 503.8,
    "RTX 6000 Ada": 364.2,
    "RTX A6000": 154.8,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}
_SLICE = "MIG"  # a part of a chip, whose share of the peak no data sheet states


def peak_of(name: str) -> float | None:
    """Return the peak speed in bf16, TFLOP/s, of a GPU as its driver names it; None if unknown."""
    if re.search(rf"\b{_SLICE}\b", name):
        return None
    found = (peak for part, peak in _BF16_TFLOPS.items() if re.search(rf"\b{part}\b(?! D\b)", name))
    return next(found, None)


def peak_tflops(device: torch.device) -> float | None:
    """Return the peak speed of a device in bf16, TFLOP/s; None for one that is not listed."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))
