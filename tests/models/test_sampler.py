"""The samplers against float64 loops and against data whose best denoiser is known."""

import diffusers
import numpy as np
import pytest
import torch

from models.diffusion import Diffusion
from models.randomness import Stream, normal
from models.sampler import methods_for, respaced, sample, visited_timesteps
from tests.support import reference_sampling as reference

PAIRS = [(o, m) for o in ("epsilon", "v", "x0", "flow") for m in methods_for(o)]
ODE_PAIRS = [(objective, method) for objective, method in PAIRS if method != "ddpm"]


def random_latents(num_samples=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_samples, 4, 4, 4, generator=generator)


def network(xp, x, t):
    """A smooth "network" for torch and NumPy."""
    return xp.tanh(x) * np.cos(t / 300) + 0.3 * xp.sin(2 * x)


def denoise_with(diffusion, variance=0.0):
    """The network as `sample` calls it, with variance channels if the process has them."""

    def denoise(x, t):
        (timestep,) = set(t.tolist())
        main = network(torch, x, timestep)
        if not diffusion.learned_variance:
            return main
        return torch.cat((main, torch.full_like(main, variance)), dim=1)

    return denoise


def best_denoiser(diffusion, mean, std):
    """The exact denoiser of N(mean, std^2) data; with std 0, of the data set that holds `mean`."""

    def denoise(x, t):
        signal, sigma = (
            table[t].view(-1, 1, 1, 1) for table in (diffusion.signal, diffusion.sigma)
        )
        best = reference.best_prediction(diffusion.objective, x, signal, sigma, mean, std).float()
        if not diffusion.learned_variance:
            return best
        return torch.cat((best, torch.ones_like(best)), dim=1)

    return denoise


def step_noise_of(shape):
    positions = torch.arange(shape[0])
    count = int(np.prod(shape[1:]))
    return lambda step: normal(step, Stream.SAMPLE_STEP, positions, count).view(shape)


class TestVisitedTimesteps:
    @pytest.mark.parametrize("num_steps", [2, 10, 250, 1000])
    def test_a_respaced_chain_keeps_the_process_at_the_visited_timesteps(self, num_steps):
        full = Diffusion()

        chain = respaced(full, num_steps)

        assert chain.num_steps == num_steps
        assert chain.timesteps[0] == 0 and chain.timesteps[-1] == 999
        assert (chain.timesteps.diff() > 0).all()
        assert torch.equal(chain.alphas_cumprod, full.alphas_cumprod[chain.timesteps])

    def test_ten_steps_visit_every_111th(self):
        assert visited_timesteps(Diffusion(), 10) == list(range(0, 1000, 111))

    @pytest.mark.parametrize("num_timesteps", [2, 7, 1000])
    @pytest.mark.parametrize(
        ("objective", "method", "shift"),
        [
            ("epsilon", "ddim", 1.0),
            ("epsilon", "dpmpp-2m", 1.0),
            ("flow", "euler", 1.0),
            ("flow", "euler", 0.2),
            ("flow", "euler", 6.0),
        ],
    )
    def test_none_is_visited_twice_and_the_last_always(
        self, num_timesteps, objective, method, shift
    ):
        diffusion = Diffusion("cosine", num_timesteps, objective=objective)

        for num_steps in range(1, num_timesteps + 1, max(1, num_timesteps // 9)):
            found = visited_timesteps(diffusion, num_steps, method, shift)

            assert len(found) == num_steps
            assert found[-1] == num_timesteps - 1 and found[0] >= 0
            assert all(low < high for low, high in zip(found, found[1:], strict=False))

    def test_a_shift_moves_noise_fractions_to_the_nearest_trained_ones(self):
        found = visited_timesteps(Diffusion(objective="flow"), 4, "euler", 3.0)

        evenly = [1 / 1000, 334 / 1000, 667 / 1000, 1.0]
        assert found == [round(1000 * 3 * u / (1 + 2 * u)) - 1 for u in evenly]

    @pytest.mark.parametrize("noise_schedule", ["cosine", "linear"])
    def test_those_of_dpmpp_2m_are_even_in_the_logarithm_of_signal_to_noise(self, noise_schedule):
        diffusion = Diffusion(noise_schedule)
        log_ratio = torch.log(diffusion.signal / diffusion.sigma)

        found = visited_timesteps(diffusion, 10, "dpmpp-2m")

        stride = (log_ratio[0] - log_ratio[-1]) / 9
        wanted = log_ratio[0] - stride * torch.arange(10)
        assert found[0] == 0 and found[-1] == 999
        # The cosine schedule's last timesteps lie further apart than the wanted ones.
        near = slice(0, 7 if noise_schedule == "cosine" else 10)
        torch.testing.assert_close(log_ratio[found][near], wanted[near], rtol=0, atol=0.4)


@pytest.mark.parametrize("num_steps", [1, 2, 12])
@pytest.mark.parametrize("noise_schedule", ["cosine", "linear"])
@pytest.mark.parametrize(("objective", "method"), PAIRS)
def test_every_sampler_equals_its_float64_loop(objective, method, noise_schedule, num_steps):
    diffusion = Diffusion(noise_schedule, objective=objective)
    x_T, noise = random_latents(), step_noise_of((3, 4, 4, 4))
    signal, sigma = reference.process(objective, noise_schedule)

    found = sample(
        denoise_with(diffusion, variance=0.3),
        x_T,
        diffusion=diffusion,
        method=method,
        num_steps=num_steps,
        step_noise=noise,
    )

    timesteps = visited_timesteps(diffusion, num_steps, method)
    x, expected = x_T.double().numpy(), None
    arguments = (lambda x, t: network(np, x, t), x, timesteps)
    if method == "ddpm":
        noises = [noise(step).double().numpy() for step in range(num_steps)]
        fraction = 0.65 if diffusion.learned_variance else None
        expected = reference.ddpm(objective, *arguments, signal, sigma, noises, fraction)
    elif objective == "flow":
        expected = getattr(reference, method)(*arguments, sigma)
    else:
        loop = {"ddim": reference.ddim, "dpmpp-2m": reference.dpmpp_2m}[method]
        expected = loop(objective, *arguments, signal, sigma)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found.numpy() / scale, expected / scale, rtol=0, atol=5e-5)


@pytest.mark.parametrize("num_steps", [1, 20])
@pytest.mark.parametrize(("objective", "method"), PAIRS)
def test_a_perfect_denoiser_recovers_the_data(objective, method, num_steps):
    diffusion, x_start = Diffusion(objective=objective), random_latents(seed=1)

    found = sample(
        best_denoiser(diffusion, x_start.double(), std=0.0),
        random_latents(),
        diffusion=diffusion,
        method=method,
        num_steps=num_steps,
        step_noise=step_noise_of(x_start.shape),
    )

    torch.testing.assert_close(found, x_start, rtol=0, atol=0.02)


def error_of(objective, method, num_steps, num_timesteps=4000):
    """How far a sampler is from the exact probability flow of Gaussian data."""
    diffusion = Diffusion("linear", num_timesteps, objective=objective, learned_variance=False)
    x_T, mean, std = random_latents(), 0.5, 0.5
    found = sample(
        best_denoiser(diffusion, mean, std),
        x_T,
        diffusion=diffusion,
        method=method,
        num_steps=num_steps,
    )
    signal, sigma = diffusion.signal[-1].item(), diffusion.sigma[-1].item()
    exact = reference.flow_of_gaussian(x_T.double().numpy(), signal, sigma, mean, std)
    return np.abs(found.numpy() - exact).max()


@pytest.mark.parametrize(("objective", "method"), ODE_PAIRS)
def test_the_error_falls_by_the_order_of_the_method(objective, method):
    """All of them converge to one image, the exact flow's; twice the steps, half the error or less.

    A method of first order halves it, one of second order quarters it.
    """
    errors = [error_of(objective, method, num_steps) for num_steps in (32, 64, 128)]

    ratio = 4 if method in ("dpmpp-2m", "heun") else 2
    for error, next_error in zip(errors, errors[1:], strict=False):
        assert error / next_error == pytest.approx(ratio, rel=0.15)
    assert errors[-1] < (0.001 if ratio == 4 else 0.05)


@pytest.mark.parametrize("learned_variance", [True, False])
@pytest.mark.parametrize("objective", ["epsilon", "v", "x0"])
def test_ddpm_draws_the_mean_and_spread_of_gaussian_data(objective, learned_variance):
    mean, std, shape = 0.3, 0.5, (4000, 1, 2, 2)
    diffusion = Diffusion("linear", objective=objective, learned_variance=learned_variance)

    found = sample(
        best_denoiser(diffusion, mean, std),
        normal(0, Stream.SAMPLE_START, torch.arange(4000), 4).view(shape),
        diffusion=diffusion,
        method="ddpm",
        num_steps=200,
        step_noise=step_noise_of(shape),
    )

    assert found.std().item() == pytest.approx(std, rel=0.05)
    assert found.mean().item() == pytest.approx(mean, abs=0.02)


@pytest.mark.parametrize("objective", ["epsilon", "flow"])
def test_a_method_of_another_objective_is_refused(objective):
    method = methods_for("flow" if objective == "epsilon" else "epsilon")[0]
    diffusion = Diffusion(objective=objective)

    with pytest.raises(AssertionError, match="another objective"):
        sample(
            denoise_with(diffusion),
            random_latents(),
            diffusion=diffusion,
            method=method,
            num_steps=2,
        )


def test_ddpm_without_noise_is_refused():
    diffusion = Diffusion()

    with pytest.raises(AssertionError, match="ddpm draws noise"):
        sample(
            denoise_with(diffusion),
            random_latents(),
            diffusion=diffusion,
            method="ddpm",
            num_steps=2,
        )


@pytest.mark.parametrize(
    ("objective", "method", "calls", "noises"),
    [
        ("epsilon", "ddpm", [999, 666, 333, 0], [0, 1, 2]),
        ("epsilon", "ddim", [999, 666, 333, 0], []),
        ("flow", "euler", [999, 666, 333, 0], []),
        # Predictor and corrector in each step, but not in the last.
        ("flow", "heun", [999, 666, 666, 333, 333, 0, 0], []),
    ],
)
def test_steps_are_counted_from_zero_and_the_last_takes_no_noise(objective, method, calls, noises):
    drawn, finished, timesteps = [], [], []
    diffusion = Diffusion(objective=objective)

    def denoise(x, t):
        timesteps.extend(set(t.tolist()))
        return denoise_with(diffusion)(x, t)

    def step_noise(step):
        drawn.append(step)
        return torch.zeros(3, 4, 4, 4)

    sample(
        denoise,
        random_latents(),
        diffusion=diffusion,
        method=method,
        num_steps=4,
        step_noise=step_noise,
        on_step=finished.append,
    )

    assert drawn == noises and finished == [0, 1, 2, 3]
    assert timesteps == calls


class TestSchedulersOfDiffusersThatAreNotUsed:
    """Why ddpm and ddim are our own: when one of these fails, try theirs again."""

    @pytest.mark.parametrize("is_short_chain", [False, True])
    def test_ddim_misses_our_timesteps_or_the_end_of_the_cosine_schedule(self, is_short_chain):
        diffusion, x = Diffusion(), random_latents().double().numpy()
        timesteps = visited_timesteps(diffusion, 10)
        signal, sigma = reference.process("epsilon", "cosine")
        expected = reference.ddim(
            "epsilon", lambda x, t: network(np, x, t), x, timesteps, signal, sigma
        )
        powers = signal[timesteps] ** 2 if is_short_chain else signal**2

        scheduler = diffusers.DDIMScheduler(
            num_train_timesteps=len(powers),
            trained_betas=1 - powers / np.append(1.0, powers[:-1]),
            clip_sample=False,
            timestep_spacing="linspace",
        )
        scheduler.set_timesteps(10)
        found = random_latents()
        for given, t in zip(scheduler.timesteps.tolist(), reversed(timesteps), strict=True):
            found = scheduler.step(network(torch, found, t), given, found).prev_sample

        assert not np.abs(found.numpy() - expected).max() < 0.01 * np.abs(expected).max()

    def test_ddpm_takes_no_noise_from_outside(self):
        with pytest.raises(TypeError, match="unexpected keyword argument 'variance_noise'"):
            diffusers.DDPMScheduler().step(None, 0, None, variance_noise=torch.zeros(1))
