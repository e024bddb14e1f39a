"""The smallest autoencoder of Stable Diffusion's shape, with fresh weights."""

import torch
from diffusers import AutoencoderKL


def save_small_vae(folder, **numbers):
    """Save one with these numbers in its configuration; fp16 holds its weights exactly."""
    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=1,
        **numbers,
    )
    model.half().float().save_pretrained(folder)
    return folder
