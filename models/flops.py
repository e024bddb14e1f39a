"""Count the floating-point operations of a network in closed form.

A matrix product of (M, K) and (K, N) counts 2 M K N. Operations on single elements count nothing,
as in torch.utils.flop_counter and in the "model FLOPs" that papers report.

N batch, T tokens, D width, L blocks, E experts, K experts per sample, S diffusion timesteps.
"""

from collections import Counter

from models.experts import merging_is_cheaper
from models.layers import NUM_FREQUENCIES
from models.network_options import NetworkOptions


def are_experts_merged(options: NetworkOptions, device_type: str = "cpu") -> bool:
    """Tell whether a rank merges its affine experts, which it does where that is cheaper.

    At the shipped presets' sizes the rules for CPUs and GPUs agree.
    """
    if options.expert_kind != "affine":
        return False
    if options.expert_dispatch != "auto":
        return options.expert_dispatch == "merged"
    num_local = options.num_experts // options.expert_parallel_size
    top_k = min(options.top_k, num_local)
    return merging_is_cheaper(
        options.num_tokens, num_local, top_k, options.hidden_size, device_type
    )


def forward_flops(options: NetworkOptions, batch_size: int) -> Counter[str]:
    """Count one forward pass of N = batch_size samples, by part.

    Affine experts are merged or visited one by one, as `are_experts_merged` says.
    """
    N, T, D, L = batch_size, options.num_tokens, options.hidden_size, options.depth
    flops: Counter[str] = Counter()
    flops["x_embedder"] = 2 * N * T * options.patch_size**2 * options.in_channels * D
    # With experts, gates of all timesteps are computed once per pass; else the batch's alone.
    num_t = options.num_timesteps if options.has_experts else N
    flops["t_embedder"] = 2 * num_t * (2 * NUM_FREQUENCIES * D + D * D)
    flops["blocks: adaLN"] = 2 * N * L * D * 6 * D
    flops["blocks: attention layers"] = 2 * N * T * L * 4 * D * D
    flops["blocks: attention products"] = 2 * N * T * L * 2 * T * D
    flops["blocks: mlp"] = 2 * N * T * L * 2 * D * options.mlp_hidden_size
    if options.has_experts:
        flops["gate"] = 2 * options.num_timesteps * L * options.num_experts * D
        flops["experts"] = L * _expert_flops(options, N)
    flops["final_layer"] = (
        2 * N * (D * 2 * D + T * D * options.patch_size**2 * options.out_channels)
    )
    return flops


def training_flops(options: NetworkOptions, batch_size: int) -> int:
    """Count forward and backward of one pass, without recomputation.

    The backward pass of a product is two products, of its two arguments' gradients; the layers
    that read data, which needs no gradient, save one.
    """
    flops = forward_flops(options, batch_size)
    num_t = options.num_timesteps if options.has_experts else batch_size
    of_data = flops["x_embedder"] + 2 * num_t * 2 * NUM_FREQUENCIES * options.hidden_size
    return 3 * flops.total() - of_data


def _expert_flops(options: NetworkOptions, batch_size: int) -> int:
    """Count the mixture of one block."""
    N, T, D, E = batch_size, options.num_tokens, options.hidden_size, options.num_experts
    if options.expert_kind == "mlp":
        return 2 * N * T * options.top_k * 2 * D * options.expert_hidden_size
    if not are_experts_merged(options):
        return 2 * N * T * options.top_k * D * D
    merging = 2 * N * E * (D * D + D)  # the samples' matrices and biases from the experts'
    return merging + 2 * N * T * D * D
