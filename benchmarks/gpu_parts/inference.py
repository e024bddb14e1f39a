"""Compare samplers with the CPU's; measure the network's and the VAE's precisions.

N images.
"""

import dataclasses

import torch
from diffusers import AutoencoderKL
from torch import nn

from benchmarks.gpu_parts.engines import undrawn_weights
from benchmarks.gpu_parts.layout import SMALL
from benchmarks.gpu_parts.record import Record, Setting, relative_error
from benchmarks.measure import best_seconds
from models.diffusion import Diffusion
from models.guidance import Guidance
from models.sampler import methods_for
from models.switch_dit import SwitchDiT
from training.config.network import network_options
from training.config.preset import load_preset
from training.sampling.latents import SamplerSettings, sample_latents

MAX_ERROR = 1e-3  # of sampled latents in fp32 without TF32
NUM_IMAGES, NUM_STEPS, SEED, SCALE = 2, 6, 3, 2.0
VAE_WIDTHS = (128, 256, 512, 512)  # Stable Diffusion's
PRECISIONS = {  # TF32 of products, and the weights' dtype
    "fp32": (False, torch.float32),
    "TF32": (True, torch.float32),
    "bf16": (False, torch.bfloat16),
}


def measure_inference(setting: Setting, record: Record) -> None:
    """Every sampler against the CPU; XL/2's network and a VAE in every precision."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad():
        for objective in ("epsilon", "flow"):
            _compare_samplers(setting, record, objective)
        _measure_network(setting, record)
        torch.backends.cudnn.allow_tf32 = True  # torch's default, with which data is encoded
        _measure_vae(setting, record)


def _compare_samplers(setting: Setting, record: Record, objective: str) -> None:
    torch.manual_seed(0)
    options = dataclasses.replace(SMALL, learned_variance=objective == "epsilon")
    model = SwitchDiT(options).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    for method in methods_for(objective):
        wanted = _draw(model, torch.device("cpu"), objective, method)
        got = _draw(model, setting.device, objective, method)
        error = relative_error(got, wanted)
        text = f"{objective}, {method}: error {error:.1e} of the CPU's latents, <= {MAX_ERROR:g}"
        record.check(error <= MAX_ERROR, text)


def _draw(model: nn.Module, device: torch.device, objective: str, method: str) -> torch.Tensor:
    return sample_latents(
        model.to(device),
        Diffusion(objective=objective, learned_variance=objective == "epsilon").to(device),
        SamplerSettings(method, NUM_STEPS, SEED, Guidance(SCALE)),
        indices=torch.arange(NUM_IMAGES, device=device),
        labels=torch.zeros(NUM_IMAGES, dtype=torch.int64, device=device),
        latent_shape=(SMALL.in_channels, *SMALL.input_size),
        null_class=SMALL.num_classes,
    )


def _measure_network(setting: Setting, record: Record) -> None:
    options, N = network_options(load_preset("xl")), setting.pick(64, 2)
    options = SMALL if setting.is_tiny else options.for_prediction()
    with undrawn_weights():
        model = SwitchDiT(options).eval()
    for name, (has_tf32, dtype) in PRECISIONS.items():
        if has_tf32 and not setting.is_gpu:
            continue
        torch.backends.cuda.matmul.allow_tf32 = has_tf32
        model.to(setting.device, dtype)
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
        x = torch.randn(N, options.in_channels, *options.input_size, device=setting.device)
        t = torch.full((1,), 500, device=setting.device)
        y = torch.zeros(N, dtype=torch.int64, device=setting.device)
        sec = best_seconds(lambda x=x, t=t, y=y: model(x, t, y), setting.device, 3)
        record.number(f"XL/2's network in {name}, images/s", N / sec)
    torch.backends.cuda.matmul.allow_tf32 = False


def _measure_vae(setting: Setting, record: Record) -> None:
    widths = (32, 32) if setting.is_tiny else VAE_WIDTHS
    N, side = setting.pick(16, 1), setting.pick(256, 32)
    vae = AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        latent_channels=4,
    ).eval()
    for dtype in (torch.float32, torch.bfloat16):
        for name, memory in (
            ("channels last", torch.channels_last),
            ("channels first", torch.contiguous_format),
        ):
            nn.Module.to(vae, device=setting.device, dtype=dtype, memory_format=memory)
            x = torch.randn(N, 3, side, side, device=setting.device, dtype=dtype)
            x = x.contiguous(memory_format=memory)
            z = vae.encode(x).latent_dist.mean.contiguous(memory_format=memory)
            kind = f"{str(dtype)[6:]}, {name}, images/s"
            sec = best_seconds(lambda x=x: vae.encode(x), setting.device, 3)
            record.number(f"VAE encodes in {kind}", N / sec)
            sec = best_seconds(lambda z=z: vae.decode(z), setting.device, 3)
            record.number(f"VAE decodes in {kind}", N / sec)
