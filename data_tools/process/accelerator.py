"""Say which accelerator this process computes on; no other file of the program asks torch.

DeepSpeed reads DS_ACCELERATOR too: with "cpu" a machine's GPUs are not touched. A process that is
forked after its parent has looked at them could not use CUDA.
"""

import os

import torch

ACCELERATOR_VARIABLE = "DS_ACCELERATOR"
CPU = "cpu"


def is_kept_to_cpu() -> bool:
    """Tell whether $DS_ACCELERATOR keeps a machine's GPUs out of it."""
    return os.environ.get(ACCELERATOR_VARIABLE) == CPU


def has_gpu() -> bool:
    """Tell whether this process may compute on a GPU, and there is one."""
    return not is_kept_to_cpu() and torch.cuda.is_available()
