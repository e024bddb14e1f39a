"""Train the small image autoencoder whose latents the demo model learns.

    python data_tools/train_vae.py --output vae      # an hour on one CPU core

Without --images it draws the emoji of the OpenMoji font. The result is an ordinary diffusers
AutoencoderKL folder (fp16) with a README.md card. Latents are scaled by 1 / their standard
deviation on the training images, as in latent diffusion (arXiv 2112.10752, appendix).

N batch, M pictures, C latent channels, H W image size, h w latent size.
"""

import argparse
import copy
import math
import sys
import time
from pathlib import Path

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from data_tools.errors import ArgumentParser, ConfigError, refuse_below_one
from data_tools.process.entry_point import enter
from data_tools.user_files.paths import typed_path
from data_tools.vae.autoencoder import resolve_device
from data_tools.vae.vae_pictures import TrainingPictures, emoji_pictures, folder_pictures
from models.latents import PIXEL_CENTRE

BLOCK_OUT_CHANNELS = (24, 48, 80)  # three levels: latents are 4 times smaller than the image
LATENT_CHANNELS = 4
DOWNSAMPLE = 4
OPENMOJI_LICENCE = """
All emojis designed by OpenMoji, the open-source emoji and icon project (https://openmoji.org),
licence CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/). To be on the safe side the
weights, and pictures decoded with them, are to be treated as adapted material: they are offered
under CC BY-SA 4.0 too, with this attribution, and not under the licence of the code around them.
"""
# Crops make steps cheap; the last steps see whole pictures, because group normalisation takes its
# statistics over all positions and so depends on the picture's size.
CROP_STEPS_FRACTION = 0.85
WARMUP_STEPS = 50
KL_WEIGHT = 1e-4
MSE_WEIGHT = 2.0
GRADIENT_WEIGHT = 0.25
MAX_GRAD_NORM = 1.0


def make_vae() -> AutoencoderKL:
    """Build the network: one residual layer a block, no attention, 1.1 M parameters."""
    levels = len(BLOCK_OUT_CHANNELS)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=BLOCK_OUT_CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def to_input(pixels: np.ndarray, device: torch.device) -> Tensor:
    """uint8 (N, H, W, 3) to float (N, 3, H, W) in [-1, 1]; memory stays channels-last."""
    x = torch.from_numpy(np.ascontiguousarray(pixels)).to(device).permute(0, 3, 1, 2)
    return x.float() / PIXEL_CENTRE - 1


def psnr(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB; both (N, 3, H, W) in [-1, 1]."""
    mse = (x - reconstruction.clamp(-1, 1)).square().mean(dim=(1, 2, 3)) / 4  # peak 1, not 2
    return -10 * mse.clamp_min(1e-10).log10()


@torch.no_grad()
def held_out_psnr(vae: AutoencoderKL, pixels: np.ndarray, device: torch.device) -> float:
    """Average the PSNR over images, each decoded from its posterior mean."""
    total = 0.0
    for part in np.array_split(pixels, math.ceil(len(pixels) / 32)):
        x = to_input(part, device)
        total += psnr(x, vae.decode(vae.encode(x).latent_dist.mean).sample).sum().item()
    return total / len(pixels)


def training_batch(
    pictures: TrainingPictures, rng: np.random.Generator, batch_size: int, crop: int
) -> np.ndarray:
    """Draw pictures by family, cut one random window per batch, mirror each with probability 1/2.

    Returns:
        uint8 (batch_size, crop, crop, 3).
    """
    chosen = rng.choice(len(pictures.train), size=batch_size, p=pictures.train_weight)
    free = pictures.train.shape[1] - crop
    top, left = rng.integers(0, free + 1, size=2)
    batch = pictures.train[chosen, top : top + crop, left : left + crop]
    mirrored = rng.random(batch_size) < 0.5
    batch[mirrored] = batch[mirrored, :, ::-1]
    return batch


def vae_loss(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """L1 + squared error + differences of neighbours (sharp edges) + a light KL term."""
    posterior = vae.encode(x).latent_dist
    error = vae.decode(posterior.sample()).sample - x
    gradient_error = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = posterior.kl().mean() / x[0].numel()
    pixel_error = error.abs().mean() + MSE_WEIGHT * error.square().mean()
    return pixel_error + GRADIENT_WEIGHT * gradient_error + KL_WEIGHT * kl


def learning_rate(step: int, num_steps: int, peak: float) -> float:
    """Linear warm-up, then a half cosine down to 2 % of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / num_steps))
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * max(0.02, cosine)


@torch.no_grad()
def latent_draws(vae: AutoencoderKL, pixels: np.ndarray, device: torch.device) -> Tensor:
    """Encode at most 1,024 evenly spaced pictures, one posterior draw each: (M, C, h, w)."""
    chosen = pixels[:: max(1, len(pixels) // 1024)]
    generator = torch.Generator(device).manual_seed(0)
    draws = []
    for part in np.array_split(chosen, math.ceil(len(chosen) / 32)):
        posterior = vae.encode(to_input(part, device)).latent_dist
        draws.append(posterior.sample(generator))
    return torch.cat(draws)


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, draws: Tensor) -> None:
    """Give every latent channel mean 0 and standard deviation 1 without changing reconstructions.

    A diffusion model starts from noise that has these; one scaling factor for all channels cannot
    provide it. The affine map z -> (z - mean) / std goes into the encoder's last 1x1 convolution,
    its inverse into the decoder's first.

    Args:
        vae: changed in place.
        draws: (M, C, h, w) posterior draws of the training pictures.
    """
    mean, std = draws.mean(dim=(0, 2, 3)), draws.std(dim=(0, 2, 3))  # (C,), (C,)
    C = len(mean)
    inner, outer = vae.quant_conv, vae.post_quant_conv
    outer.bias += outer.weight[:, :, 0, 0] @ mean
    outer.weight *= std[None, :, None, None]
    inner.weight[:C] /= std[:, None, None, None]
    inner.bias[:C] = (inner.bias[:C] - mean) / std
    inner.bias[C:] -= 2 * std.log()  # the log-variances


def train(pictures: TrainingPictures, args: argparse.Namespace) -> None:
    """Run all steps; every --save-every steps measure, print and save."""
    device = args.device
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    vae = make_vae().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    started = time.monotonic()
    for step in range(args.steps):
        is_cropped = step < CROP_STEPS_FRACTION * args.steps
        crop = args.size // 2 if is_cropped else args.size
        count = args.batch_size if is_cropped else max(1, args.batch_size // 4)  # same pixels
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        x = to_input(training_batch(pictures, rng, count, crop), device)
        loss = vae_loss(vae, x)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        done = step + 1
        if done % args.save_every == 0 or done == args.steps:
            save(vae, pictures, args, done)
            per_step_sec = (time.monotonic() - started) / done
            print(f"about {per_step_sec * (args.steps - done):.0f} s left", flush=True)


def save(
    vae: AutoencoderKL, pictures: TrainingPictures, args: argparse.Namespace, step: int
) -> None:
    """Write the fp16 weights, the configuration and the card; print the held-out PSNR.

    All numbers are those of the weights as saved: normalised and rounded to fp16.
    """
    device = next(vae.parameters()).device
    saved = copy.deepcopy(vae).eval()  # and no new network, which would draw random numbers
    normalise_latents(saved, latent_draws(saved, pictures.train, device))
    saved.load_state_dict({name: x.half().float() for name, x in saved.state_dict().items()})
    std = latent_draws(saved, pictures.train, device).std().item()
    decibels = held_out_psnr(saved, pictures.held_out, device)
    saved.register_to_config(scaling_factor=round(1 / std, 5), sample_size=args.size)
    saved.to(memory_format=torch.contiguous_format).half().save_pretrained(args.output)
    text = card(saved, pictures, args, step, decibels, std)
    (args.output / "README.md").write_text(text, encoding="utf-8")
    print(f"step {step}/{args.steps}: held-out PSNR {decibels:.2f} dB", flush=True)


def card(
    vae: AutoencoderKL,
    pictures: TrainingPictures,
    args: argparse.Namespace,
    step: int,
    decibels: float,
    std: float,
) -> str:
    """Describe the weights: data, licence, command, numbers."""
    images = f"--images {' '.join(map(str, args.images))} " if args.images else ""
    licence = "" if args.images else OPENMOJI_LICENCE
    num_parameters = sum(parameter.numel() for parameter in vae.parameters())
    return f"""# Image autoencoder of the demo

An `AutoencoderKL` of diffusers: block_out_channels {BLOCK_OUT_CHANNELS}, {LATENT_CHANNELS} latent
channels, images reduced {DOWNSAMPLE} times, {num_parameters:,} parameters, stored in float16.

| | |
| --- | --- |
| data | {pictures.source}, {args.size} x {args.size} pixels on white |
| training pictures | {len(pictures.train)} |
| held-out pictures | {len(pictures.held_out)} (chosen by a hash of their names) |
| steps | {step} of {args.steps} |
| held-out PSNR | {decibels:.2f} dB (mean over pictures, decoded from the posterior mean) |
| latent standard deviation | {std:.4f} (posterior draws; each channel is normalised) |
| scaling factor | {1 / std:.5f} (1 / standard deviation; in `config.json`) |

Made by

    python data_tools/train_vae.py {images}--output FOLDER --size {args.size} \\
        --steps {args.steps} --batch-size {args.batch_size} --lr {args.lr} --seed {args.seed}

Another processor or number of threads rounds differently: repeating this gives similar weights,
not equal ones.
{licence}"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Define the flags and check their values."""
    parser = ArgumentParser(
        description="Train the small image autoencoder whose latents the demo model learns."
    )
    add = parser.add_argument
    add(
        "--images",
        type=typed_path,
        nargs="+",
        metavar="FOLDER",
        help="training images (default: all emoji of the OpenMoji font)",
    )
    add("--output", type=typed_path, required=True, metavar="FOLDER", help="of the diffusers model")
    add("--steps", type=int, default=7000, metavar="N", help="default: %(default)s")
    add(
        "--batch-size",
        type=int,
        default=16,
        metavar="N",
        help="crops of half the side per step (default: %(default)s)",
    )
    add("--size", type=int, default=64, metavar="PIXELS", help="default: %(default)s")
    add("--lr", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    add("--save-every", type=int, default=500, metavar="N", help="steps (default: %(default)s)")
    add("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    args = parser.parse_args(argv)
    refuse_below_one(args, "steps", "batch_size", "save_every")
    if args.size < 1 or args.size % (2 * DOWNSAMPLE):
        raise ConfigError(
            f"--size {args.size}: is not a positive multiple of {2 * DOWNSAMPLE}, so crops of half "
            f"of it cannot be reduced {DOWNSAMPLE} times; use a multiple of {2 * DOWNSAMPLE}."
        )
    if not args.lr > 0:
        raise ConfigError(f"--lr {args.lr}: must be positive.")
    if args.output.exists() and not args.output.is_dir():
        raise ConfigError(f"--output {args.output}: is a file; give a folder.")
    if (args.output / "config.json").exists():  # latents that it encoded need this very one
        raise ConfigError(f"--output {args.output}: holds a model already; give another folder.")
    args.device = resolve_device(args.device)
    return args


def main(argv: list[str] | None = None) -> None:
    """Train and save."""
    args = parse_arguments(argv)
    pictures = folder_pictures(args.images, args.size) if args.images else emoji_pictures(args.size)
    print(f"{len(pictures.train)} training pictures, {len(pictures.held_out)} held out", flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    train(pictures, args)


if __name__ == "__main__":
    enter(main)
