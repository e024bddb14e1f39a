"""Weights of the official Switch-DiT code under the names and shapes of this project."""

import re

import torch
from torch import Tensor

from models.layers import sincos_positions

# Buffers of the official model that follow from its configuration.
_DERIVED = {"full_time", "prior._unit_mapping"}
_ROUTER_NAME = re.compile(
    r"routers\.(\d+)\.(f_gate\.1\.weight|f_gate\.1\.bias|experts\.w|experts\.b)"
)
_TRUNK_NAME = re.compile(r"(x_embedder|t_embedder|y_embedder|blocks|final_layer)\..+")
_POSITION_TOLERANCE = 1e-5


def convert_official_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename and stack an official Switch-DiT state dict for `SwitchDiT.load_state_dict`.

    The trunk keeps its names. The gates of all blocks become one tensor, the experts move into
    their blocks. The positional table is checked against ours, which is not saved, and dropped.

    Raises:
        ValueError: a name is unknown or missing, or the positional table is another one.
    """
    converted: dict[str, Tensor] = {}
    gates: dict[str, dict[int, Tensor]] = {"weight": {}, "bias": {}}
    for name, tensor in state_dict.items():
        router = _ROUTER_NAME.fullmatch(name)
        if router:
            block, part = int(router[1]), router[2]
            kind = "weight" if part.endswith("w") or part.endswith("weight") else "bias"
            if part.startswith("f_gate"):
                gates[kind][block] = tensor
                continue
            prefix = f"blocks.{block}.mixture.deepspeed_moe.experts.deepspeed_experts"
            for i, of_one in enumerate(tensor.unbind(0)):
                converted[f"{prefix}.{i}.{kind}"] = of_one
        elif _TRUNK_NAME.fullmatch(name):
            converted[name] = tensor
        elif name == "pos_embed":
            _check_positions(tensor)
        elif name not in _DERIVED:
            raise ValueError(f"{name} is not a name of the official Switch-DiT model")
    for kind, by_block in gates.items():
        if not by_block or sorted(by_block) != list(range(len(by_block))):
            raise ValueError(
                f"routers.I.f_gate.1.{kind} is there for blocks {sorted(by_block)} only"
            )
        converted[f"gate.{kind}"] = torch.stack([by_block[i] for i in range(len(by_block))])
    return converted


def _check_positions(pos_embed: Tensor) -> None:
    """Compare an official positional table (1, T, D), which is of a square grid, with ours."""
    _, num_tokens, hidden_size = pos_embed.shape
    side = round(num_tokens**0.5)
    if side * side != num_tokens:
        raise ValueError(f"pos_embed has {num_tokens} tokens, which is not a square grid")
    ours = sincos_positions(side, side, hidden_size)
    difference = (pos_embed[0].float().cpu() - ours).abs().max().item()
    if difference > _POSITION_TOLERANCE:
        raise ValueError(f"pos_embed differs by {difference:.2g} from the fixed sine-cosine table")
