"""The two training steps that train_step.py compares, on equal weights and equal data.

N batch, C H W latents, S diffusion timesteps.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.official_way import OfficialWay, official_prior_loss
from models.diffusion import Diffusion
from models.prior import diffusion_prior, prior_loss
from models.switch_dit import MODEL_SIZES, SwitchDiT
from models.unit_matching import match_units
from training.config.preset import load_preset
from training.config.tree import Config
from training.engine.average_profiles import profiles_of
from training.engine.build import build_model
from training.engine.optimizer import EMAAdamW

PARAMETER_STD = 0.02  # of all parameters: a fresh model multiplies zeros
OFFICIAL = "official way"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Latents(NamedTuple):
    """A batch that both sides train on."""

    x_start: Tensor  # (N, C, H, W) fp32
    noise: Tensor  # (N, C, H, W) fp32
    t: Tensor  # (N,) int64
    y: Tensor  # (N,) int64


class Side(NamedTuple):
    """One way to train.

    Attributes:
        name: for the table.
        model: whose parameters are trained.
        loss: forward pass and loss, of a step's number.
        update: what follows the backward pass.
        is_merged: how experts are multiplied, for the closed form of the FLOPs.
        is_compiled: its blocks are.
    """

    name: str
    model: nn.Module
    loss: Callable[[int], Tensor]
    update: Callable[[], None]
    is_merged: bool
    is_compiled: bool

    def step(self, i: int) -> None:
        """Train one step."""
        self.loss(i).backward()
        self.update()


def config_of(size: str, *, compile_blocks: bool = False, checkpointing: bool = False) -> Config:
    """Return the preset of a size, changed as asked, with experts merged."""
    config = load_preset(size.lower())
    model = dataclasses.replace(
        config.model,
        expert_dispatch="merged",
        compile_blocks=compile_blocks,
        activation_checkpointing=checkpointing,
    )
    return dataclasses.replace(config, model=model)


def make_batch(config: Config, batch_size: int, device: torch.device) -> Latents:
    """Draw latents, noise, timesteps and labels."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, *config.model.latent_shape)
    num_timesteps, num_classes = config.diffusion.num_timesteps, config.model.num_classes
    return Latents(
        torch.randn(shape, generator=generator).to(device),
        torch.randn(shape, generator=generator).to(device),
        torch.randint(num_timesteps, (batch_size,), generator=generator).to(device),
        torch.randint(max(1, num_classes), (batch_size,), generator=generator).to(device),
    )


def our_side(config: Config, batch: Latents, dtype: torch.dtype) -> Side:
    """Train as this project does: weights in `dtype`, fp32 masters where that is bf16."""
    model = random_model(config, batch.x_start.device)
    prior, diffusion = _prior_and_diffusion(config, batch.x_start.device)
    optimizer = MasterOptimizer(model.to(dtype), config)

    def loss(i: int) -> Tensor:
        x_t = diffusion.q_sample(batch.x_start, batch.t, batch.noise)
        output = model(x_t, batch.t, batch.y)
        terms = diffusion.loss_terms(
            output.prediction.float(), batch.x_start, x_t, batch.t, batch.noise
        )
        units = match_units(output.gate_table.detach(), config.model.top_k, prior, seed=i)
        return _total(terms, prior_loss(output.gate_table, prior, batch.t, units))

    name = "ours"
    name += ", compiled" if config.model.compile_blocks else ""
    name += ", recomputing" if config.model.activation_checkpointing else ""
    is_compiled = config.model.compile_blocks
    return Side(name, model, loss, optimizer.step, is_merged=True, is_compiled=is_compiled)


def official_side(config: Config, batch: Latents, dtype: torch.dtype) -> Side:
    """Train the official way: fp32 weights, bf16 by autocast, AdamW, a loop for the average."""
    model = OfficialWay(random_model(config, batch.x_start.device))
    prior, diffusion = _prior_and_diffusion(config, batch.x_start.device)
    parameters = list(model.parameters())
    optim = config.optim
    optimizer = torch.optim.AdamW(parameters, lr=optim.lr, weight_decay=optim.weight_decay)
    averages = [p.detach().clone() for p in parameters]
    decay = optim.ema_decays[0]

    def loss(i: int) -> Tensor:
        x_t = diffusion.q_sample(batch.x_start, batch.t, batch.noise)
        is_mixed = dtype != torch.float32
        with torch.autocast(x_t.device.type, dtype=torch.bfloat16, enabled=is_mixed):
            prediction, gate_table = model(x_t, batch.t, batch.y)
        terms = diffusion.loss_terms(prediction.float(), batch.x_start, x_t, batch.t, batch.noise)
        prior_term = official_prior_loss(gate_table, config.model.top_k, prior, batch.t, seed=i)
        return _total(terms, prior_term)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for average, p in zip(averages, parameters, strict=True):
                average.mul_(decay).add_(p, alpha=1 - decay)

    return Side(OFFICIAL, model, loss, update, is_merged=False, is_compiled=False)


class MasterOptimizer:
    """EMAAdamW over fp32 masters of a model's parameters, as DeepSpeed keeps them.

    Args:
        model: whose weights are updated; fp32 weights are their own masters.
        config: with the optimizer's section.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        self._weights = list(model.parameters())
        is_fp32 = self._weights[0].dtype == torch.float32
        self._masters = (
            self._weights if is_fp32 else [nn.Parameter(p.detach().float()) for p in self._weights]
        )
        optim = config.optim
        self._optimizer = EMAAdamW(
            self._masters,
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            weight_decay=optim.weight_decay,
            profiles=profiles_of(optim),
            fused=True,
        )

    @torch.no_grad()
    def step(self) -> None:
        """Update masters, averages and weights; drop the gradients."""
        if self._masters is self._weights:
            self._optimizer.step()
        else:
            for master in self._masters:
                master.grad = torch.empty_like(master)
            torch._foreach_copy_([p.grad for p in self._masters], [p.grad for p in self._weights])
            self._optimizer.step()
            torch._foreach_copy_(self._weights, self._masters)
            for weight in self._weights:
                weight.grad = None
        self._optimizer.zero_grad()


def random_model(config: Config, device: torch.device) -> SwitchDiT:
    """Build the network with random weights in place of its zeros; equal for both sides."""
    model = build_model(config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=PARAMETER_STD)
    return model.to(device)


def _prior_and_diffusion(config: Config, device: torch.device) -> tuple[Tensor, Diffusion]:
    model, process = config.model, config.diffusion
    depth = MODEL_SIZES[model.size].depth
    prior = diffusion_prior(
        process.num_timesteps, depth, model.num_experts, model.top_k, alpha=process.prior_alpha
    )
    return prior.to(device), Diffusion(process.noise_schedule, process.num_timesteps).to(device)


def _total(terms: tuple[Tensor, Tensor], prior_term: Tensor) -> Tensor:
    mse, vlb = terms
    return mse.mean() + vlb.mean() + prior_term
