"""The network with its experts merged at some timesteps, as a model of diffusers.

An exported folder carries this module after those that it imports (code_files.py).
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from models.merged import MergedDiT


class MergedDiTTransformer2DModel(ModelMixin, ConfigMixin):
    """A Switch-DiT at the timesteps of one sampler: a plain DiT at each of them."""

    @register_to_config
    def __init__(
        self,
        *,
        timesteps: list[int],
        input_size: tuple[int, int],
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        num_timesteps: int,
        learned_variance: bool,
        qk_norm: bool,
        mlp_ratio: float = 4.0,
    ) -> None:
        """Build the network; the arguments are those of MergedDiT."""
        super().__init__()
        self.network = MergedDiT(
            timesteps,
            input_size=tuple(input_size),
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            num_classes=num_classes,
            num_timesteps=num_timesteps,
            learned_variance=learned_variance,
            qk_norm=qk_norm,
            mlp_ratio=mlp_ratio,
        )

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
