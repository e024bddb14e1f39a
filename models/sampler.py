"""Sample latents from noise: choose the timesteps to visit, then follow them with a solver.

For epsilon, v and x0: "ddim" (Song et al. 2021), "ddpm" (Ho et al. 2020), "dpmpp-2m" (DPM-Solver++
2M, Lu et al. 2022, arXiv 2211.01095). For rectified flow: "euler" and "heun".

dpmpp-2m, euler and heun are schedulers of diffusers. With the noise levels of our timesteps they
agree with a float64 reference. ddpm and ddim are ours, because those of diffusers do not fit:

    DDPMScheduler draws the noise of a step from a generator, but an image must not depend on the
    batch that it is drawn in. And it multiplies signal powers in float32.
    DDIMScheduler takes no timesteps: its steps are S // num_steps long, which is another grid. With
    the betas of the shorter chain it computes 1 - beta in float32, which has no digits left in the
    last steps of the cosine schedule.

N batch, C latent channels, H W latent size, S timesteps of training.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from models.diffusion import Diffusion
from models.guidance import Denoise

GAUSSIAN_METHODS = ("ddim", "ddpm", "dpmpp-2m")
FLOW_METHODS = ("euler", "heun")
SAMPLING_METHODS = GAUSSIAN_METHODS + FLOW_METHODS


def methods_for(objective: str) -> tuple[str, ...]:
    """Return the sampling methods that fit an objective, the default first."""
    return FLOW_METHODS if objective == "flow" else GAUSSIAN_METHODS


def visited_timesteps(
    diffusion: Diffusion, num_steps: int, method: str = "ddim", shift: float = 1.0
) -> list[int]:
    """Spread num_steps increasing timesteps over training's, the last (noise only) included.

    They are evenly spaced, rounded, and include the first, with two exceptions. For dpmpp-2m they
    are even in log(signal / sigma), the time variable of its equations; with evenly spaced
    timesteps its second order would not show in few steps. For flow, a shift moves the noise
    fractions u = (t + 1) / S to shift * u / (1 + (shift - 1) * u) (SD3, arXiv 2403.03206, Eq. 23).

    All are trained timesteps, each the nearest that is still free: the network and its gate never
    see a timestep that they were not trained at, and none twice.

    Args:
        diffusion: the process of training, with S timesteps.
        num_steps: from 1 to S.
        method: one of SAMPLING_METHODS.
        shift: for flow; 1 = none.
    """
    last = diffusion.num_timesteps - 1
    assert 1 <= num_steps <= last + 1, "num_steps must be between 1 and the number of timesteps"
    if num_steps == 1:
        return [last]
    even = [i * last / (num_steps - 1) for i in range(num_steps)]
    if method == "dpmpp-2m":
        log_ratio = torch.log(diffusion.signal / diffusion.sigma).cpu()
        wanted = torch.linspace(0.0, 1.0, num_steps, dtype=log_ratio.dtype)
        wanted = torch.lerp(log_ratio[0], log_ratio[-1], wanted)
        nearest = (wanted[:, None] - log_ratio).abs().argmin(1).tolist()
    elif shift == 1.0:
        nearest = [round(position) for position in even]
    else:
        fractions = [(position + 1.0) / (last + 1) for position in even]
        moved = [shift * u / (1.0 + (shift - 1.0) * u) for u in fractions]
        nearest = [round(u * (last + 1)) - 1 for u in moved]
    for i in reversed(range(num_steps - 1)):
        nearest[i] = min(nearest[i], nearest[i + 1] - 1)
    return [max(t, i) for i, t in enumerate(nearest)]


def respaced(
    diffusion: Diffusion, num_steps: int, method: str = "ddim", shift: float = 1.0
) -> Diffusion:
    """Return the chain that visits `visited_timesteps`."""
    return diffusion.respaced(visited_timesteps(diffusion, num_steps, method, shift))


@torch.no_grad()
def sample(
    denoise: Denoise,
    x_T: Tensor,
    *,
    diffusion: Diffusion,
    method: str,
    num_steps: int,
    shift: float = 1.0,
    step_noise: Callable[[int], Tensor] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Run the process backwards from noise.

    Args:
        denoise: maps x_t (N, C, H, W) float32 and the original timestep t (1,) int64, which all
            samples share, to a prediction (N, C or 2C, H, W) of the diffusion's objective.
        x_T: (N, C, H, W) standard normal numbers, on the device of `diffusion`.
        diffusion: the process of training; it is respaced here.
        method: one of `methods_for(diffusion.objective)`. "ddpm" draws every step from
            p(x_{t-1} | x_t); the others are deterministic.
        num_steps: steps; one call of `denoise` each, but two in heun's steps except the last.
        shift: see `visited_timesteps`; for flow.
        step_noise: for ddpm, returns the (N, C, H, W) noise of a step. Steps count from 0, in the
            order in which they are taken; the last one has no noise.
        on_step: called with the number of every finished step.

    Returns:
        x_0 (N, C, H, W) float32, final latents. Nothing is clipped.
    """
    assert method in methods_for(diffusion.objective), f"{method} is for another objective"
    assert method != "ddpm" or step_noise is not None, "ddpm draws noise at every step"
    assert shift == 1.0 or method in FLOW_METHODS, "only the times of flow are shifted"
    chain = respaced(diffusion, num_steps, method, shift)

    def predict(x: Tensor, index: int) -> Tensor:
        return denoise(x, chain.timesteps[index : index + 1])

    scheduled = None if method in ("ddim", "ddpm") else _Scheduled(method, chain, predict)
    x = x_T.float()
    for step in range(num_steps):
        index = num_steps - 1 - step
        if scheduled is not None:
            x = scheduled.step(x, index)
        elif method == "ddim":
            x = _ddim_step(chain, predict(x, index), x, index)
        else:
            noise = step_noise(step) if index > 0 else None
            x = _ddpm_step(chain, predict(x, index), x, index, noise)
        if on_step is not None:
            on_step(step)
    return x


def _ddpm_step(
    chain: Diffusion, prediction: Tensor, x: Tensor, index: int, noise: Tensor | None
) -> Tensor:
    """Draw x_{t-1} from p(x_{t-1} | x_t), or return its mean without noise (the last step)."""
    p = chain.p_mean_variance(prediction, x, _shared(index, x))
    return p.mean if noise is None else p.mean + torch.exp(0.5 * p.log_variance) * noise.to(x)


def _ddim_step(chain: Diffusion, prediction: Tensor, x: Tensor, index: int) -> Tensor:
    """Take the deterministic step: DDIM, Eq. 12 with sigma 0."""
    implied = chain.denoised(prediction, x, _shared(index, x))
    power = chain.alphas_cumprod_prev[index]
    return (power.sqrt() * implied.x_start + (1.0 - power).sqrt() * implied.noise).float()


def _shared(index: int, x: Tensor) -> Tensor:
    return torch.full((1,), index, dtype=torch.int64, device=x.device)


class _Scheduled:
    """A scheduler of diffusers on the timesteps of a chain.

    It is given x_0 (dpmpp-2m) or the velocity (euler, heun), so that what the network predicts is
    converted in one place, `Diffusion.denoised`.
    """

    def __init__(
        self, method: str, chain: Diffusion, predict: Callable[[Tensor, int], Tensor]
    ) -> None:
        import diffusers  # takes seconds, and training rarely gets here

        self.chain, self.predict = chain, predict
        # On the CPU: the scheduler computes its coefficients from them without waiting for a GPU.
        levels = chain.sigma.flip(0).cpu()
        if method == "dpmpp-2m":
            levels = levels / chain.signal.flip(0).cpu()
            # The last step, to no noise at all, is of first order: log(signal / sigma) is infinite.
            self.scheduler = diffusers.DPMSolverMultistepScheduler(
                solver_order=2, prediction_type="sample", final_sigmas_type="zero"
            )
        elif method == "euler":
            self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        else:
            self.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
            # It looks up the level of every call: the first, then predictor and corrector in turn.
            levels = torch.cat((levels[:1], levels[1:].repeat_interleave(2)))
        self.scheduler.set_timesteps(chain.num_steps)
        self.scheduler.set_begin_index(0)
        # Its own levels are float32 and, with heun, between the trained timesteps.
        self.scheduler.sigmas = torch.cat((levels, levels.new_zeros(1)))

    def step(self, x: Tensor, index: int) -> Tensor:
        """Go from x at step `index` of the chain to the step below it."""
        x = self._evaluate(x, index)
        if self.scheduler.order == 2 and index > 0:
            # The last step has no corrector: sigma 0 was not trained.
            x = self._evaluate(x, index - 1)
        return x

    def _evaluate(self, x: Tensor, index: int) -> Tensor:
        prediction = self.predict(x, index)
        if self.chain.objective == "flow":
            output = prediction.float()
        else:
            output = self.chain.denoised(prediction, x, _shared(index, x)).x_start
        # The scheduler ignores the time (0.0) and counts its calls.
        return self.scheduler.step(output, 0.0, x).prev_sample
