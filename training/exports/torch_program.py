"""The denoiser as a program of torch.export, which torch runs without any of its Python code."""

from pathlib import Path

import torch
from torch import Tensor, nn

from models.switch_dit import SwitchDiT
from training.exports.job import ExportJob
from training.exports.pipeline_folder import describe_latents, describe_process

PROGRAM_FILE = "denoiser.pt2"
MAX_SAMPLES = 1 << 16


class Denoiser(nn.Module):
    """A network without anything but its prediction."""

    def __init__(self, network: SwitchDiT) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict for x_t (N, C, H, W), one timestep t (1,) int64 and labels y (N,) int64."""
        options = self.network.options
        last, null = options.num_timesteps - 1, options.num_classes
        # Beyond the trained ones a timestep would give a prediction that means nothing.
        torch._assert_async(((t >= 0) & (t <= last)).all(), f"t must be from 0 to {last}")
        torch._assert_async(((y >= 0) & (y <= null)).all(), f"y must be from 0 to {null}")
        return self.network(x_t, t, y).prediction


def write_program(job: ExportJob, folder: Path) -> str:
    """Write the program."""
    example = torch.zeros(3, *job.config.model.latent_shape)
    t, y = torch.zeros(1, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    # With one sample the network takes another way, so a program of any number cannot have one.
    samples = torch.export.Dim("samples", min=2, max=MAX_SAMPLES)
    with torch.no_grad():
        program = torch.export.export(
            Denoiser(job.load_model()),
            (example, t, y),
            dynamic_shapes=({0: samples}, None, {0: samples}),
        )
    torch.export.save(program, folder / PROGRAM_FILE)
    process, latents = describe_process(job), describe_latents(job)
    main, null = job.config.model.latent_channels, job.config.model.num_classes
    described = "\n".join(f"- {key}: {value}" for key, value in (process | latents).items())
    return f"""\
    import torch

    denoiser = torch.export.load("FOLDER/{PROGRAM_FILE}").module()
    prediction = denoiser(x_t, t, y)

x_t is float32 (N, {", ".join(map(str, job.config.model.latent_shape))}) with N of at least 2 (as
guidance has), t int64 (1,), the timestep of all samples, y int64 (N,), where {null} means "no
label". The first {main} channels of the prediction are what the objective says; further ones, if
there are any, are the variance's. Experts are merged inside. There is no sampler and no VAE in it:

{described}
"""
