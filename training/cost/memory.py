"""Compute the memory of a rank in closed form: the model's state under ZeRO, and activations.

N batch, T tokens, D width, L blocks, E experts, K experts per sample, S diffusion timesteps,
W ranks, R ranks of an expert-parallel group.
"""

from typing import NamedTuple

from models.flops import are_experts_merged
from models.layers import NUM_FREQUENCIES
from models.network_options import NetworkOptions

FP32_BYTES = 4
WEIGHT_BYTES = {"fp32": 4, "autocast": 4, "bf16": 2}
NUM_ADAM_MOMENTS = 2


class Memory(NamedTuple):
    """Bytes of a rank that grow with the model: no activations, no communication buckets."""

    weights: float
    gradients: float
    optimizer: float  # fp32 masters, moments, averaged weights


def model_memory(
    num_parameters: int,
    num_in_experts: int,
    *,
    stage: int,
    precision: str,
    world_size: int,
    expert_parallel_size: int,
    num_averages: int,
    num_in_matrices: int = 0,
    num_in_expert_matrices: int = 0,
) -> Memory:
    """Compute what each rank holds of weights, gradients and optimizer state.

    With D dense and X expert parameters, a rank has D + X / R parameters. ZeRO shards dense
    parameters over W ranks and experts over the W / R ranks that have the same ones: (D + X) / W
    are left in both cases. Stage 1 shards the optimizer, 2 also the gradients, 3 also the weights.
    Gradients accumulate in fp32; stage 1 in bf16 keeps the bf16 gradients as well. From stage 1 on
    there are fp32 masters even beside fp32 weights; at stage 0 the weights are fp32 and the only
    copy.

    Args:
        num_parameters: of the whole model, all experts included.
        num_in_experts: those of them that expert parallelism shares out.
        stage: ZeRO stage.
        precision: "bf16", "autocast" or "fp32".
        world_size: W.
        expert_parallel_size: R.
        num_averages: of the weights, each fp32.
        num_in_matrices: parameters that Muon updates, which keeps one moment of them.
        num_in_expert_matrices: those of them that expert parallelism shares out.
    """
    held = (num_parameters - num_in_experts) + num_in_experts / expert_parallel_size
    shard = num_parameters / world_size
    gradient_bytes = FP32_BYTES
    if stage == 1 and precision == "bf16":  # DeepSpeed's BF16_Optimizer
        gradient_bytes += WEIGHT_BYTES["bf16"]
    num_fp32_states = NUM_ADAM_MOMENTS + num_averages + (1 if stage > 0 else 0)
    of_matrices = num_in_matrices / world_size
    if stage == 0:
        of_matrices = num_in_matrices - num_in_expert_matrices * (1 - 1 / expert_parallel_size)
    values = num_fp32_states * (shard if stage >= 1 else held) - of_matrices
    return Memory(
        weights=WEIGHT_BYTES[precision] * (shard if stage >= 3 else held),
        gradients=gradient_bytes * (shard if stage >= 2 else held),
        optimizer=FP32_BYTES * values,
    )


def muon_traffic(num_in_matrices: int, *, stage: int, num_sharing: int, wire_bytes: int) -> float:
    """Bound the bytes that a rank sends to others in a step for Muon (training/engine/muon.py).

    At stage 3 a rank holds 1 / W of every matrix, and owns 1 / W of the matrices: what it holds and
    does not own goes out, and the results of what it owns and does not hold. It is less where a
    part of a fused parameter is a whole matrix, and at stages 1 and 2, where shards are runs of
    whole matrices but for those at their ends.

    Args:
        num_in_matrices: parameters of them that `num_sharing` ranks share out.
        stage: ZeRO stage.
        num_sharing: W, ranks that shard them; with expert parallelism of the size R, W / R for
            those of experts.
        wire_bytes: of a number on its way.
    """
    if stage == 0:
        return 0.0
    return 2 * num_in_matrices / num_sharing * (1 - 1 / num_sharing) * wire_bytes


class Activations(NamedTuple):
    """Bytes that a forward pass keeps for its backward pass."""

    kept: int  # until the backward pass reaches them
    recomputed: int  # in the backward pass, a block at a time, with activation checkpointing


def activation_bytes(options: NetworkOptions, batch_size: int, *, precision: str) -> Activations:
    """Count what a forward pass keeps. A compiled one keeps less.

    Attention is torch's kernel. Batched products (models/attention.py), on a CPU, keep
    2 N T T bytes more for each head of each block.

    Args:
        options: of the network.
        batch_size: N, of the micro-batch.
        precision: "bf16", "autocast" or "fp32".
    """
    N, T, D, L = batch_size, options.num_tokens, options.hidden_size, options.depth
    size = FP32_BYTES if precision == "fp32" else 2
    of_norm = FP32_BYTES if precision == "autocast" else size
    block = _block_bytes(options, N, size, of_norm)
    if precision == "autocast":
        block += size * _linear_parameters(options)  # bf16 copies of the weights
    is_recomputing = options.activation_checkpointing  # only the inputs of blocks are kept
    blocks = L * (N * T * D * size if is_recomputing else block)
    patches = N * T * options.patch_size**2 * options.in_channels * size
    final = N * T * (D * (2 * of_norm + size) + 2 * FP32_BYTES)
    kept = blocks + patches + final + _timestep_bytes(options, N, precision)
    return Activations(kept, block if is_recomputing else 0)


def _block_bytes(options: NetworkOptions, batch_size: int, size: int, of_norm: int) -> int:
    """Count one block.

    Args:
        options: of the network.
        batch_size: N.
        size: bytes of a number.
        of_norm: bytes of a number that enters or leaves a norm: autocast casts them to fp32 on an
            accelerator, not on a CPU, which therefore keeps up to a fifth less.
    """
    N, T, D = batch_size, options.num_tokens, options.hidden_size
    # Per token: both norms' inputs and outputs; what enters qkv and the MLP; q, k, v; what leaves
    # attention, its projection and the MLP; the MLP's hidden layer before and after GELU.
    per_token = 4 * D * of_norm + (2 + 3 + 3) * D * size + 2 * options.mlp_hidden_size * size
    per_token += (4 + options.num_heads) * FP32_BYTES  # statistics of norms and softmax
    if options.qk_norm:
        # Normalised queries and keys; in fp32, what was normalised, before and after its scale.
        per_token += 2 * D * size + 2 * D * FP32_BYTES * (1 if size == FP32_BYTES else 2)
        per_token += 2 * options.num_heads * FP32_BYTES
    # Conditioning: SiLU's output, six modulations, 1 + scale twice.
    per_sample = (1 + 6 + 2) * D * size
    if options.has_experts:
        per_token += 2 * D * size  # the stream before the mask, and the mask
        K, H = options.top_k, options.expert_hidden_size
        if options.expert_kind == "mlp":
            per_token += K * (3 * D + 2 * H) * size
        elif are_experts_merged(options):
            per_sample += D * D * size
        else:
            per_token += K * 3 * D * size
    return N * (T * per_token + per_sample)


def _linear_parameters(options: NetworkOptions) -> int:
    """Count a block's weights that autocast keeps a bf16 copy of."""
    D = options.hidden_size
    count = (4 + 6) * D * D + 2 * D * options.mlp_hidden_size
    if options.has_experts:
        is_affine = options.expert_kind == "affine"
        count += options.num_experts * D * (D if is_affine else 2 * options.expert_hidden_size)
    return count


def _timestep_bytes(options: NetworkOptions, batch_size: int, precision: str) -> int:
    """Count the timestep embedder and the gate, which run in fp32."""
    D, E = options.hidden_size, options.num_experts
    num_t = options.num_timesteps if options.has_experts else batch_size
    numbers = num_t * (2 * NUM_FREQUENCIES + 2 * D)
    weights = D * D  # fp32 copies of what gradients pass through
    if options.has_experts:
        numbers += num_t * (2 * D + options.depth * E)
        weights += options.depth * E * D
    return FP32_BYTES * (numbers + (weights if precision == "bf16" else 0))
