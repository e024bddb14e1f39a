"""What --init-from takes, refuses and reports; that training begins there: test_starting_points."""

import argparse
import collections
import datetime
import fractions
import os
import pathlib
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from data_tools.errors import ConfigError
from tests.support.launch import REPOSITORY
from training.checkpoints.warm_start import initial_values
from training.config.preset import load_preset
from training.config.tree import Config
from training.engine.build import build_model
from training.run.directory import CONFIG_FILE
from training.run.init_from import check_is_elsewhere, check_warm_start, with_own_origin

SMALL = load_preset(str(REPOSITORY / "tests" / "small.yaml"))


def configured(source=None, **model) -> Config:
    run = replace(SMALL.run, init_from=None if source is None else str(source))
    return replace(SMALL, run=run, model=replace(SMALL.model, **model))


def random_weights(**model):
    """Parameters of a model of small.yaml, changed and random, by name."""
    torch.manual_seed(1)
    return {
        name: torch.randn_like(parameter) * 0.1
        for name, parameter in build_model(configured(**model)).named_parameters()
    }


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def without_routing(weights):
    return {k: v for k, v in weights.items() if not k.startswith("gate.") and "mixture" not in k}


def load(warm_start, model, rank=0):
    with torch.no_grad():
        for parameter, value in initial_values(warm_start, model, rank):
            parameter.copy_(value)


class Settings(dict):
    """A dictionary of a class of its own, as Lightning and omegaconf have them."""


def under(prefix, weights):
    return {prefix + name: value for name, value in weights.items()}


def in_wrapped_parts(weights):
    """As FSDP, activation checkpointing and torch.compile name what is inside them."""
    inner = {
        re.sub(r"(blocks\.\d+\.)", r"\1_checkpoint_wrapped_module._orig_mod.", name): value
        for name, value in weights.items()
    }
    return under("_fsdp_wrapped_module.", inner)


# By what wraps them: what is saved of the weights to load and of other weights, the entry that is
# chosen, those that are there as well, and tensors that are not used.
FOREIGN = {
    "DDP of a compiled model": (
        lambda good, _: {"model": under("module._orig_mod.", good)}, "model", [], []),
    "a compiled DDP": (
        lambda good, _: under("_orig_mod.module.", good), None, [], []),
    "anything twice": (
        lambda good, _: under("module.module._orig_mod.module.", good), None, [], []),
    "wrapped parts": (
        lambda good, _: {"model": in_wrapped_parts(good)}, "model", [], []),
    "AveragedModel": (
        lambda good, bad: {
            "model": bad, "ema": {"n_averaged": torch.tensor(7), **under("module.", good)}
        }, "ema", ["model"], ["n_averaged"]),
    "Lightning": (
        lambda good, _: {
            "epoch": 1, "pytorch-lightning_version": "2.4.0", "hyper_parameters": Settings(lr=1),
            "state_dict": {"loss.weight": torch.ones(1), **under("model.", good)},
            "callbacks": collections.defaultdict(list, a=[1]),
        }, "state_dict/model", [], ["loss.weight"]),
    "Lightning with an average": (
        lambda good, bad: {"state_dict": under("model.", bad) | under("ema.", good)},
        "state_dict/ema", ["state_dict/model"], []),
    "model_state_dict": (
        lambda good, bad: {
            "epoch": 3, "model_state_dict": good,
            "optimizer_state_dict": {"state": {"exp_avg": bad}},
        }, "model_state_dict", [], []),
    "DeepSpeed": (
        lambda good, _: {"module": good, "dtype": "torch.float32"}, "module", [], []),
    "ema_pytorch": (
        lambda good, bad: {
            "ema": {
                "initted": torch.tensor(True), "step": torch.tensor(9),
                **under("online_model.", bad), **under("ema_model.", good),
            }
        }, "ema/ema_model", ["ema/online_model"], ["initted", "step"]),
    "timm": (
        lambda good, bad: {"state_dict": bad, "state_dict_ema": good, "arch": "dit"},
        "state_dict_ema", ["state_dict"], []),
    "averages by their decay": (
        lambda good, bad: {"emas": {"0.999": good, "0.9999": bad}, "rng": torch.zeros(4)},
        "emas/0.999", ["emas/0.9999"], []),
    "deep inside": (
        lambda good, _: {"trainer": {"state": [{"net": good}]}}, "trainer/state/0/net", [], []),
    "with an encoder of images": (
        lambda good, _: {
            "model": under("denoiser.", good) | {"dino.blocks.0.attn.qkv.weight": torch.ones(3, 3)}
        }, "model/denoiser", [], []),
    "numbers of numpy and arguments": (
        lambda good, _: {
            "ema": good, "step": np.int64(3), "when": datetime.date(2024, 1, 1),
            "args": argparse.Namespace(folder=pathlib.Path("x"), ratio=fractions.Fraction(1, 2)),
        }, "ema", [], []),
}  # fmt: skip


@pytest.fixture(scope="module")
def weights():
    return random_weights()


@pytest.fixture(scope="module")
def safetensors(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "own.safetensors"
    save_file(weights, path)
    return path


class TestWhatIsLoaded:
    """From files of several kinds into a fresh model."""

    def test_a_file_of_the_same_model(self, weights, safetensors):
        config = configured(safetensors)
        warm_start, model = check_warm_start(config), build_model(config)

        load(warm_start, model)

        loaded = dict(model.named_parameters())
        assert all(torch.equal(loaded[name], value) for name, value in weights.items())
        assert warm_start.matched_parameters == sum(p.numel() for p in model.parameters())
        assert warm_start.freshly_initialised == warm_start.unused == []
        assert "freshly initialised  nothing" in warm_start.report()

    @pytest.mark.parametrize("rank", range(4))
    def test_each_rank_takes_its_share_of_the_experts(self, tmp_path, rank):
        weights = random_weights(num_experts=4)
        save_file(weights, tmp_path / "own.safetensors")
        config = configured(tmp_path / "own.safetensors", num_experts=4)
        model = build_model(config, expert_parallel_size=2)

        load(check_warm_start(config), model, rank)

        share = slice(0, 2) if rank % 2 == 0 else slice(2, 4)
        for name, parameter in model.named_parameters():
            expected = weights[name][share] if ".experts." in name else weights[name]
            assert torch.equal(parameter, expected), name

    def test_the_averaged_weights_of_a_training_script_with_arguments(self, weights, tmp_path):
        """As DiT's train.py writes them."""
        path = tmp_path / "0400000.pt"
        trunk = without_routing(weights)
        shifted = {name: value + 1 for name, value in trunk.items()}
        args = argparse.Namespace(model="DiT-S/2", lr=1e-4)
        torch.save({"model": shifted, "ema": trunk, "opt": {"state": {}}, "args": args}, path)
        config = configured(path)
        warm_start, model = check_warm_start(config), build_model(config)
        fresh = {name: value.clone() for name, value in model.named_parameters()}

        load(warm_start, model)

        expected = fresh | trunk
        assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
        assert warm_start.entry == "ema"
        assert set(warm_start.freshly_initialised) == fresh.keys() - trunk.keys()
        report = warm_start.report()
        assert f"--init-from {path}: DiT or DTR (this program), entry 'ema'" in report
        assert (
            "freshly initialised  gate.weight, gate.bias, "
            "blocks.*.mixture.deepspeed_moe.experts.weight x 6" in report
        )

    @pytest.mark.parametrize("name", FOREIGN)
    def test_a_checkpoint_of_another_trainer(self, name, weights, tmp_path):
        """However it is wrapped, the averaged weights if there are some."""
        make, entry, others, unused = FOREIGN[name]
        path = tmp_path / "theirs.ckpt"
        torch.save(make(weights, {key: value + 1 for key, value in weights.items()}), path)
        config = configured(path)
        warm_start, model = check_warm_start(config), build_model(config)

        load(warm_start, model)

        assert all(torch.equal(p, weights[key]) for key, p in model.named_parameters())
        assert (warm_start.entry, warm_start.other_entries) == (entry, others)
        assert warm_start.freshly_initialised == []
        assert warm_start.unused == unused
        for text in (*others, *unused):
            assert text in warm_start.report()

    def test_quantised_weights_are_not_taken_for_numbers(self, weights, tmp_path):
        name = "blocks.3.mlp.fc1.weight"
        save_file(weights | {name: weights[name].to(torch.int8)}, tmp_path / "q.safetensors")

        assert check_warm_start(configured(tmp_path / "q.safetensors")).freshly_initialised == [
            name
        ]

    def test_a_bare_file_of_torch_in_half_precision_and_in_the_old_format(self, weights, tmp_path):
        half = {name: value.half() for name, value in weights.items()}
        torch.save(half, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        config = configured(tmp_path / "old.pth")
        model = build_model(config)

        load(check_warm_start(config), model)

        for name, parameter in model.named_parameters():
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, half[name].float()), name

    def test_a_folder_of_diffusers(self, weights, tmp_path):
        (tmp_path / "transformer").mkdir()
        file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
        save_file(without_routing(weights), file)

        assert check_warm_start(configured(tmp_path)).file == str(file)

    def test_other_shapes_stay_fresh_and_are_named(self, safetensors):
        table, patch = "y_embedder.embedding_table.weight", "x_embedder.proj.weight"

        classes = check_warm_start(configured(safetensors, num_classes=20))
        experts = check_warm_start(configured(safetensors, num_experts=4))
        patches = check_warm_start(configured(safetensors, patch_size=4, latent_channels=16))

        assert classes.freshly_initialised == [table]
        assert f"{table} (11x128 there, 21x128 here: a row per class and" in classes.report()
        assert {name.split(".")[-1] for name in experts.other_shape} == {"weight", "bias"}
        assert len(experts.other_shape) == 2 + 2 * 6
        assert patches.other_shape[patch] == "128x4x2x2 there, 128x16x4x4 here"
        assert set(patches.other_shape) == {
            patch,
            "final_layer.linear.weight",
            "final_layer.linear.bias",
        }

    def test_names_that_the_model_lacks_are_reported(self, weights, tmp_path):
        save_file(weights | {"blocks.6.mlp.fc1.bias": torch.zeros(512)}, tmp_path / "7.safetensors")

        warm_start = check_warm_start(configured(tmp_path / "7.safetensors"))

        assert warm_start.unused == ["blocks.6.mlp.fc1.bias"]
        assert "not used             blocks.*.mlp.fc1.bias" in warm_start.report()


def refusal(path, **model):
    with pytest.raises(ConfigError) as error:
        check_warm_start(configured(path, **model))
    message = str(error.value)
    assert message.startswith(f"--init-from {path}")
    assert "\n" not in message
    return message


class TestWhatIsRefused:
    """In one sentence, before anything starts."""

    def test_what_is_not_there_or_no_file_of_weights(self, tmp_path):
        (tmp_path / "weights.npz").touch()

        assert f"there is no {tmp_path}/none; give a run" in refusal(tmp_path / "none")
        (tmp_path / "link").symlink_to("purged")
        assert "link: is a link to purged, which does not exist; " in refusal(tmp_path / "link")
        assert "is neither a run, a diffusers folder nor a" in refusal(tmp_path / "weights.npz")
        assert "is neither a run, a diffusers folder nor a" in refusal(tmp_path)
        (tmp_path / CONFIG_FILE).write_text(SMALL.to_yaml())
        assert f"{tmp_path} has no checkpoint yet; train first." in refusal(tmp_path)
        assert f"{tmp_path} is no run directory" not in refusal(f"{tmp_path}:step-0000001")
        assert "is no run directory; give RUN:TAG" in refusal(f"{tmp_path}/none:step-0000001")

    def test_urls(self):
        url = "https://dl.example.org/DiT-XL-2-256x256.pt"

        assert "URLs are not fetched; download the file and give its path." in refusal(url)

    def test_parts_of_a_run_that_are_not_its_weights(self, tmp_path):
        folder = tmp_path / "checkpoints"
        folder.mkdir()
        (folder / "latest").write_text("step-0000001\n")
        (tmp_path / CONFIG_FILE).write_text(SMALL.to_yaml())

        for path in (folder, folder / "latest"):
            assert f"give the run, {tmp_path}, or one of its checkpoints," in refusal(path)

    def test_files_of_deepspeed(self, tmp_path):
        names = ("mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
        for name in names:
            (tmp_path / name).touch()
            assert "own file for resuming, not a model's weights in one" in refusal(tmp_path / name)
        (tmp_path / "weights.safetensors").touch()

        for name in names:
            assert f"in one file; give {tmp_path}/weights.safetensors." in refusal(tmp_path / name)

    @pytest.mark.parametrize("suffix", ["safetensors", "pt"])
    def test_a_truncated_file(self, safetensors, weights, tmp_path, suffix):
        path = tmp_path / f"short.{suffix}"
        if suffix == "pt":
            torch.save(weights, path)
        else:
            path.write_bytes(safetensors.read_bytes())
        path.write_bytes(path.read_bytes()[:100_000])

        assert "is damaged or no" in refusal(path)

    def test_a_page_that_says_that_the_download_failed(self, tmp_path):
        path = tmp_path / "page.pt"
        path.write_text("<html>404</html>")

        assert (
            "is damaged or no torch file (it is no pickle of tensors and values); copy"
            in refusal(path)
        )

    def test_objects_without_tensors(self, tmp_path):
        path, old_path = tmp_path / "new.pt", tmp_path / "old.pt"
        torch.save(fractions.Fraction(1, 2), path)
        torch.save(fractions.Fraction(1, 2), old_path, _use_new_zipfile_serialization=False)

        for file in (path, old_path):
            assert "holds fractions.Fraction, but no tensors by name; save a" in refusal(file)

    def test_a_file_that_runs_a_program_when_it_is_opened(self, weights, tmp_path):
        path = tmp_path / "evil.pt"
        torch.save({"ema": weights, "run": Runs(tmp_path / "ran")}, path)

        assert "asks for posix.system when it is opened, which no file of w" in refusal(path)
        assert not (tmp_path / "ran").exists()

    def test_entries_that_are_no_weights(self, tmp_path):
        torch.save({"optimizer": {}, "step": 3}, tmp_path / "a.pt")
        torch.save([torch.zeros(1)], tmp_path / "b.pt")
        save_file({"conv.weight": torch.zeros(1)}, tmp_path / "c.safetensors")

        assert "holds the entries optimizer, step, but no tensors" in refusal(tmp_path / "a.pt")
        assert "holds list, but no tensors by name" in refusal(tmp_path / "b.pt")
        assert "no tensor is of a diffusion tr" in refusal(tmp_path / "c.safetensors")

    def test_blocks_of_another_size(self, safetensors):
        message = refusal(safetensors, size="S")

        assert "none of its blocks fits the model (blocks.0." in message
        assert "use the --size that it was trained in." in message

    def test_values_that_are_not_finite(self, weights, tmp_path):
        name = "blocks.3.attn.qkv.weight"
        save_file(weights | {name: weights[name] / 0}, tmp_path / "nan.safetensors")

        assert f"{name} holds values that are not finite" in refusal(tmp_path / "nan.safetensors")

    def test_another_positional_table(self, weights, tmp_path):
        torch.save(
            without_routing(weights) | {"pos_embed": torch.zeros(1, 64, 128)}, tmp_path / "p.pt"
        )

        assert "its pos_embed differs by 1 from the fixed" in refusal(tmp_path / "p.pt")
        assert check_warm_start(configured(tmp_path / "p.pt", latent_width=32)).other_shape == {}

    def test_the_run_itself(self, tmp_path):
        for source in (".", "checkpoints/step-0000001", ".:step-0000001"):
            config = configured(tmp_path / source)
            config = replace(config, run=replace(config.run, run_dir=str(tmp_path)))
            with pytest.raises(ConfigError, match="itself; to continue that run leave --init-from"):
                check_is_elsewhere(config)
        check_is_elsewhere(configured(tmp_path))


class TestAnotherSourceWhenARunGoesOn:
    """The source of the first weights is not read again, so only its name is looked at."""

    @pytest.fixture
    def resumed(self, tmp_path):
        """Say what becomes of a source that is given to a run which began with tmp_path/first."""
        (tmp_path / "first").touch()
        folder = tmp_path / "run/checkpoints/step-0000001"
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
        (folder.parent / "latest").write_text(folder.name)
        begun = configured(tmp_path / "first")
        (tmp_path / "run" / CONFIG_FILE).write_text(begun.to_yaml())

        def call(source):
            config = configured(source)
            run = replace(config.run, run_dir=str(tmp_path / "run"))
            config, note = with_own_origin(replace(config, run=run))
            return config.run.init_from, note

        return call

    def test_left_out(self, resumed, tmp_path):
        assert resumed(None) == (str(tmp_path / "first"), "")

    def test_as_before_though_it_is_gone(self, resumed, tmp_path):
        (tmp_path / "first").unlink()

        assert resumed(tmp_path / "first") == resumed(None) == (str(tmp_path / "first"), "")

    def test_moved(self, resumed, tmp_path):
        (tmp_path / "first").rename(tmp_path / "moved")

        source, note = resumed(tmp_path / "moved")

        assert source == str(tmp_path / "first")
        assert note.startswith(f"--init-from {tmp_path}/moved: is not read; {tmp_path}/run goes on")

    def test_another_one_is_left_to_be_refused(self, resumed, tmp_path):
        (tmp_path / "other").touch()

        assert resumed(tmp_path / "other") == (str(tmp_path / "other"), "")

    def test_before_the_first_checkpoint_it_is_read(self, resumed, tmp_path):
        shutil.rmtree(tmp_path / "run/checkpoints")

        assert resumed(None) == (None, "")
