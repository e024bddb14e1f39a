"""training/evaluate.py and its neighbours on a small run: images, scores, losses, refusals."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.errors import ConfigError
from data_tools.vae.autoencoder import DEMO_VAE, decode_pixels, load_vae
from models.guidance import Guidance
from models.latents import final_latents
from models.randomness import Stream, integers, normal
from tests.support.evaluated_run import (
    IMAGE_SIZE,
    Corners,
    Means,
    Wrong,
    make_data,
    make_run,
    save_network,
)
from tests.support.launch import TIMEOUT_SEC, finish, free_port, run, start
from tests.support.reference_scores import frechet_distance, precision_and_recall
from tests.support.synthetic import make_dataset, random_moments
from training import evaluate, reference_statistics, sample, score_images
from training.checkpoints.manifest import CHECKPOINT_DIR, sha256_of
from training.checkpoints.weight_files import load_model
from training.engine.objective import build_diffusion
from training.evaluation.distances import kernel_distance
from training.evaluation.drawing import (
    LABEL_RULES,
    PARTS_DIR,
    SAMPLES_FILE,
    SETTINGS_FILE,
    DrawSettings,
    labels_of,
)
from training.evaluation.networks import ScriptedNetwork
from training.evaluation.scores import said
from training.evaluation.sweep import SweepPoint, plot_of, table_of
from training.run.directory import load_config
from training.sampling.latents import SamplerSettings, sample_latents

pytestmark = pytest.mark.usefixtures("one_thread")  # bytes are compared

NUM_IMAGES, BATCH_SIZE, STEPS = 15, 2, 12  # slow enough to be killed in between
DRAW = (
    *("--num-images", NUM_IMAGES, "--steps", STEPS, "--batch-size", BATCH_SIZE, "--seed", 3),
    *("--labels", "data"),
)
FOLDER = f"step-0000007-ema-ddim{STEPS}-cfg2-{NUM_IMAGES}-seed3"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make_run(folder / "run", folder / "data")
    return folder / "run"


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return save_network(tmp_path_factory.mktemp("network") / "means.pt")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Images alone, in ADM's format."""
    path = tmp_path_factory.mktemp("reference") / "reference.npz"
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (30, 1, 1, 3)) + random.integers(-60, 60, (30, 32, 32, 3))
    np.savez(path, images.clip(0, 255).astype(np.uint8))
    return path


@pytest.fixture
def refuse(capsys):
    """Call an entry point that must refuse; return what it prints."""

    def refused(main, *argv):
        with pytest.raises(SystemExit) as exit_info:
            call(main, *argv)
        printed = capsys.readouterr()
        assert exit_info.value.code == 2
        assert printed.err.splitlines()[-1].startswith("error: ") and "Traceback" not in printed.err
        return printed.err

    return refused


def wait_for(process, condition, timeout=TIMEOUT_SEC):
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, "waited too long:\n" + finish(process)
        time.sleep(0.005)


def draw_settings(**changes):
    values = {
        **{"num_images": 10, "seed": 0, "labels": "random", "sampler": "ddim", "steps": 2},
        **{"shift": 1.0, "guidance": "none", "guidance_scale": 1.0, "guidance_channels": 0},
        **{"guidance_interval": [], "batch_size": 4, "image_size": [32, 32]},
        **{"weights_sha256": "", "weaker_weights_sha256": "", "vae_sha256": ""},
    }
    return DrawSettings(**values | changes)


def call(main, *argv):
    main([str(part) for part in argv])


@pytest.fixture(scope="module")
def drawn(run_dir, tmp_path_factory):
    """The images of DRAW from one process that nobody disturbed."""
    output = tmp_path_factory.mktemp("drawn")
    call(evaluate.main, run_dir, *DRAW, "--output", output, "--png")
    return output / FOLDER


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held-out")
    make_data(folder, [5, 4], first=100)
    return folder


@pytest.fixture(scope="module")
def resumed(run_dir, held_out, tmp_path_factory):
    """The same images from a process that was killed and two that went on, and the loss.

    Returns the folder, and how many parts the killed one left.
    """
    output = tmp_path_factory.mktemp("resumed")
    command = ("training/evaluate.py", run_dir, *DRAW, "--output", output)
    parts = output / FOLDER / PARTS_DIR
    process = start("python", *command)
    wait_for(process, lambda: len(list(parts.glob("*.npy"))) > 1)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    left = len(list(parts.glob("*.npy")))
    torchrun = ("torchrun", "--nproc-per-node", 2, "--master-port", free_port())
    run(*torchrun, *command, "--validation-data", held_out)
    return output, left


def pixels_of(folder):
    return np.load(folder / SAMPLES_FILE)["arr_0"]


class TestDrawing:
    """Images in numbers."""

    @pytest.mark.processes
    def test_images_are_in_adms_format_with_a_card_and_pngs(self, drawn, run_dir):
        found = np.load(drawn / SAMPLES_FILE)

        assert found["arr_0"].shape == (NUM_IMAGES, IMAGE_SIZE, IMAGE_SIZE, 3)
        assert found["arr_0"].dtype == np.uint8 and found["arr_0"].std() > 5
        assert found["arr_1"].shape == (NUM_IMAGES,) and set(found["arr_1"]) == {0, 1, 2}
        assert not (drawn / PARTS_DIR).exists()
        for i in (0, NUM_IMAGES - 1):
            png = np.asarray(Image.open(drawn / "png" / f"{i:06d}.png"))
            np.testing.assert_array_equal(png, found["arr_0"][i])
        card = json.loads((drawn / "card.json").read_text())
        weights = run_dir / CHECKPOINT_DIR / "step-0000007" / "ema.safetensors"
        assert card["weights"] == {
            "run": "run",
            "file": "ema.safetensors",
            "sha256": sha256_of(weights),
            "average": "0.999",
            "checkpoint": "step-0000007",
            "step": 7,
            "samples_seen": 448,
        }
        images = card["images"]
        assert (images["sampler"], images["steps"], images["guidance_scale"]) == (
            "ddim",
            STEPS,
            2.0,
        )
        assert (images["num_images"], images["seed"]) == (NUM_IMAGES, 3)
        assert "(seed, i)" in images["seed_rule"]
        assert card["vae"]["is_the_encoders"] and len(card["program"]["commit"]) in (7, 40)

    @pytest.mark.processes
    def test_an_image_is_the_one_that_the_sampler_draws_alone(self, drawn, run_dir):
        found, config = np.load(drawn / SAMPLES_FILE), load_config(run_dir)
        weights = run_dir / CHECKPOINT_DIR / "step-0000007" / "ema.safetensors"
        i = int(np.flatnonzero(found["arr_1"])[-1])

        def alone(label):
            latents = sample_latents(
                load_model(config, weights, torch.device("cpu")),
                build_diffusion(config),
                SamplerSettings("ddim", STEPS, 3, Guidance(2.0)),
                indices=torch.tensor([i]),
                labels=torch.tensor([label]),
                latent_shape=config.model.latent_shape,
                null_class=3,
            )
            return decode_pixels(load_vae(DEMO_VAE), latents)[0].astype(int)

        # Rounding depends on the batch.
        assert np.abs(alone(found["arr_1"][i]) - found["arr_0"][i]).max() <= 1
        assert np.abs(alone(0) - found["arr_0"][i]).max() > 2

    @pytest.mark.processes
    def test_killed_and_resumed_by_two_processes_the_bytes_are_the_same(self, drawn, resumed):
        folder, left = resumed

        assert 2 <= left < NUM_IMAGES // BATCH_SIZE
        ours, theirs = folder / FOLDER / SAMPLES_FILE, drawn / SAMPLES_FILE
        assert ours.read_bytes() == theirs.read_bytes()

    @pytest.mark.processes
    def test_parts_that_are_there_are_not_drawn_again(self, drawn, run_dir, tmp_path):
        (tmp_path / FOLDER / PARTS_DIR).mkdir(parents=True)
        shutil.copy(drawn / SETTINGS_FILE, tmp_path / FOLDER)
        black = np.zeros((BATCH_SIZE, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        np.save(tmp_path / FOLDER / PARTS_DIR / "000001.npy", black)
        (tmp_path / FOLDER / PARTS_DIR / "000002.npy.0a1b.tmp").write_bytes(b"torn")

        call(evaluate.main, run_dir, *DRAW, "--output", tmp_path)

        found, expected = pixels_of(tmp_path / FOLDER), pixels_of(drawn).copy()
        expected[2:4] = 0
        np.testing.assert_array_equal(found, expected)
        assert sorted(p.name for p in (tmp_path / FOLDER).iterdir()) == [
            "card.json",
            SAMPLES_FILE,
            SETTINGS_FILE,
        ]

    @pytest.mark.processes
    def test_a_part_that_is_damaged_is_named(self, drawn, run_dir, tmp_path, refuse):
        (tmp_path / FOLDER / PARTS_DIR).mkdir(parents=True)
        shutil.copy(drawn / SETTINGS_FILE, tmp_path / FOLDER)
        for part in range(8):
            np.save(tmp_path / FOLDER / PARTS_DIR / f"{part:06d}.npy", np.zeros((1, 2), np.uint8))

        stderr = refuse(evaluate.main, run_dir, *DRAW, "--output", tmp_path)

        assert f"{tmp_path / FOLDER}/parts/000000.npy is damaged: its shape is (1, 2)" in stderr

    @pytest.mark.parametrize("rule", LABEL_RULES)
    def test_labels_follow_their_rule(self, rule):
        settings = draw_settings(labels=rule)
        indices = torch.arange(6000)

        labels = labels_of(settings, indices, [500, 400, 300])

        shares = torch.bincount(labels, minlength=3) / 6000
        expected = [5 / 12, 4 / 12, 3 / 12] if rule == "data" else [1 / 3] * 3
        assert shares.tolist() == pytest.approx(expected, abs=0.02)
        if rule == "random":  # numbers of their own: labels tell nothing of the noise
            assert labels.equal(integers(0, Stream.SAMPLE_LABEL, indices, 3))
        some = torch.tensor([17, 4])
        assert labels_of(settings, some, [500, 400, 300]).tolist() == labels[some].tolist()

    @pytest.mark.processes
    def test_an_unconditional_run_draws_without_labels(self, tmp_path):
        make_run(tmp_path / "run", tmp_path / "data", num_classes=0)

        call(evaluate.main, tmp_path / "run", "--num-images", 2, "--steps", 1)

        (found,) = (tmp_path / "run" / "evaluation").glob("*/samples.npz")
        assert found.parent.name == "step-0000007-ema-ddim1-2-seed0"
        assert np.load(found)["arr_1"].tolist() == [0, 0]


SCORES = ["frechet_distance", "kernel_distance", "kernel_distance_std", "precision", "recall"]


class TestScoring:
    """With a network of the user's, since Inception's weights are not here."""

    def features(self, images):
        return Means()(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()

    def expected(self, images, reference):
        ours, theirs = self.features(images), self.features(reference)
        fits = [
            (f.astype(np.float64).mean(axis=0), np.cov(f.astype(np.float64), rowvar=False))
            for f in (ours, theirs)
        ]
        shares = precision_and_recall(theirs, ours, 3, np.float16)
        sets = [torch.from_numpy(features) for features in (theirs, ours)]
        kernel = kernel_distance(*sets, min(map(len, sets)) // 2)
        return [frechet_distance(*fits), *kernel, *shares]

    @pytest.mark.processes
    def test_a_run_is_scored_against_images(self, drawn, run_dir, network, reference, tmp_path):
        output = shutil.copytree(drawn.parent, tmp_path / "out")

        flags = ("--output", output, "--reference", reference, "--features", network)
        call(evaluate.main, run_dir, *DRAW, *flags)

        (path,) = (output / FOLDER).glob("score-*.json")
        card = json.loads(path.read_text())
        metrics = card["metrics"]
        assert list(metrics) == SCORES  # and neither "fid" nor "kid"
        wanted = self.expected(pixels_of(drawn), np.load(reference)["arr_0"])
        assert list(metrics.values()) == pytest.approx(wanted, rel=1e-4)
        assert card["reference"]["sha256"] == sha256_of(reference)
        assert card["features"] == {"network": "means.pt", "sha256": sha256_of(network)}
        assert card["images"]["num_images"] == NUM_IMAGES
        assert card["weights"]["step"] == 7

    @pytest.mark.processes
    def test_a_score_that_is_there_is_told_and_not_computed_again(
        self, drawn, run_dir, network, reference, tmp_path, capsys
    ):
        output = shutil.copytree(drawn.parent, tmp_path / "out")
        command = (run_dir, *DRAW, "--output", output, "--reference", reference)
        command = (*command, "--features", network)
        call(evaluate.main, *command)
        (path,) = (output / FOLDER).glob("score-*.json")
        path.write_text(path.read_text().replace('"recall": ', '"recall": 9'))
        capsys.readouterr()

        call(evaluate.main, *command)
        assert "recall 9" in capsys.readouterr().out
        call(evaluate.main, *command, "--force")
        assert "recall 9" not in capsys.readouterr().out
        assert '"recall": 9' not in path.read_text()

    @pytest.mark.processes
    def test_a_job_that_slurm_starts_again_forces_away_nothing_of_its_own(
        self, drawn, run_dir, held_out, tmp_path, capsys, monkeypatch
    ):
        output = shutil.copytree(drawn.parent, tmp_path / "out")
        command = (run_dir, *DRAW, "--output", output, "--validation-data", held_out)
        command = (*command, "--validation-samples", 4, "--validation-timesteps", 1, "--force")
        samples = output / FOLDER / SAMPLES_FILE
        before = samples.stat().st_mtime_ns
        call(evaluate.main, *command)
        first = samples.stat().st_mtime_ns
        (loss,) = output.glob("validation-*.json")
        written = loss.stat().st_mtime_ns
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        call(evaluate.main, *command)

        assert before < first == samples.stat().st_mtime_ns
        assert loss.stat().st_mtime_ns == written
        call(evaluate.main, *command, "--labels", "balanced")
        assert samples.stat().st_mtime_ns > first  # drawn otherwise, so not by this job

    @pytest.mark.processes
    def test_reference_statistics_stand_for_all_images(self, network, tmp_path, capsys):
        random = np.random.default_rng(5)
        images = random.integers(0, 256, (25, 32, 32, 3)).astype(np.uint8)
        for i, image in enumerate(images):
            path = tmp_path / "images" / f"class{i % 2}" / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        np.savez(tmp_path / "samples.npz", images[::-1])

        made = tmp_path / "made.npz"
        flags = ("--size", 32, "--keep", 10, "--features", network, "--output", made)
        call(reference_statistics.main, "--input", tmp_path / "images", *flags)
        flags = ("--reference", made, "--features", network)
        call(score_images.main, tmp_path / "samples.npz", *flags, "--output", tmp_path / "c.json")

        found = np.load(made)
        assert sorted(found) == ["arr_0", "arr_1", "features_mu", "features_sha256"] + [
            "features_sigma"
        ]
        assert found["arr_0"].shape == (10, 32, 32, 3)
        features = self.features(images).astype(np.float64)
        np.testing.assert_allclose(found["features_mu"], features.mean(axis=0), rtol=1e-9)
        np.testing.assert_allclose(found["features_sigma"], np.cov(features, rowvar=False), 1e-9)
        card = json.loads((tmp_path / "c.json").read_text())
        assert card["metrics"]["frechet_distance"] == pytest.approx(0.0, abs=1e-6)
        assert card["metrics"]["recall"] == 1.0
        assert card["reference"]["statistics"] == "stated in the file"

    @pytest.mark.processes
    def test_statistics_without_images_give_the_distance_alone(self, network, reference, tmp_path):
        images = np.load(reference)["arr_0"]
        features = self.features(images).astype(np.float64)
        statistics = {
            "features_mu": features.mean(axis=0),
            "features_sigma": np.cov(features, rowvar=False),
        }
        np.savez(tmp_path / "none.npz", **statistics)
        np.savez(tmp_path / "one.npz", images[:1], **statistics)

        for name in ("none", "one"):
            flags = ("--reference", tmp_path / f"{name}.npz", "--features", network)
            call(score_images.main, reference, *flags, "--output", tmp_path / f"{name}.json")
            metrics = json.loads((tmp_path / f"{name}.json").read_text())["metrics"]
            assert metrics == {"frechet_distance": pytest.approx(0.0, abs=1e-6)}

    @pytest.mark.processes
    def test_each_of_several_networks_has_the_card_and_the_sweep_of_its_own(
        self, run_dir, network, reference, tmp_path, capsys
    ):
        corners = save_network(tmp_path / "corners.pt", Corners())
        flags = (run_dir, "--num-images", 14, "--sweep-steps", "1,2", "--reference", reference)
        for name, files in {"both": [network, corners], "one": [network], "two": [corners]}.items():
            call(evaluate.main, *flags, "--output", tmp_path / name, "--features", *files)

        def cards(folder):
            paths = sorted(folder.glob("*/score-*.json"))
            return {
                f"{path.parent.name}/{path.name}": json.loads(path.read_text()) for path in paths
            }

        alone = cards(tmp_path / "one") | cards(tmp_path / "two")
        assert cards(tmp_path / "both") == alone and len(alone) == 4
        both, *others = (
            sorted(path.read_text() for path in tmp_path.glob(f"{name}/sweep-*.txt"))
            for name in ("both", "one", "two")
        )
        assert both == sorted(sum(others, [])) and len(both) == 2
        output = capsys.readouterr().out
        assert "14 images, means.pt, frechet_distance" in output
        assert "14 images, corners.pt, frechet_distance" in output

    @pytest.mark.processes
    def test_a_set_of_images_is_scored_by_several_networks(self, network, reference, tmp_path):
        corners = save_network(tmp_path / "corners.pt", Corners())
        images = np.random.default_rng(3).integers(0, 256, (20, 32, 32, 3)).astype(np.uint8)
        for i, image in enumerate(images):
            path = tmp_path / "images" / f"{i:02d}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(image).save(path)
        both = ("--features", network, corners)
        made = ("--input", tmp_path / "images", "--size", 32, "--keep", 8, *both)
        call(reference_statistics.main, *made, "--output", tmp_path / "made.npz")

        for name, files in {"both": both[1:], "one": [network], "two": [corners]}.items():
            flags = ("--reference", tmp_path / "made.npz", "--output", tmp_path / f"{name}.json")
            call(score_images.main, reference, *flags, "--features", *files)

        found, one, two = (
            json.loads((tmp_path / f"{name}.json").read_text()) for name in ("both", "one", "two")
        )
        keys = ("metrics", "reference", "features", "kernel_subsets")
        assert found["scores"] == [{key: card[key] for key in keys} for card in (one, two)]
        assert one["features"] == {"network": "means.pt", "sha256": sha256_of(network)}
        for card in (one, two):
            assert card["reference"]["statistics"] == "stated in the file"
        stated = np.load(tmp_path / "made.npz")[f"features_mu_{sha256_of(corners)[:12]}"]
        np.testing.assert_allclose(stated, images[:, 0, 0].mean(axis=0) / 64.0, rtol=1e-6)

    def test_one_network_named_twice_is_refused(self, network, reference, tmp_path, refuse):
        copy = shutil.copy(network, tmp_path / "copy.pt")

        stderr = refuse(
            score_images.main, reference, "--reference", reference, "--features", network, copy
        )

        assert f"{copy} is the same network as one before it; give each once." in stderr

    @pytest.mark.processes
    def test_a_sweep_scores_every_combination(self, run_dir, network, reference, tmp_path, capsys):
        flags = ("--num-images", 14, "--output", tmp_path, "--reference", reference)
        sweep = ("--sweep-cfg-scale", "1,2", "--sweep-steps", "1,2", "--sweep-sampler", "ddim,ddpm")
        call(evaluate.main, run_dir, *flags, "--features", network, *sweep)

        (table,) = tmp_path.glob("sweep-*.txt")
        lines = table.read_text().splitlines()
        assert lines[0].split() == ["sampler", "steps", "cfg", "scale"] + [*SCORES]
        found = {tuple(line.split()[:3]) for line in lines[1:]}
        assert found == {(m, s, c) for m in ("ddim", "ddpm") for s in "12" for c in "12"}
        for sampler, steps, scale, distance, *_ in map(str.split, lines[1:]):
            guidance = "-cfg2" if scale == "2" else ""
            (card,) = tmp_path.glob(f"step-0000007-ema-{sampler}{steps}{guidance}-14-*/score-*")
            metrics = json.loads(card.read_text())["metrics"]
            assert distance == f"{metrics['frechet_distance']:.4g}"
        assert len({line.split()[3] for line in lines[1:]}) > 3
        picture = np.asarray(Image.open(table.with_suffix(".png")))
        assert picture.shape[2] == 3 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 6
        assert table.read_text() in capsys.readouterr().out


def test_a_sweep_shows_cards_of_earlier_versions_beside_new_ones():
    old = SweepPoint("ddim", 50, 1.0, {"fid": 12.0})
    new = SweepPoint("ddim", 50, 2.0, {"fid": 11.0, "kid": 0.00123, "kid_std": 0.0002})

    lines = [line.split() for line in table_of([old, new]).splitlines()]

    assert lines[0][4:] == ["fid", "kid", "kid_std"]
    assert lines[1][3:] == ["12", "-", "-"] and lines[2][3:] == ["11", "0.00123", "0.0002"]
    assert plot_of([old, new], "title").shape[2] == 3
    assert said(new.metrics) == "fid 11.0000, kid 0.001230 +- 0.000200"
    assert said(old.metrics) == "fid 12.0000"


class TestHeldOutLoss:
    """--validation-data."""

    def loss(self, folder):
        (path,) = folder.glob("validation-*.json")
        return json.loads(path.read_text())

    @pytest.mark.processes
    def test_it_is_that_of_a_loop_over_samples(self, run_dir, held_out, tmp_path):
        flags = ("--validation-data", held_out, "--validation-timesteps", 2, "--batch-size", 4)
        call(evaluate.main, run_dir, *flags, "--output", tmp_path)

        card = self.loss(tmp_path)
        config = load_config(run_dir)
        weights = run_dir / CHECKPOINT_DIR / "step-0000007" / "ema.safetensors"
        model, diffusion = load_model(config, weights, torch.device("cpu")), build_diffusion(config)
        moments, total = random_moments((8, 8, 8)), np.zeros(2)
        for i in range(9):
            own = torch.tensor([i])
            raw = torch.from_numpy(moments(i + 100)[None])
            posterior = normal(0, Stream.POSTERIOR, own, 256).view(1, 4, 8, 8)
            x_start = final_latents(raw, posterior, 1.0)
            for k, step in enumerate((250, 750)):
                noise = normal(0, Stream.NOISE, own * 1000 + step, 256).view(1, 4, 8, 8)
                t = torch.tensor([step])
                with torch.no_grad():
                    output = model(diffusion.q_sample(x_start, t, noise), t, own % 3).prediction
                total[k] += (output[:, :4] - noise).square().mean().item()
        assert card["timesteps"] == [250, 750]
        assert card["validation_loss"]["mse"]["by_timestep"] == pytest.approx(total / 9, rel=1e-5)
        assert card["validation_loss"]["mse"]["mean"] == pytest.approx(total.mean() / 9, rel=1e-5)
        assert card["num_samples"] == 9 and card["objective"] == "epsilon"

    @pytest.mark.processes
    def test_bf16_is_near_and_in_a_file_of_its_own(self, run_dir, held_out, tmp_path):
        flags = ("--validation-data", held_out, "--validation-timesteps", 2, "--output", tmp_path)
        call(evaluate.main, run_dir, *flags)
        exact = self.loss(tmp_path)
        call(evaluate.main, run_dir, *flags, "--precision", "bf16")

        (path,) = tmp_path.glob("validation-*-bf16.json")
        fast = json.loads(path.read_text())
        assert (exact["precision"], fast["precision"]) == ("fp32", "bf16")
        means = [card["validation_loss"]["mse"]["mean"] for card in (exact, fast)]
        assert means[0] != means[1] == pytest.approx(means[0], rel=0.02)

    @pytest.mark.processes
    def test_two_processes_compute_the_digits_of_one(self, run_dir, held_out, resumed, tmp_path):
        flags = ("--validation-data", held_out, "--batch-size", BATCH_SIZE, "--output", tmp_path)
        call(evaluate.main, run_dir, *flags)

        assert self.loss(tmp_path)["validation_loss"] == self.loss(resumed[0])["validation_loss"]

    @pytest.mark.processes
    def test_samples_and_noise_do_not_depend_on_the_run(self, held_out, tmp_path):
        """Two runs of other seeds and batch sizes whose networks are the same."""
        losses = []
        for name, seed in (("a", 0), ("b", 5)):
            make_run(tmp_path / name, tmp_path / f"{name}-data", seed=seed)
            flags = ("--validation-data", held_out, "--batch-size", 3 + seed)
            call(evaluate.main, tmp_path / name, *flags, "--output", tmp_path / f"{name}-out")
            losses.append(self.loss(tmp_path / f"{name}-out")["validation_loss"])

        for term, values in losses[0].items():
            expected = losses[1][term]["by_timestep"]
            assert values["by_timestep"] == pytest.approx(expected, rel=1e-5), term

    def test_what_does_not_fit_is_refused(self, run_dir, held_out, tmp_path, refuse):
        def sentence(data, *flags):
            return refuse(evaluate.main, run_dir, "--validation-data", data, *flags)

        trained_on = load_config(run_dir).data.data
        assert "is what the run was trained on; give shards held out from" in sentence(trained_on)
        assert f"--validation-data {tmp_path}/none" in sentence(tmp_path / "none")
        assert "--validation-timesteps 0 is not between 1 and the 1000 of" in sentence(
            held_out, "--validation-timesteps", 0
        )
        shape = (8, 8, 8)
        make_dataset(tmp_path / "other", [3], shape=shape, moments=random_moments(shape))
        assert "was encoded by the VAE 000000000000 (scale 0.5, shift 0)" in sentence(
            tmp_path / "other"
        )
        make_dataset(tmp_path / "small", [3])
        assert f"--validation-data {tmp_path}/small holds latents of 4x4x4" in sentence(
            tmp_path / "small"
        )


class TestRefusals:
    """One sentence each, exit code 2, nothing overwritten."""

    @pytest.mark.parametrize(
        ("flags", "sentence"),
        [
            ((), "nothing to evaluate; give --num-images N, with --reference NPZ to score them"),
            (("--num-images", 0), "--num-images must be at least 1, not 0."),
            (("--reference", "a.npz"), "--reference needs images; add --num-images N, as 50000."),
            (("--num-images", 9, "--features", "f"), "--features needs something to compare with"),
            (("--sweep-steps", "1"), "--sweep-steps needs images; add --num-images N, as 50000."),
            (
                ("--num-images", 9, "--steps", 2, "--sweep-steps", "1,2"),
                "--steps and --sweep-steps say the same; give one of them.",
            ),
            (("--num-images", 9, "--sweep-steps", "1,x"), "--sweep-steps 1,x: is no list of numb"),
            (("--num-images", 9, "--sweep-steps", "1,1"), "--sweep-steps 1,1: names a value twice"),
            (("--num-images", 9, "--sweep-sampler", "heun"), "--sampler heun does not fit"),
            (("--num-images", 9, "--checkpoint", "step-8"), "--checkpoint: no 'step-8'; "),
        ],
    )
    def test_flags_that_do_not_fit(self, run_dir, refuse, flags, sentence):
        assert sentence in refuse(evaluate.main, run_dir, *flags)

    def test_a_run_without_a_checkpoint(self, run_dir, tmp_path, refuse):
        copy = shutil.copytree(run_dir, tmp_path / "copy")
        shutil.rmtree(copy / CHECKPOINT_DIR)

        stderr = refuse(evaluate.main, copy, "--num-images", 9)

        assert f"{copy} has no checkpoint yet; train first." in stderr

    def test_scores_that_cannot_be_had(self, run_dir, network, reference, tmp_path, refuse):
        np.savez(tmp_path / "large.npz", np.zeros((30, 64, 64, 3), np.uint8))
        np.savez(tmp_path / "few.npz", np.zeros((12, 32, 32, 3), np.uint8))
        widths = {"features_mu": np.zeros(5), "features_sigma": np.zeros((5, 5))}
        np.savez(tmp_path / "width.npz", **widths)
        mine = {"features_mu": np.zeros(12), "features_sigma": np.zeros((12, 12))}
        np.savez(tmp_path / "other.npz", **mine, features_sha256=np.array("f" * 64))
        (tmp_path / "text.pt").write_text("no network")

        def sentence(count, npz, features):
            flags = ("--num-images", count, "--reference", npz, "--features", features)
            return refuse(evaluate.main, run_dir, *flags, "--output", tmp_path / "out")

        assert "holds images of 64x64 and the samples are 32x32; give a reference" in sentence(
            20, tmp_path / "large.npz", network
        )
        assert "--num-images 12: too few, the covariance of 12 features of means.pt" in sentence(
            12, reference, network
        )
        told = sentence(20, tmp_path / "few.npz", network)
        assert "few.npz: holds no features_mu and features_sigma, the statistics of means" in told
        assert "and 12 images, fewer than the 13 that a covariance takes; make one with" in told
        assert "its features_mu and features_sigma have shapes (5,) and (5, 5), fe" in sentence(
            20, tmp_path / "width.npz", network
        )
        assert "are of the network with sha256 ffffffffffff, --features has" in sentence(
            20, tmp_path / "other.npz", network
        )
        assert "none.npz: there is no such file; give an npz file." in sentence(
            20, tmp_path / "none.npz", network
        )
        assert "text.pt: is damaged or no TorchScript file; save one with" in sentence(
            20, reference, tmp_path / "text.pt"
        )
        assert not (tmp_path / "out").exists()

    def test_inception_weights_that_are_not_there_or_others(
        self, run_dir, reference, tmp_path, refuse
    ):
        (tmp_path / "w.pth").write_bytes(b"others")
        flags = (run_dir, "--num-images", 3000, "--reference", reference, "--inception")

        assert "none.pth: there is no such file; fetch it from https://" in refuse(
            evaluate.main, *flags, tmp_path / "none.pth"
        )
        assert "the Inception weights of FID have 6726825d0af5" in refuse(
            evaluate.main, *flags, tmp_path / "w.pth"
        )

    @pytest.mark.processes
    def test_images_drawn_otherwise_are_kept_unless_forced(self, drawn, run_dir, tmp_path, refuse):
        output = shutil.copytree(drawn.parent, tmp_path / "out")
        before = (output / FOLDER / SAMPLES_FILE).read_bytes()
        other = (*DRAW[:-2], "--labels", "balanced", "--output", output)

        stderr = refuse(evaluate.main, run_dir, *other)

        assert (
            f"--output {output / FOLDER}: holds images drawn otherwise, labels data (no" in stderr
        )
        assert (output / FOLDER / SAMPLES_FILE).read_bytes() == before
        call(evaluate.main, run_dir, *other, "--force")
        labels = np.load(output / FOLDER / SAMPLES_FILE)["arr_1"]
        assert labels.tolist() == [i % 3 for i in range(NUM_IMAGES)]

    def test_a_folder_of_other_files_is_left_alone_even_if_forced(self, run_dir, tmp_path, refuse):
        (tmp_path / FOLDER).mkdir()
        (tmp_path / FOLDER / "thesis.txt").write_text("years of work")

        for force in ((), ("--force",)):
            stderr = refuse(evaluate.main, run_dir, *DRAW, "--output", tmp_path, *force)
            assert "holds files but no settings.json, so they are not this program's" in stderr
        assert (tmp_path / FOLDER / "thesis.txt").read_text() == "years of work"

    def test_existing_outputs_of_the_other_commands(self, network, reference, tmp_path, refuse):
        path = tmp_path / "kept.npz"
        path.write_text("kept")
        flags = ("--features", network, "--output", path)

        assert "kept.npz: exists; choose another or add --force." in refuse(
            score_images.main, reference, "--reference", reference, *flags
        )
        assert "kept.npz: exists; choose another or add --force." in refuse(
            reference_statistics.main, "--input", tmp_path, *flags
        )
        assert path.read_text() == "kept"

    @pytest.mark.parametrize("output", ["none/card.json", "."])
    def test_a_place_that_takes_no_card_is_refused_before_the_scoring(
        self, reference, network, tmp_path, refuse, output
    ):
        flags = ("--reference", reference, "--features", network, "--force")

        stderr = refuse(score_images.main, reference, *flags, "--output", tmp_path / output)

        assert f"--output {tmp_path / output}: name a file in a folder that exists." in stderr
        assert "looking" not in stderr

    @pytest.mark.parametrize("command", [evaluate, sample])
    def test_more_processes_than_gpus_of_a_node(self, run_dir, refuse, monkeypatch, command):
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        for name, value in (("RANK", "2"), ("WORLD_SIZE", "3"), ("LOCAL_RANK", "2")):
            monkeypatch.setenv(name, value)

        stderr = refuse(command.main, run_dir)

        assert stderr.startswith("error: local rank 2 finds 2 GPU(s) on node ")

    def test_an_image_that_cannot_be_read_spoils_a_reference(self, network, tmp_path, refuse):
        for i in range(13):
            (tmp_path / f"{i}.png").write_bytes(b"torn")

        flags = ("--size", 32, "--features", network, "--output", tmp_path / "made.npz")
        stderr = refuse(reference_statistics.main, "--input", tmp_path, *flags)

        assert "0.png cannot be read (is text); mend it or move it elsewhere" in stderr
        assert not (tmp_path / "made.npz").exists()


@pytest.mark.parametrize(
    ("network", "sentence"),
    [
        (Wrong("rows"), "gives (1, 12) for 2 images; it must return floats (N, D)."),
        (Wrong("integers"), "for 2 images; it must return floats (N, D)."),
        (Wrong("infinite"), "gives features that are not finite; mend the network."),
        (Wrong("fails"), "fails on images (32, 32, 3) ("),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_networks_that_give_no_features_are_refused(network, sentence, tmp_path):
    torch.jit.script(network).save(str(tmp_path / "wrong.pt"))

    with pytest.raises(ConfigError) as error:
        ScriptedNetwork(tmp_path / "wrong.pt", (32, 32), torch.device("cpu"))

    assert sentence in str(error.value)
