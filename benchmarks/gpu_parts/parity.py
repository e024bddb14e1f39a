"""Compare a GPU's predictions and gradients with a CPU's in fp32, for every kind of network."""

import dataclasses

import torch

from benchmarks.gpu_parts.layout import SMALL, small_batch
from benchmarks.gpu_parts.record import Record, Setting, relative_error
from models.experts import StackedExperts
from models.network_options import NetworkOptions
from models.switch_dit import SwitchDiT

WEIGHT_STD = 0.05
LOSS_SCALE = 100.0
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 6e-2}  # of the relative error
KINDS = {
    "merged experts": {"expert_dispatch": "merged"},
    "dispatched experts": {"expert_dispatch": "dispatched"},
    "mlp experts": {"expert_kind": "mlp"},
    "normalised queries and keys": {"qk_norm": True},
    "dtr": {"routing": "dtr"},
    "dense": {"routing": "dense"},
    "recomputed activations": {"activation_checkpointing": True},
}
T_OF_SAMPLES = (3, 3, 500, 501, 900, 20)  # two alike, so that an expert may serve nobody


def compare_with_the_cpu(setting: Setting, record: Record) -> None:
    """Forward and gradients of every kind of network, in fp32 and bf16; starved experts."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for name, changes in KINDS.items():
        options = dataclasses.replace(SMALL, num_experts=4, depth=3, **changes)
        weights = _weights(options)
        wanted = _results(options, weights, torch.device("cpu"), torch.float32)
        for dtype, limit in LIMITS.items():
            got = _results(options, weights, setting.device, dtype)
            error = relative_error(got, wanted)
            text = f"{name}, {str(dtype)[6:]}: error {error:.1e} of the CPU's fp32, <= {limit:g}"
            record.check(error <= limit, text)
    _starve(setting, record)
    torch.backends.cudnn.allow_tf32 = True  # torch's default


def _weights(options: NetworkOptions) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = SwitchDiT(options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=WEIGHT_STD)
    return model.state_dict()


def _results(
    options: NetworkOptions,
    weights: dict[str, torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the prediction and every gradient, each divided by its largest number, in a row."""
    model = SwitchDiT(options)
    model.load_state_dict(weights)
    model = model.to(device, dtype)
    x, _, y = small_batch(torch.device("cpu"), len(T_OF_SAMPLES))
    t = torch.tensor(T_OF_SAMPLES)
    prediction = model(x.to(device), t.to(device), y.to(device)).prediction.float()
    (LOSS_SCALE * prediction.square().mean()).backward()
    gradients = [parameter.grad.float() for parameter in model.parameters()]
    tiny = torch.finfo(torch.float32).tiny
    parts = [prediction.detach(), *(g / g.abs().max().clamp(min=tiny) for g in gradients)]
    return torch.cat([part.flatten().cpu() for part in parts])


def _starve(setting: Setting, record: Record) -> None:
    """Multiply groups of no rows, in memory that held NaN (pytorch issues 172439 and 193633)."""
    options = dataclasses.replace(
        SMALL, num_experts=4, top_k=1, expert_kind="mlp", hidden_size=128, depth=1
    )
    model = SwitchDiT(options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=WEIGHT_STD)
    model = model.to(setting.device, torch.bfloat16)
    x, t, y = small_batch(setting.device, 4)
    for _ in range(3):
        stale = [torch.full_like(p, torch.nan) for p in model.parameters()]
        del stale
        model.zero_grad()
        output = model(x, torch.full_like(t, 500), y)  # all samples have one expert
        output.prediction.float().square().mean().backward()
        served = output.plan.expert_index.unique().tolist()
        idle = [i for i in range(options.num_experts) if i not in served]
        experts = next(m for m in model.modules() if isinstance(m, StackedExperts))
        is_zero = all(bool((p.grad[idle] == 0).all()) for p in experts.parameters())
        is_finite = all(bool(p.grad.isfinite().all()) for p in model.parameters())
        text = f"{len(idle)} experts that serve nobody have a gradient of exactly zero"
        record.check(bool(idle) and is_zero and is_finite, text)
