"""Names of folders that shells, globs, format strings or regular expressions would take apart."""

import json
import shutil

import pytest

from data_tools import encode_latents, verify_shards
from data_tools.shards.manifest import DatasetManifest
from data_tools.vae.autoencoder import DEMO_VAE
from tests.support.encode_jobs import flags, make_pictures
from tests.support.launch import REPOSITORY
from training import evaluate, export, report, sample
from training.checkpoints.manifest import latest_checkpoint
from training.monitoring.event_files import read_metrics

pytestmark = pytest.mark.processes

NAME = "betas=[0.9,0.95] *?{a,b} %s%(x)d {0} $ (v1)+ ~ 'q' \"r\" #&;|"
FLAGS = [
    *("--num-experts", 2, "--patch-size", 16, "--global-batch-size", 4, "--warmup-steps", 2),
    *("--log-every", 1, "--save-every", 100, "--sample-every", 0, "--gradient-clipping", 0),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, demo_latents):
    folder = tmp_path_factory.mktemp("odd") / NAME
    shutil.copytree(demo_latents, folder / "latents [1]")
    return folder


@pytest.fixture(scope="module")
def train(folder, train_forked):
    def call(stage, max_steps, num_ranks=1):
        config = folder / f"zero[{stage}].json"
        zero = {"stage": stage, "stage3_param_persistence_threshold": 100}
        config.write_text(json.dumps({"zero_optimization": zero}))
        run_dir = folder / f"run {stage}"
        said = train_forked(
            *("--deepspeed", config, "--data", f"file://{quoted(folder / 'latents [1]')}"),
            *("--run-dir", run_dir, "--max-steps", max_steps, *FLAGS),
            num_ranks=num_ranks,
        )
        return run_dir, said

    return call


def quoted(path):
    """A path in a URL: --data takes commas and braces of a plain text for its own."""
    return "".join(c if c.isalnum() or c in "/-_." else f"%{ord(c):02X}" for c in str(path))


def test_images_a_vae_and_their_latents_may_lie_there(tmp_path):
    folder = tmp_path / NAME
    images = make_pictures(folder / "images [1]", 9)
    shutil.copytree(DEMO_VAE, folder / "vae*")

    argv = flags(images, folder / "set {0..2}") + ["--vae", str(folder / "vae*")]
    encode_latents.main(argv)
    encode_latents.main(argv)
    verify_shards.main(["--data", str(folder / "set {0..2}")])

    assert DatasetManifest.load(folder / "set {0..2}").num_samples == 9


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_is_resumed_whatever_its_folder_is_called(train, stage):
    train(stage, 1)

    run_dir, said = train(stage, 2)

    assert f"resuming {run_dir / 'checkpoints/step-0000001'} at step 1 of 2" in said
    assert [record["step"] for record in read_metrics(run_dir)] == [1, 2]


def test_it_changes_its_layout_and_every_command_finds_it(train, monkeypatch, capsys):
    train(2, 2)
    run_dir, said = train(2, 3, num_ranks=2)
    assert "its layout changes from 1 rank(s)" in said
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    for name, value in (env | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(REPOSITORY)
    run = str(run_dir)

    sample.main([run, "--per-class", "1", "--steps", "2", "--classes", "1"])
    evaluate.main([run, "--num-images", "4", "--steps", "2"])
    report.main([run])
    export.main([run, "--format", "safetensors"])

    said = capsys.readouterr().out
    assert f"grid of samples: {run_dir}/samples/" in said
    assert f"{run_dir / 'report/report.html'} (" in said
    assert list((run_dir / "evaluation").rglob("samples.npz"))
    assert list((run_dir / "exports").rglob("*.safetensors"))
    assert latest_checkpoint(run_dir).name == "step-0000003"
