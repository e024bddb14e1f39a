"""Import weights of other programs: recognise them by their names, rename and stack them.

Known are the official code of DiT, DTR and Switch-DiT, and diffusers' DiT. All but diffusers use
the same names outside the routing. The official Switch-DiT code keeps gates and experts in
`routers.I`; here the gates of all blocks are one tensor, and the experts of a block are another.

T tokens, D width, E experts.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from models.layers import sincos_positions

POSITION_TOLERANCE = 1e-5
# Of DistributedDataParallel and DeepSpeed, torch.compile, FSDP, activation checkpointing.
_WRAPPERS = {"module", "_orig_mod", "_forward_module"}
_WRAPPERS |= {"_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_FIRST_OF_BLOCK = re.compile(r"(?:^|(?<=\.))(?:transformer_blocks|blocks|routers)\.\d+\.")
_EXPERTS = "mixture.deepspeed_moe.experts"
_ONE_EXPERT = re.compile(rf"(blocks\.\d+\.{re.escape(_EXPERTS)})\.deepspeed_experts\.(\d+)\.(.+)")
# Buffers of the official Switch-DiT that follow from its configuration.
_OFFICIAL_DERIVED = {"full_time", "prior._unit_mapping"}
_OFFICIAL_GATE = re.compile(r"routers\.(\d+)\.f_gate\.1\.(weight|bias)")
_OFFICIAL_EXPERTS = re.compile(r"routers\.(\d+)\.experts\.(w|b)")
# Names of diffusers' DiTTransformer2DModel and ours. Every block has a copy of the embedders.
_BLOCK, _EMBEDDER = r"transformer_blocks\.(\d+)\.", r"transformer_blocks\.\d+\.norm1\.emb\."
_DIFFUSERS_RULES = [
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"pos_embed\.proj\.", "x_embedder.proj."),
        (_EMBEDDER + r"timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
        (_EMBEDDER + r"timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
        (_EMBEDDER + r"class_embedder\.", "y_embedder."),
        (_BLOCK + r"norm1\.linear\.", r"blocks.\1.adaLN_modulation.1."),
        (_BLOCK + r"attn1\.to_out\.0\.", r"blocks.\1.attn.proj."),
        (_BLOCK + r"ff\.net\.0\.proj\.", r"blocks.\1.mlp.fc1."),
        (_BLOCK + r"ff\.net\.2\.", r"blocks.\1.mlp.fc2."),
        (r"proj_out_1\.", "final_layer.adaLN_modulation.1."),
        (r"proj_out_2\.", "final_layer.linear."),
    )
]
_DIFFUSERS_PROJECTION = re.compile(_BLOCK + r"attn1\.to_([qkv])\.(weight|bias)")


class ImportedWeights(NamedTuple):
    """Weights under this project's names.

    Attributes:
        kind: the model, and the program whose names the weights had.
        weights: by the parameter's name, experts stacked, (E, ...); unknown names are kept.
        positions: (T, D) positional table that the model was trained with, if one was stored.
    """

    kind: str
    weights: dict[str, Tensor]
    positions: Tensor | None


def import_weights(state_dict: dict[str, Tensor]) -> ImportedWeights:
    """Recognise weights by their names; rename and stack them.

    Raises:
        ValueError: they are not those of a diffusion transformer, or some are missing.
    """
    weights = _unwrapped(state_dict)
    is_official = "pos_embed" in weights
    tables = [weights.pop(name) for name in ("pos_embed", "pos_embed.pos_embed") if name in weights]
    positions = tables[0][0] if tables else None  # (1, T, D) -> (T, D)
    if any(name.startswith("transformer_blocks.") for name in weights):
        return ImportedWeights("DiT (diffusers)", _from_diffusers(weights), positions)
    if any(name.startswith("routers.") for name in weights):
        weights = _from_official_switch_dit(weights)
        return ImportedWeights("Switch-DiT (official code)", weights, positions)
    if not any(name.startswith("blocks.") for name in weights):
        found = f"{len(weights)} tensors, such as {', '.join(sorted(weights)[:3])}"
        raise ValueError(f"no tensor is of a diffusion transformer's block ({found})")
    if is_official:
        return ImportedWeights("DiT or DTR (official code)", weights, positions)
    routing = "Switch-DiT" if "gate.weight" in weights else "DiT or DTR"
    return ImportedWeights(f"{routing} (this program)", _with_stacked_experts(weights), None)


def check_positions(positions: Tensor, grid: tuple[int, int]) -> None:
    """Compare an imported positional table (T, D) with ours, which is fixed and not replaced.

    A table of another grid says nothing about ours.

    Args:
        positions: of a square grid, the only kind that the other programs have.
        grid: rows and columns of patches of our model.

    Raises:
        ValueError: it is of the same grid and differs.
    """
    num_tokens, hidden_size = positions.shape
    if grid[0] != grid[1] or grid[0] * grid[1] != num_tokens:
        return
    difference = positions.float().cpu() - sincos_positions(*grid, hidden_size)
    largest = difference.abs().max().item()
    if largest > POSITION_TOLERANCE:
        raise ValueError(f"pos_embed differs by {largest:.2g} from the fixed sine-cosine table")


def models_in(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Split a dictionary that may hold several models, by the prefix of their blocks' names.

    Returns:
        The tensors of each model by its prefix. Prefixes and the names of wrappers are cut off the
        tensors' names. Then the names of the tensors that belong to no model. If there is no block,
        all tensors are one model's.
    """
    starts = {name: _FIRST_OF_BLOCK.search(name) for name in tensors}
    prefixes = {name[: start.start()] for name, start in starts.items() if start}
    models: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in prefixes or {""}}
    outside = []
    for name, tensor in tensors.items():
        fitting = [prefix for prefix in models if name.startswith(prefix)]
        if fitting:
            prefix = max(fitting, key=len)
            models[prefix][_without_wrappers(name.removeprefix(prefix))] = tensor
        else:
            outside.append(name)
    by_name: dict[str, dict[str, Tensor]] = {}
    for prefix, weights in models.items():  # of two that differ in wrappers the larger one
        short = _without_wrappers(prefix.removesuffix("."))
        if len(weights) > len(by_name.get(short, ())):
            by_name[short] = weights
    return by_name, outside


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _unwrapped(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy the tensors of the largest model without what wrappers put before their names."""
    models, _ = models_in(state_dict)
    return dict(max(models.values(), key=len, default={}))


def _with_stacked_experts(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stack experts that are listed one by one, as the `state_dict()` of a mixture shows them."""
    stacked: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in weights.items():
        if one := _ONE_EXPERT.fullmatch(name):
            experts.setdefault(f"{one[1]}.{one[3]}", {})[int(one[2])] = tensor
        else:
            stacked[name] = tensor
    return stacked | {name: _stack(by_index, name) for name, by_index in experts.items()}


def _stack(by_index: dict[int, Tensor], name: str) -> Tensor:
    if sorted(by_index) != list(range(len(by_index))):
        raise ValueError(f"{name} is there for {sorted(by_index)} only")
    return torch.stack([by_index[i] for i in range(len(by_index))])


def _from_official_switch_dit(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    gates: dict[str, dict[int, Tensor]] = {"weight": {}, "bias": {}}
    for name, tensor in weights.items():
        if gate := _OFFICIAL_GATE.fullmatch(name):
            gates[gate[2]][int(gate[1])] = tensor
        elif experts := _OFFICIAL_EXPERTS.fullmatch(name):
            kind = {"w": "weight", "b": "bias"}[experts[2]]
            renamed[f"blocks.{experts[1]}.{_EXPERTS}.{kind}"] = tensor  # (E, in, out) as here
        elif name not in _OFFICIAL_DERIVED:
            renamed[name] = tensor
    for kind, by_block in gates.items():
        if not by_block:
            raise ValueError(f"routers.I.f_gate.1.{kind} is missing")
        renamed[f"gate.{kind}"] = _stack(by_block, f"routers.I.f_gate.1.{kind} of blocks I")
    return renamed


def _from_diffusers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    projections: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        if part := _DIFFUSERS_PROJECTION.fullmatch(name):
            projections.setdefault(f"blocks.{part[1]}.attn.qkv.{part[3]}", {})[part[2]] = tensor
            continue
        first = renamed.setdefault(_diffusers_name(name), tensor)
        if first is not tensor and not torch.equal(first, tensor):
            raise ValueError(f"{name} differs from its copy in another block; here all share one")
    for name, parts in projections.items():
        if set(parts) != set("qkv"):
            raise ValueError(f"{name} is there for {sorted(parts)} only")
        renamed[name] = torch.cat([parts[letter] for letter in "qkv"])
    return renamed


def _diffusers_name(name: str) -> str:
    for pattern, ours in _DIFFUSERS_RULES:
        if pattern.match(name):
            return pattern.sub(ours, name, count=1)
    return name
