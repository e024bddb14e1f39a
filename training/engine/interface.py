"""What training uses of DeepSpeed's engine.

training/engine/deepspeed_internals.py knows the rest of DeepSpeed.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from models.switch_dit import SwitchDiT, SwitchDiTOutput


class Engine(Protocol):
    """A model in training: sharded by ZeRO, with its optimizer.

    Attributes:
        module: the network; under ZeRO 3 its parameters are empty between forwards.
        optimizer: ours inside of ZeRO's; only deepspeed_internals looks into it.
        device: of this rank.
        skipped_steps: optimizer steps that were left out, since step 0 of the run.
        global_steps: optimizer steps, with those that were left out.
        global_samples: samples of these steps.
    """

    module: SwitchDiT
    optimizer: Any
    device: torch.device
    skipped_steps: int
    global_steps: int
    global_samples: int

    def __call__(
        self, x_t: Tensor, t: Tensor, y: Tensor, group_t: Tensor | None
    ) -> SwitchDiTOutput:
        """Run the module's forward."""

    def backward(self, loss: Tensor) -> None:
        """Add a micro-step's gradients to those of its step. All ranks must call this."""

    def step(self) -> None:
        """Update the weights after the last micro-step of a step. All ranks must call this."""

    def train(self) -> Any:
        """Let the module train."""

    def eval(self) -> Any:
        """Let the module predict."""

    def gradient_accumulation_steps(self) -> int:
        """Return how many micro-steps a step has."""

    def train_micro_batch_size_per_gpu(self) -> int:
        """Return how many samples a micro-step has on each rank."""

    def zero_optimization_stage(self) -> int:
        """Return ZeRO's stage, 0 to 3."""

    def get_global_grad_norm(self) -> Any:
        """Return the norm of the last step's gradient; None where DeepSpeed computes none."""
