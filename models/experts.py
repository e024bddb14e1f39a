"""The experts of one block: affine maps (Switch-DiT, arXiv 2403.09176) or two-layer MLPs.

Affine experts of a sample merge exactly: with gate values g,
sum_e g_e (x W_e + b_e) = x (sum_e g_e W_e) + sum_e g_e b_e. One merged matrix per sample replaces
K products and all sorting of samples. MLPs do not merge: samples are grouped by expert, and each
group is multiplied by its expert. The plan (gate.py) says what a forward pass does.

Every expert takes part in every pass, chosen or not. An idle expert's gradient is then zero and not
missing: DeepSpeed's ZeRO needs the same gradients on every rank.

N batch, T tokens, D width, H hidden width, E experts held by this rank, K experts per sample, P
pairs of a sample and one of its experts.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.gate import ExpertProduct, ExpertRows

# A merged matrix costs as much as the products of about this many tokens, forward and backward:
# for each sample, and for each expert that goes into it. From benchmarks/experts.py in fp32 on one
# CPU core, D = 384 and 768: with K = 2 both ways are even at 40 to 60 tokens; at 16 tokens merging
# takes up to 4 times as long, at 256 tokens half as long. With K = 1 it saves no product, and at
# 256 tokens both are even. At D = 128 merging is better still, but either is quick.
MERGE_TOKENS = 32
MERGE_TOKENS_PER_EXPERT = 2

# On a GPU, in bf16, by counting; measured on none. Per sample, forward and backward, merging takes
# six passes over a matrix of D * D: written, read by two products, its gradient written and read
# twice; the products hide behind them. Dispatching takes products of 6 K T D * D FLOP, and gathers,
# weights and adds K T D numbers.
MERGE_BYTES = 12  # for each number of a merged matrix
DISPATCH_BYTES = 32  # for each number of a dispatched sample
FLOP_PER_BYTE = 160  # that a GPU reaches in the same time: A100 about 135, H200 146, H100 210

GROUPED_ALIGNMENT = 16  # bytes; torch's grouped product takes rows and addresses of multiples of it
GROUPED_MAJORS = (9, 10)  # of the compute capability: GPUs for which it is one kernel


class StackedExperts(nn.Module, ABC):
    """Experts whose parameters are stacked: every parameter is (E, ...).

    `state_dict()` lists them one by one as `deepspeed_experts.I.NAME`, because DeepSpeed's
    checkpoints know experts by these names only. Loading accepts both forms.
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self._naming_hooks = (
            self.register_state_dict_post_hook(_unstack_experts),
            self.register_load_state_dict_pre_hook(_stack_experts),
        )

    def present_stacked(self) -> None:
        """Show the parameters in `state_dict()` as they are, for programs that set them by name."""
        for hook in self._naming_hooks:
            hook.remove()

    @abstractmethod
    def choose_product(
        self, num_tokens: int, top_k: int, *, is_shared: bool = False
    ) -> ExpertProduct:
        """Say how these experts multiply, and so what a plan must hold.

        The answer is the same on all ranks.

        Args:
            num_tokens: T.
            top_k: K.
            is_shared: all samples have the same gate values.
        """

    @abstractmethod
    def forward(self, x: Tensor, expert_weight: Tensor, rows: ExpertRows | None) -> Tensor:
        """Return the sum over experts of g_e expert_e(x).

        Args:
            x: (N, T, D); N may be 0, and every expert still gets a gradient, zero.
            expert_weight: (N, E) gate values g, zero for experts that a sample does not use; with
                (1, E) all samples share them.
            rows: the samples grouped by expert; None if experts are merged.
        """


class AffineExperts(StackedExperts):
    """Experts x W_e + b_e, zero at initialisation."""

    def __init__(self, hidden_size: int, num_experts: int, dispatch: str = "auto") -> None:
        """Build them.

        Args:
            hidden_size: D.
            num_experts: E.
            dispatch: "merged" = one matrix per sample; "dispatched" = samples grouped by expert;
                "auto" = the cheaper one.
        """
        super().__init__(num_experts)
        self.hidden_size, self.dispatch = hidden_size, dispatch
        self.weight = nn.Parameter(
            torch.zeros(num_experts, hidden_size, hidden_size)
        )  # (E, in, out)
        self.bias = nn.Parameter(torch.zeros(num_experts, hidden_size))

    def choose_product(
        self, num_tokens: int, top_k: int, *, is_shared: bool = False
    ) -> ExpertProduct:
        """Merge if told to, or if it is cheaper."""
        if is_shared:
            return ExpertProduct.MERGED
        grouped = _grouped_or_loop(self.weight, self.hidden_size)
        if self.dispatch != "auto":
            return ExpertProduct.MERGED if self.dispatch == "merged" else grouped
        top_k = min(top_k, self.num_experts)
        device_type = self.weight.device.type
        if merging_is_cheaper(num_tokens, self.num_experts, top_k, self.hidden_size, device_type):
            return ExpertProduct.MERGED
        # A loop makes the host wait for an accelerator; merging does not.
        has_wait = grouped is ExpertProduct.LOOP and device_type != "cpu"
        return ExpertProduct.MERGED if has_wait else grouped

    def forward(self, x: Tensor, expert_weight: Tensor, rows: ExpertRows | None = None) -> Tensor:
        """Return sum_e g_e (x W_e + b_e), (N, T, D); the arguments are the base class's."""
        gates = expert_weight.to(self.weight.dtype)
        bias = (gates @ self.bias).unsqueeze(1)  # (N, 1, D)
        if rows is not None:
            products = _product(x.index_select(0, rows.samples), self.weight, rows)
            return _combine(products, gates, bias.expand_as(x), rows)
        D = x.shape[-1]
        weight = (gates @ self.weight.flatten(1)).view(-1, D, D)  # one matrix per row of gates
        if _are_shared(gates, x):
            return affine(x, weight[0], bias[0, 0])
        return torch.baddbmm(bias, x, weight)


class MlpExperts(StackedExperts):
    """Experts GELU(x W1_e + b1_e) W2_e + b2_e, the second layer zero at initialisation."""

    def __init__(
        self, hidden_size: int, num_experts: int, mlp_size: int, first: int = 0, total: int = 0
    ) -> None:
        """Build experts `first` to `first + num_experts` of `total`.

        All `total` are drawn, whichever are kept: how experts are shared out over ranks changes
        no initial value.

        Args:
            hidden_size: D.
            num_experts: E.
            mlp_size: H.
            first: number of the first of them among all experts of the block.
            total: experts of the block; 0 = E.
        """
        super().__init__(num_experts)
        D, H = hidden_size, mlp_size
        self.hidden_size, self.mlp_size = D, H
        drawn = [torch.empty(D, H) for _ in range(total or num_experts)]
        for matrix in drawn:
            # Its result is not used: diffusers turns these functions off while it loads a model.
            nn.init.xavier_uniform_(matrix)
        self.fc1_weight = nn.Parameter(torch.stack(drawn[first : first + num_experts]))  # (E, D, H)
        self.fc1_bias = nn.Parameter(torch.zeros(num_experts, H))
        self.fc2_weight = nn.Parameter(torch.zeros(num_experts, H, D))
        self.fc2_bias = nn.Parameter(torch.zeros(num_experts, D))

    def choose_product(
        self, num_tokens: int, top_k: int, *, is_shared: bool = False
    ) -> ExpertProduct:
        """Multiply grouped where torch can."""
        if is_shared:
            return ExpertProduct.GROUPED  # no group is multiplied, but they name the experts
        return _grouped_or_loop(self.fc1_weight, self.hidden_size, self.mlp_size)

    def forward(self, x: Tensor, expert_weight: Tensor, rows: ExpertRows | None) -> Tensor:
        """Return sum_e g_e MLP_e(x), (N, T, D); the arguments are the base class's."""
        assert rows is not None, "MLP experts cannot be merged"
        gates = expert_weight.to(self.fc1_weight.dtype)
        bias = (gates @ self.fc2_bias).unsqueeze(1)  # (N, 1, D)
        if _are_shared(gates, x):
            return self._as_one_mlp(x, gates[0, rows.experts], bias[0, 0], rows.experts)
        hidden = _product(x.index_select(0, rows.samples), self.fc1_weight, rows)  # (P, T, H)
        hidden = hidden + self.fc1_bias[rows.experts].unsqueeze(1).to(hidden.dtype)
        products = _product(F.gelu(hidden, approximate="tanh"), self.fc2_weight, rows)
        return _combine(products, gates, bias.expand_as(x), rows)

    def _as_one_mlp(self, x: Tensor, gates: Tensor, bias: Tensor, experts: Tensor) -> Tensor:
        """Apply the K experts that all samples share, side by side: one MLP of width K * H."""
        fc1 = self.fc1_weight[experts].transpose(0, 1).flatten(1)  # (D, K * H)
        fc2 = (self.fc2_weight[experts] * gates[:, None, None]).flatten(0, 1)  # (K * H, D)
        hidden = affine(x, fc1, self.fc1_bias[experts].flatten())
        return affine(F.gelu(hidden, approximate="tanh"), fc2, bias)


def _are_shared(gates: Tensor, x: Tensor) -> bool:
    """Tell whether all samples have the same gate values.

    Not if there is one sample: an expert-parallel rank that happens to receive one would compute
    its gradients in another order than the other ranks, and ZeRO 1 and 2 would average gradients
    of different parameters with each other.
    """
    # Not len(), which torch.export would take for a constant.
    return gates.shape[0] == 1 < x.shape[0]


def merging_is_cheaper(
    num_tokens: int, num_experts: int, top_k: int, hidden_size: int, device_type: str = "cpu"
) -> bool:
    """Say whether one merged matrix per sample costs less than a product per chosen expert.

    On a CPU the unit is one token's product, D * D multiplications. Merged experts cost T for the
    product and a constant for the matrix, which is bound by memory; dispatched ones cost K * T. On
    other devices the unit is the time in which D bytes are moved. In both rules the batch cancels,
    on a CPU the width too, elsewhere the number of experts.

    A merged pass keeps N * D * D numbers for the backward pass, a dispatched one 2 * N * K * T * D.
    """
    if device_type == "cpu":
        merging = MERGE_TOKENS + MERGE_TOKENS_PER_EXPERT * num_experts
        return num_tokens + merging < top_k * num_tokens
    per_number = 6 * hidden_size / FLOP_PER_BYTE + DISPATCH_BYTES
    return MERGE_BYTES * hidden_size < top_k * num_tokens * per_number


def _grouped_or_loop(weight: Tensor, *sizes: int) -> ExpertProduct:
    """Choose torch's grouped product where it is one kernel, for parameters of these widths.

    Where it is not (in float32, on other GPUs), torch loops over the groups with sizes that it
    fetches from the device in every call; our loop gets them from the plan, once for all blocks.
    """
    device, dtype = weight.device, _product_dtype(weight)
    is_aligned = all(size * dtype.itemsize % GROUPED_ALIGNMENT == 0 for size in sizes)
    if not (hasattr(F, "grouped_mm") and dtype is torch.bfloat16 and is_aligned):
        return ExpertProduct.LOOP
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] not in GROUPED_MAJORS:
        return ExpertProduct.LOOP
    return ExpertProduct.GROUPED


def _product_dtype(weight: Tensor) -> torch.dtype:
    kind = weight.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Map (N, T, in) by (in, out) to (N, T, out)."""
    return torch.addmm(bias, x.flatten(0, 1), weight).unflatten(0, x.shape[:2])


def _product(samples: Tensor, weight: Tensor, rows: ExpertRows) -> Tensor:
    """Multiply samples (P, T, in), grouped by expert, by their experts' (E, in, out)."""
    if rows.counts is not None:
        return _loop_product(samples, weight, rows.counts)
    if samples.shape[0] == 0:
        return _loop_product(samples, weight, torch.zeros(weight.shape[0], dtype=torch.int64))
    dtype = _product_dtype(weight)  # autocast does not know this product
    T = samples.shape[1]
    flat, weight = samples.flatten(0, 1).to(dtype), weight.to(dtype)
    if weight.requires_grad and torch.is_grad_enabled():
        weight = _WithoutStarved.apply(weight, rows.ends)
    # GPUs refuse a weight at another address. Storages begin aligned; compiled code sees to it.
    offset = 0 if torch.compiler.is_compiling() else weight.storage_offset() * dtype.itemsize
    if offset % GROUPED_ALIGNMENT:
        weight = weight.clone()
    return F.grouped_mm(flat, weight, offs=rows.ends * T).unflatten(0, (-1, T))


class _WithoutStarved(torch.autograd.Function):
    """The weight itself; its gradient is zero for experts without samples.

    On GPUs of major 10 torch leaves what was in memory there (pytorch/pytorch issue 172439).
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(ends)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        (ends,) = ctx.saved_tensors
        is_starved = ends.diff(prepend=ends.new_zeros(1)) == 0
        return gradient.masked_fill(is_starved[:, None, None], 0.0), None


# Numbers of samples differ from step to step, and torch.compile would specialise on each of them.
@torch.compiler.disable
def _loop_product(samples: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    parts = samples.split(counts.tolist())
    # unbind, not indexing: its backward stacks the experts' gradients in one copy.
    return torch.cat([part @ of_one for part, of_one in zip(parts, weight.unbind(0), strict=True)])


def _combine(products: Tensor, gates: Tensor, bias: Tensor, rows: ExpertRows) -> Tensor:
    """Add the experts' products (P, T, D), times their gate values (N, E), to bias (N, T, D)."""
    gate = gates[rows.samples, rows.experts][:, None, None].to(products.dtype)
    return bias.to(products.dtype).index_add(0, rows.samples, products * gate)


def _unstack_experts(
    module: StackedExperts, state_dict: dict[str, Any], prefix: str, _metadata: Any
) -> None:
    for kind, _ in module.named_parameters():
        stacked = state_dict.get(prefix + kind)
        # Under ZeRO 3 the parameter is an empty placeholder, which cannot be taken apart.
        if stacked is None or stacked.shape[:1] != (module.num_experts,):
            continue
        del state_dict[prefix + kind]
        for i, tensor in enumerate(stacked.unbind(0)):
            state_dict[f"{prefix}deepspeed_experts.{i}.{kind}"] = tensor


def _stack_experts(
    module: StackedExperts, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    for kind, _parameter in module.named_parameters():
        names = [f"{prefix}deepspeed_experts.{i}.{kind}" for i in range(module.num_experts)]
        if all(name in state_dict for name in names):
            state_dict[prefix + kind] = torch.stack([state_dict.pop(name) for name in names])
