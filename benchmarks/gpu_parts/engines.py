"""Build the real DeepSpeed engine for one process, and train it on made-up latents.

N micro-batch, C latent channels, S diffusion timesteps.
"""

import dataclasses
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu_parts.record import Setting
from data_tools.stream.loader import Batch
from models.switch_dit import MODEL_SIZES, ModelSize
from training.config.deepspeed_config import merge_deepspeed
from training.config.precision import Hardware
from training.config.preset import load_preset
from training.config.tree import Config
from training.engine.build import build_engine, set_learning_rate
from training.engine.interface import Engine
from training.engine.non_finite import poison_non_finite
from training.engine.objective import Objective
from training.monitoring.interval_sums import MetricSums
from training.ranks.process_group import discover_ranks, select_accelerator, start_process_group
from training.ranks.stop_signal import StopSignal

ROOT = Path(__file__).resolve().parents[2]
SCALING_FACTOR = 0.18215  # of Stable Diffusion's VAE
WEIGHT_STD = 0.02
NARROW = ModelSize(28, 64, 4)  # XL's depth; where weights lie depends on it, not on the width
DRAWING = ("xavier_uniform_", "kaiming_uniform_", "uniform_", "normal_")  # of torch.nn.init


def enter_group(setting: Setting) -> None:
    """Start a process group of this process alone, once."""
    if not torch.distributed.is_initialized():
        ranks = discover_ranks()
        device = select_accelerator(ranks)
        assert device.type == setting.device.type, f"{device} was chosen, not {setting.device}"
        start_process_group(ranks, device)


@contextmanager
def undrawn_weights() -> Iterator[None]:
    """Leave weights as memory was: to draw XL's on the host takes longer than to measure it."""
    drawing = {name: getattr(torch.nn.init, name) for name in DRAWING}
    for name in drawing:
        setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
    try:
        yield
    finally:
        for name, function in drawing.items():
            setattr(torch.nn.init, name, function)


@contextmanager
def narrow_network(size: str) -> Iterator[None]:
    """Build networks of a named size with XL's depth and a small width."""
    kept = MODEL_SIZES[size]
    MODEL_SIZES[size] = NARROW
    try:
        yield
    finally:
        MODEL_SIZES[size] = kept


def _drawn_on(
    device: torch.device, model: torch.nn.Module
) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Draw every weight on the device: products of zeros would be faster than real ones."""
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO 3 it is empty
        yield parameter, WEIGHT_STD * torch.randn(shape, device=device, generator=generator)


def release(device: torch.device) -> None:
    """Give back the memory of what is used no more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Trainer:
    """A real engine and all that a training step needs, on made-up latents.

    Attributes:
        config: the run's configuration.
        engine: DeepSpeed's.
        objective: of the run.
        merged: the DeepSpeed configuration.

    Args:
        setting: where.
        preset: of the network and the optimizer.
        stage_file: of ds_configs/, without its ending.
        batch_size: N.
        model: changes of the configuration's section `model`.
    """

    def __init__(
        self, setting: Setting, preset: str, stage_file: str, batch_size: int, **model: object
    ) -> None:
        enter_group(setting)
        config = load_preset(preset)
        self.config: Config = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, **model),
            optim=dataclasses.replace(config.optim, global_batch_size=batch_size),
        )
        path = ROOT / "ds_configs" / f"{stage_file}.json"
        # In bf16 wherever it runs: what is looked at here depends on it.
        self.merged = merge_deepspeed(path, self.config, 1, Hardware("acceptance", True))
        with undrawn_weights():
            values = partial(_drawn_on, setting.device)
            self.engine: Engine = build_engine(self.config, self.merged, values)
        self._device = device = setting.device
        model_config = self.config.model
        self.objective = Objective(self.config, 0, SCALING_FACTOR, 0.0, device)
        self.stop = StopSignal(device)
        self._sums = MetricSums(
            len(self.engine.module.blocks),
            self.engine.module.num_experts,
            self.config.diffusion.num_timesteps,
            device,
        )
        channels, *sides = model_config.latent_shape
        raw = torch.randn(batch_size, 2 * channels, *sides).half()
        labels = torch.arange(batch_size) % max(1, model_config.num_classes)
        self._batch = Batch(
            raw.pin_memory() if setting.is_gpu else raw, labels, torch.arange(batch_size)
        )

    def step(self, i: int) -> None:
        """Train one step as training/loop.py does, its metrics and its stop signal included."""
        set_learning_rate(self.engine, self.config.optim.lr)
        self.stop.post()
        micro_batch = self.objective.micro_batch(self._batch)
        output = self.engine(micro_batch.x_t, micro_batch.t, micro_batch.y, micro_batch.group_t)
        terms, samples = self.objective.loss(output, micro_batch, i)
        self.engine.backward(poison_non_finite(terms.total))
        self.engine.step()
        self._sums.add(i, terms, samples.mse, micro_batch.t, output.plan, wait_sec=0.0)
        self.stop.read()

    def close(self) -> None:
        """Give signals back, and the memory, which is held in circles."""
        self.stop.restore()
        self.engine.destroy()
        del self.engine, self.objective, self._sums
        release(self._device)
