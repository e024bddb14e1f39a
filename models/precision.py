"""Let a trained network predict in fp32, TF32 or bf16."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from models.switch_dit import SwitchDiT

PRECISIONS = ("fp32", "tf32", "bf16")
# They decide which experts are chosen, and cost little.
IN_FP32 = ("t_embedder", "gate")


def cast_network(network: SwitchDiT, precision: str) -> SwitchDiT:
    """Give a network's weights the dtype of a precision; for bf16, all but embedder and gate."""
    assert precision in PRECISIONS
    if precision == "bf16":
        for name, part in network.named_children():
            if name not in IN_FP32:
                part.bfloat16()
    return network


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Let a GPU multiply fp32 numbers in TF32 if that is the precision, else as they are."""
    if precision != "tf32":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
