"""From noise to latents: respaced chains, DDPM and DDIM steps, classifier-free guidance.

N batch, C latent channels, H W latent size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from models.diffusion import Diffusion

SAMPLING_METHODS = ("ddpm", "ddim")

Denoise = Callable[[Tensor, Tensor], Tensor]


def respaced(diffusion: Diffusion, num_steps: int) -> Diffusion:
    """Return the chain that visits num_steps evenly spaced timesteps, the first and last included.

    A single step starts from the last timestep, where there is noise only.
    """
    last = diffusion.num_timesteps - 1
    assert 1 <= num_steps <= last + 1, "num_steps must be between 1 and the number of timesteps"
    stride = last / max(num_steps - 1, 1)
    timesteps = [last] if num_steps == 1 else [round(i * stride) for i in range(num_steps)]
    chain = Diffusion(diffusion.noise_schedule, diffusion.num_timesteps, timesteps)
    return chain.to(diffusion.timesteps.device)


@torch.no_grad()
def sample(
    denoise: Denoise,
    x_T: Tensor,
    *,
    diffusion: Diffusion,
    method: str,
    num_steps: int,
    step_noise: Callable[[int], Tensor] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Run the chain backwards from noise.

    Args:
        denoise: maps x_t (N, C, H, W) float32 and the original timesteps t (N,) int64 to a
            prediction (N, 2C, H, W).
        x_T: (N, C, H, W) standard normal numbers, on the device of `diffusion`.
        diffusion: the chain of training; it is respaced here.
        method: "ddpm" draws every step from p(x_{t-1} | x_t); "ddim" is the deterministic limit
            (Song et al. 2021, Eq. 12 with sigma 0).
        num_steps: how often the model is called.
        step_noise: for ddpm, returns the (N, C, H, W) noise of a step. Steps count from 0, in the
            order in which they are taken; the last one has no noise.
        on_step: called with the number of every finished step.

    Returns:
        x_0 (N, C, H, W) float32, final latents. Nothing is clipped.
    """
    assert method in SAMPLING_METHODS, f"unknown sampling method {method}"
    assert method == "ddim" or step_noise is not None, "ddpm draws noise at every step"
    chain = respaced(diffusion, num_steps)
    x = x_T.float()
    for step in range(num_steps):
        index = num_steps - 1 - step
        t = torch.full((x.shape[0],), index, dtype=torch.int64, device=x.device)
        p = chain.p_mean_variance(denoise(x, chain.timesteps[t]), x, t)
        if method == "ddim":
            signal = chain.alphas_cumprod_prev[index]
            x = (signal.sqrt() * p.pred_x_start + (1.0 - signal).sqrt() * p.noise).float()
        elif index > 0:
            x = p.mean + torch.exp(0.5 * p.log_variance) * step_noise(step).to(x)
        else:
            x = p.mean
        if on_step is not None:
            on_step(step)
    return x


def guided_denoise(
    model_fn: Callable[[Tensor, Tensor, Tensor], Tensor],
    y: Tensor,
    null_class: int,
    cfg_scale: float,
) -> Denoise:
    """Wrap a model for `sample`, with classifier-free guidance (Ho and Salimans 2022).

    All noise channels are guided; the variance channels are the conditional ones. With cfg_scale
    1 the unconditional half, which would cancel, is not computed.

    Args:
        model_fn: maps x_t (M, C, H, W), t (M,), labels (M,) to a prediction (M, 2C, H, W); M is N,
            or 2N when guiding, conditional samples first.
        y: (N,) int64 labels.
        null_class: the label that means "no label".
        cfg_scale: 1 is no guidance; larger follows the label more closely.
    """
    if cfg_scale == 1.0:
        return lambda x, t: model_fn(x, t, y)
    labels = torch.cat((y, torch.full_like(y, null_class)))

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        prediction = model_fn(torch.cat((x, x)), torch.cat((t, t)), labels).float()
        conditional, unconditional = prediction.chunk(2, dim=0)
        noise, variance_channels = conditional.chunk(2, dim=1)
        without_label = unconditional.chunk(2, dim=1)[0]
        guided = without_label + cfg_scale * (noise - without_label)
        return torch.cat((guided, variance_channels), dim=1)

    return denoise
