"""The network with its experts merged at some timesteps, as a model of diffusers.

An exported folder carries this module after those that it imports (code_files.py).
"""

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from models.merged import MergedDiT
from models.network_options import NetworkOptions


class MergedDiTTransformer2DModel(ModelMixin, ConfigMixin):
    """A Switch-DiT at the timesteps of one sampler: a plain DiT at each of them."""

    @register_to_config
    def __init__(self, *, timesteps: list[int], options: dict[str, Any]) -> None:
        """Build the network; `options` holds the fields of NetworkOptions."""
        super().__init__()
        self.network = MergedDiT(timesteps, NetworkOptions(**options))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | int,
        class_labels: Tensor,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict what the objective asks for.

        Args:
            hidden_states: (N, C, H, W) noisy latents.
            timestep: one of `config.timesteps`, for all samples: a number, (1,), or (N,) equal.
            class_labels: (N,) int64; num_classes means "no label".
            return_dict: return an object with `sample` instead of a tuple.

        Returns:
            (N, C or 2C, H, W); variance channels, if there are any, come last.
        """
        t = torch.as_tensor(timestep, device=hidden_states.device).reshape(-1)
        sample = self.network(hidden_states, t, class_labels).prediction
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
