"""Averages of any width from stored ones: against the averages that were never stored."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support.reference import power_function_average
from training import reconstruct_ema
from training.checkpoints.average_snapshots import SNAPSHOT_DIR, snapshot_file
from training.checkpoints.weight_files import write_weights
from training.engine.average_fit import fit_profile, inner_products
from training.engine.average_profiles import PowerProfile, gamma_of_std

STDS = (0.05, 0.1)  # stored, as in EDM2
STEPS = 400


def trajectory(num_weights=64):
    """A random walk far from zero: (1 + STEPS, num_weights) float64."""
    moves = np.random.default_rng(0).standard_normal((1 + STEPS, num_weights))
    return 100 + moves.cumsum(0)


def stored(every):
    """Pairs of updates and width: every average that is stored."""
    steps = range(every, STEPS + 1, every)
    return [(step, std) for step in steps for std in STDS]


def fit_of(snapshots, std, step=STEPS):
    times = [updates for updates, _ in snapshots]
    gammas = [gamma_of_std(width) for _, width in snapshots]
    return fit_profile(times, gammas, step, gamma_of_std(std))


def reconstructed(values, snapshots, std):
    averages = [
        power_function_average(values[: step + 1], gamma_of_std(width)) for step, width in snapshots
    ]
    return fit_of(snapshots, std).weights @ np.stack(averages)


def profile(times, time, gamma):
    """The profile of an average of the updates up to `time`, at times in (0, STEPS)."""
    return np.where(times <= time, (gamma + 1) / time * (times / time) ** gamma, 0.0)


def test_inner_products_and_residual_are_integrals_over_the_profiles():
    points = (np.arange(400_000) + 0.5) / 400_000 * STEPS
    width = points[1] - points[0]
    for (time_a, gamma_a), (time_b, gamma_b) in [
        ((400, 17.0), (400, 7.0)),
        ((100, 2.5), (400, 60.0)),
        ((300, 17.0), (120, 0.0)),
    ]:
        product = profile(points, time_a, gamma_a) * profile(points, time_b, gamma_b)
        got = inner_products(*map(np.float64, (time_a, gamma_a, time_b, gamma_b)))
        assert got == pytest.approx(product.sum() * width, rel=1e-4)

    snapshots = stored(every=50)
    fit = fit_of(snapshots, 0.08)
    total = sum(
        weight * profile(points, step, gamma_of_std(std))
        for weight, (step, std) in zip(fit.weights, snapshots, strict=True)
    )
    wanted = profile(points, STEPS, gamma_of_std(0.08))
    residual = np.sqrt(((total - wanted) ** 2).sum() / (wanted**2).sum())
    assert fit.residual == pytest.approx(residual, rel=1e-3)


def test_no_other_sum_of_the_stored_profiles_is_nearer():
    snapshots = stored(every=100)
    fit = fit_of(snapshots, 0.08)
    times = np.array([step for step, _ in snapshots], float)
    gammas = np.array([gamma_of_std(std) for _, std in snapshots])
    products = inner_products(times[:, None], gammas[:, None], times, gammas)
    wanted = inner_products(times, gammas, np.float64(STEPS), np.float64(gamma_of_std(0.08)))

    # At a minimum among weights of one sum, every weight has the same slope.
    slope = products @ fit.weights - wanted
    np.testing.assert_allclose(slope, slope.mean(), atol=1e-9 * wanted.max())
    assert fit.weights.sum() == pytest.approx(1, abs=1e-12)


def test_a_stored_average_is_returned_as_it_is():
    snapshots = stored(every=100)
    for index, (step, std) in enumerate(snapshots):
        fit = fit_of(snapshots, std, step)
        assert (fit.weights == np.eye(len(snapshots))[index]).all()
        assert fit.residual == 0


@pytest.mark.parametrize("std", [0.04, 0.08, 0.15])
def test_an_unseen_width_approaches_its_own_average_as_snapshots_grow_denser(std):
    values = trajectory()
    expected = power_function_average(values, gamma_of_std(std))
    spread = np.abs(values - values.mean(0)).mean()

    errors, residuals = [], []
    for every in (100, 40, 10, 2):
        difference = reconstructed(values, stored(every), std) - expected
        errors.append(np.sqrt((difference**2).mean()) / spread)
        residuals.append(fit_of(stored(every), std).residual)

    assert errors == sorted(errors, reverse=True)
    assert residuals == sorted(residuals, reverse=True)
    assert errors[-1] < 1e-4


def test_weights_that_stand_still_are_reconstructed_whatever_is_stored():
    values = np.full((1 + STEPS, 1), 3.0)

    for std in (0.02, 0.2, 0.28):
        assert reconstructed(values, stored(every=200), std) == pytest.approx(3.0, abs=1e-12)


@pytest.fixture
def run_dir(tmp_path):
    """A run with snapshots every 20 updates, of which its first three steps were skipped."""
    config = (Path(__file__).resolve().parents[3] / "tests/small.yaml").read_text()
    (tmp_path / "config.yaml").write_text(config)
    (tmp_path / SNAPSHOT_DIR).mkdir()
    values = trajectory(6)
    for updates, std in stored(every=20):
        kind, step = PowerProfile(std), updates + 3
        average = torch.from_numpy(power_function_average(values[: updates + 1], kind.gamma))
        about = {"step": step, "num_updates": updates, "std": std, "gamma": kind.gamma}
        write_weights(
            tmp_path / SNAPSHOT_DIR / snapshot_file(kind, step),
            {"a.weight": average[:4].view(2, 2).float(), "b": average[4:].float()},
            {key: repr(value) for key, value in about.items()},
        )
    return tmp_path


def test_the_command_writes_the_average_that_was_never_tracked(run_dir, capsys):
    reconstruct_ema.main([str(run_dir), "--std", "0.08"])

    path = run_dir / "posthoc" / "std0.080-step-0000403.safetensors"
    got = load_file(path)
    expected = power_function_average(trajectory(6), gamma_of_std(0.08))
    assert got["a.weight"].shape == (2, 2)
    np.testing.assert_allclose(got["a.weight"].flatten(), expected[:4], rtol=1e-4)
    np.testing.assert_allclose(got["b"], expected[4:], rtol=1e-4)
    assert f"{path}: average of relative width 0.08 at step 403 from 40" in capsys.readouterr().out


def test_the_command_returns_a_stored_snapshot_bit_for_bit(run_dir):
    output = run_dir / "again.safetensors"

    reconstruct_ema.main([str(run_dir), "--std", "0.1", "--step", "203", "--output", str(output)])

    snapshot = load_file(run_dir / SNAPSHOT_DIR / "std0.100-step-0000203.safetensors")
    got = load_file(output)
    assert all(torch.equal(got[name], value) for name, value in snapshot.items())


@pytest.fixture
def refusal(run_dir, capsys):
    """Call the command with flags that are wrong; return its sentence."""

    def call(*argv):
        with pytest.raises(SystemExit):
            reconstruct_ema.main([str(part) for part in (run_dir, *argv)])
        assert not list(run_dir.glob("posthoc/*"))
        return capsys.readouterr().err

    return call


@pytest.mark.parametrize("std", [0.0001, 0.005])
def test_a_width_that_the_snapshots_cannot_make_is_refused(refusal, std):
    message = refusal("--std", std)

    assert (
        f"error: --std {std} cannot be made of the stored snapshots: the relative resi" in message
    )
    assert "choose a width nearer to the stored ones (0.05, 0.1), or train" in message


def test_a_width_that_the_snapshots_make_badly_is_warned_of(run_dir, capsys):
    reconstruct_ema.main([str(run_dir), "--std", "0.28"])

    assert (run_dir / "posthoc" / "std0.280-step-0000403.safetensors").exists()
    assert "warning: with a residual of " in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_a_snapshot_of_damaged_values_is_named(run_dir, refusal, value):
    """What is finite in the file may overflow in the sum."""
    path = run_dir / SNAPSHOT_DIR / "std0.100-step-0000403.safetensors"
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    save_file(load_file(path) | {"b": torch.full((2,), value)}, path, about)

    message = refusal("--std", 0.015)

    assert "damaged" in message
    assert message.startswith(f"error: {run_dir / SNAPSHOT_DIR}")


def test_what_cannot_be_reconstructed_is_refused(run_dir, refusal):
    assert "error: --std must be >0 and <0.289, not 0.3." in refusal("--std", 0.3)
    assert "error: --step: no snapshot of step 300; did you mean '3" in refusal(
        *("--std", 0.08, "--step", 300)
    )
    (run_dir / "file").touch()
    assert f"error: --output {run_dir}/file/x: " in refusal(
        *("--std", 0.08, "--output", run_dir / "file" / "x")
    )
    path = run_dir / SNAPSHOT_DIR / "std0.050-step-0000203.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    assert f"error: {path} is damaged or no snapshot; restore it" in refusal(*("--std", 0.08))
    for path in (run_dir / SNAPSHOT_DIR).iterdir():
        path.unlink()
    assert f"error: {run_dir} has no {SNAPSHOT_DIR}; train with --ema-stds" in refusal(
        *("--std", 0.08)
    )
