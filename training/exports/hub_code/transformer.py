"""The network as a model of diffusers: what an exported folder's transformer/ holds.

An exported folder carries this module after those that it imports (code_files.py).
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from models.experts import StackedExperts
from models.switch_dit import SwitchDiT


class SwitchDiTTransformer2DModel(ModelMixin, ConfigMixin):
    """Switch-DiT, DTR or DiT: noisy latents, timesteps and labels in, a prediction out."""

    @register_to_config
    def __init__(
        self,
        *,
        input_size: tuple[int, int],
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        num_experts: int,
        top_k: int,
        num_timesteps: int,
        learned_variance: bool,
        routing: str,
        expert_kind: str,
        expert_hidden_ratio: float,
        expert_dispatch: str,
        renormalize_gates: bool,
        dtr_alpha: float,
        dtr_beta: float,
        qk_norm: bool,
        mlp_ratio: float = 4.0,
    ) -> None:
        """Build the network; the arguments are those of SwitchDiT."""
        super().__init__()
        self.network = SwitchDiT(
            input_size=tuple(input_size),
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            num_classes=num_classes,
            num_experts=num_experts,
            top_k=top_k,
            num_timesteps=num_timesteps,
            learned_variance=learned_variance,
            routing=routing,
            expert_kind=expert_kind,
            expert_hidden_ratio=expert_hidden_ratio,
            expert_dispatch=expert_dispatch,
            renormalize_gates=renormalize_gates,
            dtr_alpha=dtr_alpha,
            dtr_beta=dtr_beta,
            qk_norm=qk_norm,
            mlp_ratio=mlp_ratio,
        )
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
