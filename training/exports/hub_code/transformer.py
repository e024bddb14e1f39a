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
from models.merged import MergedDiT
from models.network_options import NetworkOptions
from models.switch_dit import SwitchDiT


class SwitchDiTTransformer2DModel(ModelMixin, ConfigMixin):
    """Switch-DiT, DTR or DiT: noisy latents, timesteps and labels in, a prediction out."""

    @register_to_config
    def __init__(self, *, options: dict[str, Any], timesteps: list[int] | None = None) -> None:
        """Build the network.

        Args:
            options: the fields of NetworkOptions.
            timesteps: the ones that its experts are merged for, which are then the only ones that
                it can be called with; None = a network as it was trained.
        """
        super().__init__()
        network = NetworkOptions(**options)
        if timesteps is not None:
            self.network = MergedDiT(timesteps, network)
            return
        self.network = SwitchDiT(network)
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
                once. All samples have one if experts were merged beforehand.
            class_labels: (N,) int64; num_classes means "no label".
            return_dict: return an object with `sample` instead of a tuple.

        Returns:
            (N, C or 2C, H, W); variance channels, if there are any, come last.
        """
        t = torch.as_tensor(timestep, device=hidden_states.device).reshape(-1)
        sample = self.network(hidden_states, t, class_labels).prediction
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
