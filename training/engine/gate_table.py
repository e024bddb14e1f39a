"""Compute the gates of all timesteps from a model's weights, without building the rest of it.

L blocks, E experts, S diffusion timesteps.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from models.gate import TimestepGate
from models.layers import TimestepEmbedder
from training.config.tree import Config
from training.engine.interface import Engine
from training.engine.zero_weights import full_value

PREFIXES = ("t_embedder.", "gate.")


def gate_table(weights: Mapping[str, Tensor], num_timesteps: int) -> Tensor:
    """Return the gates (L, S, E) float32 of a model's weights.

    Args:
        weights: of the timestep embedder and the gate, by their names in the model.
        num_timesteps: S.
    """
    depth, num_experts, hidden_size = weights["gate.weight"].shape
    with torch.device("meta"):  # their values are replaced, and no random number is drawn
        parts = TimestepEmbedder(hidden_size), TimestepGate(depth, hidden_size, num_experts)
    for prefix, part in zip(PREFIXES, parts, strict=True):
        own = {
            k.removeprefix(prefix): v.float() for k, v in weights.items() if k.startswith(prefix)
        }
        part.load_state_dict(own, assign=True)
    embedder, gate = parts
    with torch.no_grad():
        return gate(embedder(torch.arange(num_timesteps)))


def read_gate_table(path: Path, num_timesteps: int) -> Tensor:
    """Return the gates (L, S, E) of a safetensors file of weights; num_timesteps is S."""
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(PREFIXES)]  # noqa: SIM118
        weights = {name: file.get_tensor(name) for name in names}
    return gate_table(weights, num_timesteps)


def engine_gate_table(engine: Engine, config: Config) -> Tensor:
    """Compute the gates of a DeepSpeed engine's weights, on the host. All ranks must call this.

    From the fp32 masters and outside of the engine's module, so it is a function of what a
    checkpoint holds, on every ZeRO stage.
    """
    weights = {
        name: full_value(engine, param, None).cpu()
        for name, param in engine.module.named_parameters()
        if name.startswith(PREFIXES)
    }
    return gate_table(weights, config.diffusion.num_timesteps)
