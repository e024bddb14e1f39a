"""Floating-point operations of the network in closed form.

A matrix product of (M, K) and (K, N) counts 2 M K N; what is done element by element counts
nothing, as in torch.utils.flop_counter and in the "model FLOPs" that papers report.

N batch, T tokens, D width, L blocks, E experts, K experts per sample, S diffusion timesteps.
"""

from collections import Counter
from dataclasses import dataclass

from models.layers import NUM_FREQUENCIES


@dataclass(frozen=True, kw_only=True)
class NetworkShape:
    """The sizes of a network that its cost depends on.

    Attributes:
        patch_values: numbers in a patch of the input, P * P * C.
        out_values: numbers in a patch of the output.
        mlp_hidden: hidden width of the blocks' MLPs.
        has_qk_norm: queries and keys are normalised.
        routing: "switch", "dtr" or "dense".
        expert_kind: "affine" or "mlp".
        expert_hidden: hidden width of an mlp expert.
    """

    num_tokens: int
    hidden_size: int
    depth: int
    num_heads: int
    patch_values: int
    out_values: int
    mlp_hidden: int
    has_qk_norm: bool = False
    routing: str
    num_experts: int
    top_k: int
    expert_kind: str
    expert_hidden: int
    num_timesteps: int

    @property
    def has_experts(self) -> bool:
        """Whether blocks route samples through experts."""
        return self.routing == "switch"


def forward_flops(shape: NetworkShape, batch_size: int, *, is_merged: bool = True) -> Counter[str]:
    """Count one forward pass, by part.

    Args:
        shape: of the network.
        batch_size: N.
        is_merged: affine experts are merged, one matrix per sample; else every sample visits K
            experts. Mlp experts cannot be merged.
    """
    N, T, D, L = batch_size, shape.num_tokens, shape.hidden_size, shape.depth
    flops: Counter[str] = Counter()
    flops["x_embedder"] = 2 * N * T * shape.patch_values * D
    # With experts, gates of all timesteps are computed once per pass; else the batch's alone.
    num_t = shape.num_timesteps if shape.has_experts else N
    flops["t_embedder"] = 2 * num_t * (2 * NUM_FREQUENCIES * D + D * D)
    flops["blocks: adaLN"] = 2 * N * L * D * 6 * D
    flops["blocks: attention layers"] = 2 * N * T * L * 4 * D * D
    flops["blocks: attention products"] = 2 * N * T * L * 2 * T * D
    flops["blocks: mlp"] = 2 * N * T * L * 2 * D * shape.mlp_hidden
    if shape.has_experts:
        flops["gate"] = 2 * shape.num_timesteps * L * shape.num_experts * D
        flops["experts"] = L * _expert_flops(shape, N, is_merged)
    flops["final_layer"] = 2 * N * (D * 2 * D + T * D * shape.out_values)
    return flops


def training_flops(shape: NetworkShape, batch_size: int, *, is_merged: bool = True) -> int:
    """Count forward and backward of one pass, without recomputation.

    The backward pass of a product is two products, of its two arguments' gradients; the layers
    that read data, which needs no gradient, save one.
    """
    flops = forward_flops(shape, batch_size, is_merged=is_merged)
    num_t = shape.num_timesteps if shape.has_experts else batch_size
    of_data = flops["x_embedder"] + 2 * num_t * 2 * NUM_FREQUENCIES * shape.hidden_size
    return 3 * flops.total() - of_data


def _expert_flops(shape: NetworkShape, batch_size: int, is_merged: bool) -> int:
    """Count the mixture of one block."""
    N, T, D, E = batch_size, shape.num_tokens, shape.hidden_size, shape.num_experts
    if shape.expert_kind == "mlp":
        return 2 * N * T * shape.top_k * 2 * D * shape.expert_hidden
    if not is_merged:
        return 2 * N * T * shape.top_k * D * D
    merging = 2 * N * E * (D * D + D)  # the samples' matrices and biases from the experts'
    return merging + 2 * N * T * D * D
