"""Encode pixels to moments and decode latents to pixels, with the image autoencoder.

Raw pixels are uint8 (N, H, W, 3). Raw latents are the posterior's moments, mean | log-variance on
the channel axis, unscaled. Final latents are what the model sees (models/latents.py).
"""

import copy
import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from data_tools.errors import ConfigError, count_of
from data_tools.process.accelerator import has_gpu
from data_tools.shards.manifest import VaeReference
from data_tools.vae.vae_files import REPOSITORY, load_model
from models.latents import PIXEL_CENTRE, decode, scale_and_shift

if TYPE_CHECKING:  # its import takes seconds, and training needs it only to draw samples
    from diffusers import AutoencoderKL

DEMO_VAE = REPOSITORY / "data_tools" / "demo_vae"


@dataclass(frozen=True, kw_only=True)
class Vae(VaeReference):
    """An autoencoder, and what a manifest says of it."""

    model: "AutoencoderKL"  # in evaluation mode, on its device
    latent_channels: int  # C
    downsample: int  # image side over latent side

    @property
    def reference(self) -> VaeReference:
        """What a manifest says of it."""
        return VaeReference(self.id, self.sha256, *self.normalisation)


def load_vae(
    source: str | Path, device: str | torch.device = "cpu", expected_sha256: str | None = None
) -> Vae:
    """Load an autoencoder from a diffusers folder, one .safetensors file, or the hub.

    Args:
        source: a path (relative ones are tried from the working folder, then from the repository),
            or a hub id such as stabilityai/sd-vae-ft-ema.
        expected_sha256: of the VAE that encoded the data, from its manifest; another VAE of the
            same shape would decode its latents into wrong pictures without any error.
    """
    model, source_id = load_model(source)
    model = model.float()
    config = model.config
    digest = _weights_sha256(model)
    if expected_sha256 not in (None, digest):
        raise ConfigError(
            f"--vae {source}: its weights (sha256 {digest[:12]}) are not those that encoded the "
            f"data ({expected_sha256[:12]}); give that VAE, or encode again with this one."
        )
    # The plain method: that of diffusers warns of modules to keep in fp32, of which this has none.
    torch.nn.Module.to(model, device=device, memory_format=torch.channels_last)
    mean, std = _statistics(source, config)
    return Vae(
        id=source_id,
        sha256=digest,
        scaling_factor=float(config.scaling_factor),
        shift_factor=float(config.get("shift_factor") or 0.0),
        latents_mean=mean,
        latents_std=std,
        model=model.eval().requires_grad_(False),
        latent_channels=int(config.latent_channels),
        downsample=2 ** (len(config.block_out_channels) - 1),
    )


def _statistics(source: str | Path, config: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Return latents_mean and latents_std of a VAE's configuration, both empty or both (C,)."""
    mean, std = (list(config.get(name) or ()) for name in ("latents_mean", "latents_std"))
    if not mean and not std:
        return [], []
    if len(mean) != config["latent_channels"] or len(std) != len(mean) or min(std) <= 0:
        raise ConfigError(
            f"--vae {source}: latents_mean {mean} and latents_std {std} of its "
            f"config.json are not {config['latent_channels']} numbers each, the latter positive; "
            "give both or neither."
        )
    if config.get("shift_factor"):
        raise ConfigError(
            f"--vae {source}: its config.json has a shift_factor ({config['shift_factor']}) and "
            "latents_mean, which both shift the latents; leave one of them out."
        )
    return list(map(float, mean)), list(map(float, std))


def with_dtype(vae: Vae, dtype: torch.dtype) -> Vae:
    """Return the same autoencoder with weights and arithmetic of another type, a copy."""
    model = copy.deepcopy(vae.model)
    torch.nn.Module.to(model, dtype=dtype)
    return dataclasses.replace(vae, model=model)


def load_decoder(
    named: str | Path | None, reference: VaeReference, device: str | torch.device = "cpu"
) -> Vae:
    """Load the autoencoder that decodes samples of a model trained on encoded images.

    Args:
        named: one that the user names on purpose, such as a decoder fine-tuned for the same
            latents; None = the one that encoded the data, and its checksum must agree.
        reference: of the data set's manifest.
    """
    if named is not None:
        vae = load_vae(named, device=device)
    else:
        vae = load_vae(reference.id, device=device, expected_sha256=reference.sha256)
    # What the model learned decides, and not what this VAE's configuration says.
    names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    learned = dict(zip(names, reference.normalisation, strict=True))
    vae.model.register_to_config(**{name: value or None for name, value in learned.items()})
    return dataclasses.replace(vae, **learned)


def _weights_sha256(model: "AutoencoderKL") -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


@torch.no_grad()
def encode_moments(vae: Vae, pixels: Tensor) -> Tensor:
    """Encode pixels to raw latents, without waiting for a GPU.

    Args:
        pixels: uint8 (N, H, W, 3), contiguous, on any device.

    Returns:
        float16 (N, 2C, H / downsample, W / downsample) on the VAE's device.
    """
    assert pixels.dtype == torch.uint8 and pixels.shape[-1] == 3, "pixels must be uint8 NHWC"
    parameter = next(vae.model.parameters())
    x = pixels.to(parameter.device, non_blocking=True)
    x = x.permute(0, 3, 1, 2)  # channels-last in memory, as the weights
    x = (x.float() / PIXEL_CENTRE - 1).to(parameter.dtype)
    return vae.model.encode(x).latent_dist.parameters.half()


def decode_pixels(vae: Vae, final_latents: Tensor) -> np.ndarray:
    """Decode final latents (N, C, h, w), N > 0, to pixels, uint8 (N, H, W, 3)."""
    normalisation = scale_and_shift(*vae.normalisation, final_latents.device)
    return decode(vae.model, final_latents, *normalisation).numpy()


def resolve_device(name: str | None) -> torch.device:
    """Turn --device into a device that exists; None takes a GPU where there is one."""
    if name is None:
        return torch.device("cuda" if has_gpu() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as err:
        raise ConfigError(f"--device {name}: no such device; use cpu, cuda or cuda:N.") from err
    if device.type == "cuda":
        found = torch.cuda.device_count()
        if (device.index or 0) >= found:
            raise ConfigError(
                f"--device {name}: this machine has {count_of(found, 'CUDA device')}; use "
                "--device cpu" + (f" or cuda:0 to cuda:{found - 1}." if found else ".")
            )
    elif device.type != "cpu":
        raise ConfigError(f"--device {name}: only cpu and cuda are supported; use one of them.")
    return device
