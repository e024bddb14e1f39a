"""Files of earlier versions are read for ever: runs go on, data is encoded on, scores stay."""

import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from data_tools import encode_latents, index_shards, verify_shards
from data_tools.shards.manifest import DatasetManifest, content_hash
from data_tools.sources.image_tars import open_tars, scan_tar
from data_tools.stream.reader import SampleReader
from data_tools.stream.training_data import open_data
from data_tools.vae.autoencoder import DEMO_VAE
from tests.support.configs import changed
from tests.support.encode_jobs import content
from tests.support.stored_files import VERSIONS, unpack
from training import evaluate, export, reconstruct_ema, report, sample
from training.checkpoints.manifest import EMA_FILE, latest_checkpoint, read_manifest
from training.evaluation.job import EVALUATION_DIR
from training.evaluation.score_events import read_scores, write_score_events
from training.monitoring.event_files import read_metrics
from training.run.checkpoint_notes import read_notes
from training.run.directory import load_config
from training.run.init_from import check_warm_start
from training.run.program import STARTS_FILE, read_starts

# What checkpoints remember of the stored data.
HASHES = {
    "data": "925ccbe6327e08a4116b2605ced74de5e744f863c3eaca025342a9906c854581",
    "tars": "5bd1f05438a71f8a1848f479471f5367a78251b4ca5ce8dc3ba25f3fa8d4696d",
}
LARGE = ("exports", "ema_snapshots", "posthoc", "tensorboard")
ENCODE = (
    *("--vae", DEMO_VAE, "--size", 16, "--shard-size", 4, "--batch-size", 2),
    *("--precision", "fp32", "--device", "cpu"),
)


@pytest.fixture(scope="module", params=VERSIONS)
def stored(request, tmp_path_factory):
    """The files of a version; nothing may be changed in them."""
    return unpack(request.param, tmp_path_factory.mktemp("stored") / request.param)


@pytest.fixture
def copy(stored, tmp_path):
    """A function that copies a folder of them."""

    def copied(name, *left_out):
        ignored = shutil.ignore_patterns(*left_out)
        return shutil.copytree(stored / name, tmp_path / name, ignore=ignored)

    return copied


def call(main, *argv):
    main([str(part) for part in argv])


def digests(folder):
    """The content of all files of a folder, by name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).digest() for f in files}


@pytest.mark.processes
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_run_goes_on(stored, copy, train_forked, num_ranks):
    run_dir = copy("run", *LARGE)
    before = (run_dir / STARTS_FILE).read_text()

    said = train_forked(
        *("--preset", stored / "preset.yaml", "--deepspeed", stored / "fp32.json"),
        *("--data", stored / "data", "--run-dir", run_dir, "--max-steps", 3),
        num_ranks=num_ranks,
    )

    assert f"resuming {run_dir}/checkpoints/step-0000002 at step 2 of 3" in said
    assert [record["step"] for record in read_metrics(run_dir)] == [1, 2, 3]
    assert (run_dir / STARTS_FILE).read_text().startswith(before)
    assert [start.step for start in read_starts(run_dir)] == [0, 2, 2]
    assert [(note.step, note.outcome) for note in read_notes(run_dir)] == [
        (2, "saved"),
        (3, "saved"),
    ]
    assert read_manifest(latest_checkpoint(run_dir)).state.step == 3


def test_a_run_is_sampled_reported_scored_and_exported(stored, copy, capsys):
    run_dir = copy("run", *LARGE[:3])
    kept = {k: v for k, v in digests(run_dir / EVALUATION_DIR).items() if "settings" not in k}

    call(sample.main, run_dir, "--per-class", 1, "--steps", 2, "--output", run_dir / "drawn")
    call(export.main, run_dir, "--format", "safetensors")
    score = ("--num-images", 14, "--steps", 2, "--batch-size", 7)
    given = ("--reference", stored / "reference.npz", "--features", stored / "features.pt")
    capsys.readouterr()
    call(evaluate.main, run_dir, *score, *given)
    printed = capsys.readouterr()
    call(report.main, run_dir)

    assert len(list((run_dir / "drawn").glob("0*.png"))) == 2
    exported = load_file(next((run_dir / "exports").rglob("model.safetensors")))
    average = load_file(latest_checkpoint(run_dir) / EMA_FILE)
    assert all(torch.equal(value, average[name]) for name, value in exported.items())
    assert "14 images, frechet_distance 4.0354, precision 0.5714, recall 0.2500" in printed.out
    assert kept.items() <= digests(run_dir / EVALUATION_DIR).items()
    assert (run_dir / "report" / "report.html").is_file()


def test_scores_are_shown_at_their_steps(copy):
    run_dir = copy("run", *LARGE)

    scores = read_scores(run_dir / EVALUATION_DIR)
    write_score_events(run_dir)

    assert len(scores) == 3  # two ways of sampling, and the held-out loss
    assert all(list(by_step) == [2] for by_step in scores.values())
    assert len(list((run_dir / "tensorboard" / EVALUATION_DIR).iterdir())) == 3


def test_averages_are_made_of_stored_snapshots(copy):
    run_dir = copy("run", "exports", "checkpoints", "posthoc", "evaluation")

    call(reconstruct_ema.main, run_dir, "--std", 0.08)

    assert load_file(next((run_dir / "posthoc").iterdir()))


def test_stored_exports_are_loaded(stored, copy, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    exports = copy("run") / "exports"
    for kind in ("diffusers", "merged"):
        folder = next(exports.glob(f"{kind}-*"))
        shutil.copytree(DEMO_VAE, folder / "vae")
        pipeline = DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True)
        assert pipeline([0], seed=0, num_inference_steps=2).images[0].size == (16, 16)
    program = torch.export.load(next(exports.rglob("denoiser.pt2"))).module()
    x, y = torch.zeros(2, 4, 4, 4), torch.zeros(2, dtype=torch.int64)
    assert program(x, torch.tensor([5]), y).shape == (2, 8, 4, 4)
    weights = next(exports.rglob("model.safetensors"))
    config = changed(load_config(stored / "run"), init_from=str(weights))
    assert check_warm_start(config).freshly_initialised == []
    call(export.main, stored / "run", "--output", folder, "--format", "safetensors", "--force")
    assert not (folder / "vae").exists()


@pytest.mark.parametrize("name", ["data", "tars"])
def test_a_data_set_is_the_one_that_checkpoints_remember(stored, name, capsys):
    manifest = DatasetManifest.load(stored / name)
    data = open_data(str(stored / name))
    reader = SampleReader(data, data.stores("sha256", None))
    rows = np.arange(manifest.num_samples)
    out = torch.empty(
        (len(rows), *manifest.latent.shape), dtype=getattr(torch, manifest.latent.dtype)
    )

    labels = reader.read(rows, np.zeros(len(rows), bool), out)
    reader.close()
    call(verify_shards.main, "--data", stored / name)

    assert manifest.hash == HASHES[name]
    assert sorted(labels.tolist()) == [0] * (len(rows) // 2) + [1] * (len(rows) // 2)
    assert out.isfinite().all()
    assert "intact" in capsys.readouterr().out


def test_several_data_sets_are_the_ones_that_checkpoints_remember(stored, copy):
    first, second = stored / "data", copy("data")

    union, mixture = open_data(f"{first},{second}"), open_data(f"{first}=3,{second}=1")

    assert union.manifest.hash.startswith("c1af51e87fbe1cfddf861fafba56dbd5654cfc61fb14ed407a0b")
    assert mixture.manifest.hash.startswith("dc9017aa93d57248d69ce530fc32a55f6a2dd08e91d4d6321b")


def test_the_statistics_of_a_vae_are_a_part_of_what_checkpoints_remember(stored):
    manifest = DatasetManifest.load(stored / "data").described()
    statistics = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}

    changed_hash = content_hash(replace(manifest, vae=replace(manifest.vae, **statistics)))

    assert changed_hash.startswith("7973befd77a474c53f3a2c33a83509fea8df82512d7c57142e7ecbeeecbf")


def test_encoding_again_what_is_encoded_changes_nothing(stored, copy):
    folder = copy("data")

    call(encode_latents.main, "--input", stored / "images", "--output", folder, *ENCODE)

    assert content(folder) == content(stored / "data")


def test_an_unfinished_encoding_goes_on_to_the_same_bytes(stored, copy, tmp_path):
    folder = copy("unfinished")
    for path in (folder / ".claims").iterdir():  # of a process that died long ago
        os.utime(path, (0, 0))
    for path in folder.glob("*.tmp"):
        os.utime(path, (0, 0))
    before = {name: (folder / name).read_bytes() for name in ("encoding.json", "00000.tar")}
    images = stored / "image_tars"

    call(encode_latents.main, "--input", images, "--output", folder, *ENCODE)
    call(encode_latents.main, "--input", images, "--output", tmp_path / "fresh", *ENCODE)

    after, fresh = content(folder), content(tmp_path / "fresh")
    assert after.keys() == fresh.keys()
    assert {name: after[name] for name in before} == before
    # Of shard 0 another machine's rounding may be in the bytes, and in what sums it up.
    same = fresh.keys() - {"encoding.json", "00000.tar", "00000.json", "dataset.json"}
    assert {name: after[name] for name in same} == {name: fresh[name] for name in same}


def test_an_index_of_images_in_tars_says_what_a_scan_says(stored, copy):
    cache, tar = copy("unfinished") / ".sources", copy("image_tars") / "images.tar"
    (index,) = cache.iterdir()
    written = int(np.load(index)["state"][2])
    os.utime(tar, ns=(written, written))
    name = hashlib.sha256(os.fsencode(tar.resolve())).hexdigest()[:32]
    index.rename(index.with_name(f"{name}.npz"))

    source, scanned = open_tars(str(tar), [tar], cache), scan_tar(tar)

    assert list(source.indexes[0].names) == list(scanned.names)
    assert source.indexes[0].offsets.tolist() == scanned.offsets.tolist()


def test_indexed_tars_of_others_are_indexed_again_to_the_same(copy):
    folder = copy("tars")

    call(
        index_shards.main,
        *("--input", folder / "part-{0,1}.tar", "--array", "latent.npy", "--kind", "latents"),
        *("--vae", DEMO_VAE),
    )

    assert DatasetManifest.load(folder).hash == HASHES["tars"]


def test_every_stored_file_is_of_the_program(stored):
    """The premise: the examples hold what a run directory and a data set hold."""
    run_dir = Path(stored / "run")

    assert {path.name for path in run_dir.iterdir()} >= {
        *("config.yaml", "dataset.json", "deepspeed.json", "init.json", "starts.jsonl"),
        *("checkpoints.jsonl", "metrics.jsonl", "restarts.json", "log.txt", "provenance"),
    }
