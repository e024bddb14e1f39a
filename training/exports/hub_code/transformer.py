"""The network as a model of diffusers: what an exported folder's transformer/ holds.

An exported folder carries this module after those that it imports (code_files.py).
"""

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from models.experts import StackedExperts
from models.network_options import NetworkOptions
from models.switch_dit import SwitchDiT


class SwitchDiTTransformer2DModel(ModelMixin, ConfigMixin):
    """Switch-DiT, DTR or DiT: noisy latents, timesteps and labels in, a prediction out."""

    @register_to_config
    def __init__(self, *, options: dict[str, Any]) -> None:
        """Build the network; `options` holds the fields of NetworkOptions."""
        super().__init__()
        self.network = SwitchDiT(NetworkOptions(**options))
        for module in self.modules():
            if isinstance(module, StackedExperts):
                module.present_stacked()  # diffusers sets parameters by their own names

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
            timestep: (N,) int64, or (1,) or a number for all samples, for which experts are merged
                once.
            class_labels: (N,) int64; num_classes means "no label".
            return_dict: return an object with `sample` instead of a tuple.

        Returns:
            (N, C or 2C, H, W); variance channels, if there are any, come last.
        """
        t = torch.as_tensor(timestep, device=hidden_states.device).reshape(-1)
        sample = self.network(hidden_states, t, class_labels).prediction
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
