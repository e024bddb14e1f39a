"""Compute the loss on held-out data at fixed timesteps: one number per noise level.

Sample i at timestep t always gets the same posterior draw and the same noise, whatever the run, its
seed, its batch size or the number of processes. No label is dropped and no image is mirrored.

N samples of a batch, T timesteps, C H W latent.
"""

from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_tools.errors import ConfigError
from data_tools.shards.manifest import DatasetManifest
from data_tools.storage.cache import ShardCache
from data_tools.stream.reader import SampleReader
from data_tools.stream.training_data import TrainingData, open_data
from models.diffusion import Diffusion
from models.latents import final_latents, frozen_latents, scale_and_shift
from models.randomness import Stream, normal
from models.switch_dit import SwitchDiT
from training.config.tree import Config
from training.config.validation import check_data
from training.evaluation.drawing import failing_together
from training.ranks.process_group import Ranks

SEED = 0  # no option: another one would be another loss
FLAG = "--validation-data"
TERMS = ("mse", "vlb", "x0_mse")


@dataclass(frozen=True)
class HeldOut:
    """Data that a run was not trained on.

    Attributes:
        data: to read.
        class_of_label: the run's class for each class of the data; empty without classes.
        num_samples: to use, from the first on; shards hold samples in a random order.
        timesteps: T of them, increasing.
    """

    data: TrainingData
    class_of_label: list[int]
    num_samples: int
    timesteps: list[int]


def open_held_out(
    text: str,
    config: Config,
    manifest: DatasetManifest,
    trained_on: str | None,
    num_samples: int,
    num_timesteps: int,
) -> HeldOut:
    """Check --validation-data.

    Args:
        text: as typed.
        config: of the run.
        manifest: of the data that the run was trained on.
        trained_on: hash of that data by the checkpoint; None = by the manifest.
        num_samples: to use at most.
        num_timesteps: T.
    """
    try:
        data = open_data(text)
        tried = replace(config.data, data=text, horizontal_flip=False)
        check_data(replace(config, data=tried), data.manifest)
    except ConfigError as err:
        raise ConfigError(str(err).replace("--data ", f"{FLAG} ", 1)) from err
    where, found = f"{FLAG} {text}", data.manifest
    if found.hash == (trained_on or manifest.hash):
        raise ConfigError(f"{where}: is what the run was trained on; give shards held out from it.")
    ours, theirs = ((m.vae.sha256, *m.vae.normalisation) for m in (manifest, found))
    if ours != theirs:
        raise ConfigError(
            f"{where}: was encoded by the VAE {theirs[0][:12]} ({_numbers(theirs)}), the run's "
            f"data by {ours[0][:12]} ({_numbers(ours)}); encode it with the run's VAE."
        )
    steps = config.diffusion.num_timesteps
    if not 1 <= num_timesteps <= steps:
        raise ConfigError(
            f"--validation-timesteps {num_timesteps} is not between 1 and the {steps} of the model."
        )
    middles = [int((k + 0.5) * steps / num_timesteps) for k in range(num_timesteps)]
    classes = _classes(where, config, manifest, found)
    return HeldOut(data, classes, min(num_samples, found.num_samples), middles)


def _numbers(space: tuple[Any, ...]) -> str:
    _, scale, shift, mean, std = space
    statistics = f", mean {mean}, std {std}" if mean else ""
    return f"scale {scale:g}, shift {shift:g}{statistics}"


def _classes(
    where: str, config: Config, manifest: DatasetManifest, found: DatasetManifest
) -> list[int]:
    """Return the run's class of each class of the data: numbers may differ, ids must not."""
    if config.model.num_classes == 0:
        return []
    ours = {entry.id: entry.index for entry in manifest.classes}
    unknown = [entry.id for entry in found.classes if entry.id not in ours]
    if unknown:
        raise ConfigError(
            f"{where}: has the class '{unknown[0]}', which the run was not trained on; leave such "
            "classes out."
        )
    return [ours[entry.id] for entry in found.classes]


def held_out_loss(
    model: SwitchDiT,
    diffusion: Diffusion,
    held_out: HeldOut,
    ranks: Ranks,
    device: torch.device,
    *,
    batch_size: int,
    cache: ShardCache | None = None,
) -> dict[str, Any]:
    """Compute the loss. All ranks must call this.

    Returns:
        For each term its mean and a list by timestep. mse is the error of what the network
        predicts and compares runs of one objective and schedule. x0_mse is the error of the clean
        latents that the prediction implies and compares objectives, too. vlb is the training's; it
        is 0 with a fixed variance.
    """
    data, is_frozen = held_out.data, held_out.data.manifest.is_frozen
    reader = SampleReader(data, data.stores("sha256", cache))
    starts = range(0, held_out.num_samples, batch_size)
    sums: dict[int, np.ndarray] = {}
    with failing_together(ranks), closing(reader):
        for start in starts[ranks.rank :: ranks.world_size]:
            ids = np.arange(start, min(start + batch_size, held_out.num_samples))
            raw = torch.empty(
                (len(ids), *data.manifest.latent.shape),
                dtype=getattr(torch, data.manifest.latent.dtype),
            )
            labels = reader.read(ids, np.zeros(len(ids), bool), raw)
            classes = np.array(held_out.class_of_label or [0])
            y = classes[labels] if held_out.class_of_label else np.zeros_like(labels)
            x_start = _clean(raw.to(device), torch.from_numpy(ids).to(device), data, is_frozen)
            sums[start] = _losses(
                model,
                diffusion,
                x_start,
                torch.from_numpy(y).to(device),
                torch.from_numpy(ids).to(device),
                held_out.timesteps,
            )
    if ranks.world_size > 1:
        everyone: list[dict[int, np.ndarray]] = [{} for _ in range(ranks.world_size)]
        torch.distributed.all_gather_object(everyone, sums)
        sums = {start: part for parts in everyone for start, part in parts.items()}
    # In the order of the batches, so that the number of ranks changes no digit.
    total = sum(sums[start] for start in starts) / held_out.num_samples  # (terms, T)
    return {
        term: {"mean": sum(values) / len(values), "by_timestep": values}
        for term, values in zip(TERMS, total.tolist(), strict=True)
    }


def _clean(raw: Tensor, ids: Tensor, data: TrainingData, is_frozen: bool) -> Tensor:
    """Turn stored latents into what the model sees, (N, C, H, W)."""
    scale, shift = scale_and_shift(*data.manifest.vae.normalisation, raw.device)
    if is_frozen:
        return frozen_latents(raw, scale, shift)
    shape = (len(raw), raw.shape[1] // 2, *raw.shape[2:])
    noise = normal(SEED, Stream.POSTERIOR, ids, shape[1] * shape[2] * shape[3]).view(shape)
    return final_latents(raw, noise, scale, shift)


@torch.no_grad()
def _losses(
    model: SwitchDiT,
    diffusion: Diffusion,
    x_start: Tensor,
    y: Tensor,
    ids: Tensor,
    timesteps: list[int],
) -> np.ndarray:
    """Sum the terms over samples, (terms, T) float64."""
    sums = np.zeros((len(TERMS), len(timesteps)))
    for k, timestep in enumerate(timesteps):
        positions = ids * diffusion.num_timesteps + timestep
        noise = normal(SEED, Stream.NOISE, positions, x_start[0].numel()).view(x_start.shape)
        t = torch.full((len(ids),), timestep, device=ids.device)
        x_t = diffusion.q_sample(x_start, t, noise)
        prediction = model(x_t, t[:1], y).prediction.float()
        mse, vlb = diffusion.loss_terms(prediction, x_start, x_t, t, noise)
        implied = diffusion.denoised(prediction, x_t, t).x_start
        x0_mse = (implied - x_start).square().flatten(1).mean(1)
        for row, values in zip(sums, (mse, vlb, x0_mse), strict=True):
            row[k] = values.double().sum().item()
    return sums
