"""The options of a network, in one place.

A new option is declared here and, with the same name, as a key of the configuration; the module
that acts on it reads it from the NetworkOptions that it is built from.

C H W latents, T tokens, D width, E experts, P patch size.
"""

from dataclasses import dataclass, replace

MLP_RATIO = 4  # hidden width of a block's MLP over D, as in DiT


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """Everything that a SwitchDiT is built from.

    `dataclasses.asdict` gives a dictionary of JSON values; NetworkOptions(**dictionary) reads it.

    Attributes:
        input_size: H, W of the latents, multiples of patch_size.
        patch_size: P.
        in_channels: C.
        hidden_size: D.
        depth: number of blocks.
        num_heads: attention heads of a block; they divide hidden_size.
        num_classes: 0 for an unconditional model; the label num_classes means "no label".
        num_experts: E of every block. Like all options of experts and gates, it matters with
            routing "switch" only.
        top_k: experts that serve a sample.
        num_timesteps: of the diffusion process.
        learned_variance: predict variance channels too.
        routing: "switch", "dtr" or "dense" (routing.py).
        expert_kind: "affine" or "mlp".
        expert_hidden_ratio: hidden width of an mlp expert, relative to hidden_size.
        expert_dispatch: how affine experts multiply: "auto", "merged" or "dispatched".
        renormalize_gates: divide the top k gate values by their sum.
        dtr_alpha: exponent of a channel mask's position over timesteps.
        dtr_beta: fraction of channels that a channel mask leaves open.
        qk_norm: normalise queries and keys.
        attention_kernel: what computes attention: "auto", "fused" or "batched" (attention.py).
        has_loss_uncertainty: hold learnt weights of the loss per range of timesteps.
        activation_checkpointing: keep only the input of each block for the backward pass.
        compile_blocks: compile every block when it first runs.
        expert_parallel_size: ranks over which the experts of each block are shared out.
        shards_weights: ZeRO 3 will shard the weights; shared-out experts are marked for it.
    """

    input_size: tuple[int, int]
    patch_size: int
    in_channels: int
    hidden_size: int
    depth: int
    num_heads: int
    num_classes: int
    num_experts: int
    top_k: int
    num_timesteps: int = 1000
    learned_variance: bool = True
    routing: str = "switch"
    expert_kind: str = "affine"
    expert_hidden_ratio: float = 1.0
    expert_dispatch: str = "auto"
    renormalize_gates: bool = False
    dtr_alpha: float = 4.0
    dtr_beta: float = 0.8
    qk_norm: bool = False
    attention_kernel: str = "auto"
    has_loss_uncertainty: bool = False
    activation_checkpointing: bool = False
    compile_blocks: bool = False
    expert_parallel_size: int = 1
    shards_weights: bool = False

    def __post_init__(self) -> None:
        """Take input_size as JSON holds it, a list."""
        object.__setattr__(self, "input_size", tuple(self.input_size))

    def for_prediction(self) -> "NetworkOptions":
        """Return the same network without what matters in training only."""
        return replace(
            self,
            activation_checkpointing=False,
            compile_blocks=False,
            attention_kernel="auto",
            has_loss_uncertainty=False,
            expert_parallel_size=1,
            shards_weights=False,
        )

    @property
    def out_channels(self) -> int:
        """Channels of the output: 2 * in_channels with variance channels."""
        return 2 * self.in_channels if self.learned_variance else self.in_channels

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.input_size
        return height // self.patch_size, width // self.patch_size

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.grid[0] * self.grid[1]

    @property
    def mlp_hidden_size(self) -> int:
        """Hidden width of a block's MLP."""
        return MLP_RATIO * self.hidden_size

    @property
    def expert_hidden_size(self) -> int:
        """Hidden width of an mlp expert."""
        return max(1, int(self.expert_hidden_ratio * self.hidden_size))

    @property
    def has_experts(self) -> bool:
        """Whether blocks route samples through experts."""
        return self.routing == "switch"
