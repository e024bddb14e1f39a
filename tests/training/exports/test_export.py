"""Exports: loaded by programs that lack this repository, they compute what this one computes."""

import ast
import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, safe_open

from data_tools.files import as_json
from data_tools.shards.manifest import DATASET, DatasetManifest, VaeReference
from data_tools.stream.order import ORDER_VERSION
from data_tools.vae.autoencoder import DEMO_VAE, decode_pixels, load_decoder, load_vae
from models.diffusion import Diffusion
from models.guidance import Guidance
from models.network_options import NetworkOptions
from models.switch_dit import SwitchDiT
from tests.support.configs import small
from tests.support.fake_hub import REPOSITORY_ID, fake_hub
from tests.support.launch import REPOSITORY
from tests.support.load_exports import foreign_modules
from tests.support.synthetic import make_dataset, random_moments
from training.checkpoints.manifest import (
    CHECKPOINT_DIR,
    EMA_FILE,
    LATEST_FILE,
    MANIFEST_FILE,
    RAW_FILE,
    CheckpointManifest,
    Layout,
    TrainState,
    record_of,
    tag_of,
)
from training.checkpoints.weight_files import write_weights
from training.config.network import network_options
from training.engine.build import build_model
from training.export import main
from training.exports.code_files import FILES, joined_code, write_code
from training.run.directory import load_config
from training.run.weights import find_weights
from training.sampling.latents import SamplerSettings, sample_latents

pytestmark = pytest.mark.processes

STEP = 7
TAG = tag_of(STEP)
RUNS = {
    "switch": {},
    "mlp": {
        "expert_kind": "mlp",
        "objective": "v",
        "qk_norm": True,
        "renormalize_gates": True,
        "loss_weight": "uncertainty",
    },
    "dtr": {"routing": "dtr", "objective": "flow", "timestep_shift": 2.0, "num_classes": 0},
    "dense": {"routing": "dense"},
}
LABELS = [0, 3, 9]
INPUTS = {"x": torch.linspace(-2, 2, 3 * 4 * 16 * 16).reshape(3, 4, 16, 16), "y": LABELS}


def config_of(**changes):
    """Sixteen tokens and little else: what is tested does not depend on size."""
    return small(patch_size=4, noise_schedule="linear", **changes)


def random_weights(config, seed):
    torch.manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in build_model(config).named_parameters()}
    return {name: torch.randn(shape) * 0.05 for name, shape in shapes.items()}


def make_run(run_dir, config, vae_sha256):
    """A run directory as training leaves it, with random weights."""
    folder = run_dir / CHECKPOINT_DIR / TAG
    folder.mkdir(parents=True)
    for seed, name in enumerate((EMA_FILE, RAW_FILE)):
        write_weights(folder / name, random_weights(config, seed))
    files = {path.name: record_of(path) for path in folder.iterdir()}
    layout, state = Layout(4, 2, 2, "bf16"), TrainState(STEP, 64 * STEP)
    manifest = CheckpointManifest(TAG, state, layout, "f" * 64, ORDER_VERSION, files)
    (folder / MANIFEST_FILE).write_text(as_json(manifest))
    (folder.parent / LATEST_FILE).write_text(TAG)
    (run_dir / "config.yaml").write_text(config.to_yaml())
    shape = (8, 16, 16)
    moments = random_moments(shape)
    data = make_dataset(run_dir / "data", [10], False, 10, shape, moments).described()
    vae = VaeReference("data_tools/demo_vae", vae_sha256, 1.0, 0.0)
    DATASET.write(run_dir / "dataset.json", dataclasses.replace(data, vae=vae))
    return run_dir


@pytest.fixture(scope="session")
def vae():
    return load_vae(DEMO_VAE)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, vae):
    """Run directories by name; nothing may be changed in them."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        name: make_run(folder / name, config_of(**changes), vae.sha256)
        for name, changes in RUNS.items()
    }


@pytest.fixture
def run(runs, tmp_path):
    """A copy of the Switch-DiT's run that a test may change."""
    return Path(shutil.copytree(runs["switch"], tmp_path / "run"))


def source_of(module):
    return (REPOSITORY / f"{module.replace('.', '/')}.py").read_text()


def export(*arguments):
    main([str(argument) for argument in arguments])


def network(run_dir, file=EMA_FILE):
    model = build_model(config_of(**RUNS[run_dir.name]))
    model.load_state_dict(load_file(run_dir / CHECKPOINT_DIR / TAG / file))
    return model.eval()


def our_latents(
    run_dir, method, steps, *, seed=0, scale=1.0, shift=1.0, interval=None, file=EMA_FILE
):
    changes, num_classes = RUNS[run_dir.name], config_of(**RUNS[run_dir.name]).model.num_classes
    return sample_latents(
        network(run_dir, file),
        Diffusion("linear", 1000, objective=changes.get("objective", "epsilon")),
        SamplerSettings(method, steps, seed, Guidance(scale, None, interval), shift),
        indices=torch.arange(len(LABELS)),
        labels=torch.tensor(LABELS if num_classes else [0] * len(LABELS)),
        latent_shape=(4, 16, 16),
        null_class=num_classes,
    )


def loaded(jobs, folder, environment):
    """What exports compute in a process that lacks this repository; see load_exports.py."""
    wanted, results = folder / "jobs.json", folder / "results.pt"
    wanted.write_text(json.dumps(jobs))
    script = REPOSITORY / "tests/support/load_exports.py"
    finished = subprocess.run(
        [sys.executable, "-I", script, wanted, results, str(torch.get_num_threads())],
        cwd=folder,
        env=os.environ | {"HF_MODULES_CACHE": str(folder / "modules")} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return torch.load(results, weights_only=False)


@pytest.fixture(scope="module")
def exports(runs, tmp_path_factory):
    """Folders of exports, and what they compute in a process that lacks this repository."""
    folder = tmp_path_factory.mktemp("exports")

    def make(name, run_name, *arguments):
        export(runs[run_name], "--output", folder / name, *arguments)
        return str(folder / name)

    inputs = {"x": INPUTS["x"].tolist(), "y": LABELS}
    names = [f"class {i}" for i in LABELS]
    quick = {"num_inference_steps": 3, "class_labels": LABELS}
    jobs = {
        "switch": {
            "kind": "pipeline",
            "folder": make("switch", "switch", "--steps", 4, "--guidance-interval", 0.2, 0.8),
            "is_used": True,
            "calls": [
                {"class_labels": names, "seed": 5},
                {**quick, "sampler": "ddpm", "guidance_scale": 1.0},
                {**quick, "sampler": "dpmpp-2m", "guidance_interval": [0.0, 1.0]},
            ],
            "refused": [
                {"class_labels": ["dog"]},
                {"class_labels": 10},
                {"sampler": "euler"},
                {"num_inference_steps": 0},
                {"shift": 2.0},
                {"class_labels": [0], "indices": [0, 1]},
                {"output_type": "jpeg", "num_inference_steps": 1},
                {"class_labels": []},
                {"class_labels": True},
                {"class_labels": "Class 3"},
                {"num_inference_steps": 2.0},
                {"guidance_scale": -1},
                {"guidance_interval": [0.9, 0.1]},
                {"guidance_interval": [0, 1000]},
                {"guidance_interval": 0.5},
                {"guidance_channels": 99},
                {"guidance_scale": 1, "guidance_interval": [0, 1]},
                {"seed": -1},
                {"indices": [-1]},
            ],
        },
        "raw": {
            "kind": "pipeline",
            "folder": make("raw", "switch", "--raw", "--steps", 2, "--cfg-scale", 1),
            "calls": [{"class_labels": LABELS}],
            "refused": [],
        },
        "mlp": {
            "kind": "pipeline",
            "folder": make("mlp", "mlp", "--steps", 3),
            "calls": [{"class_labels": LABELS}],
            "refused": [],
        },
        "flow": {
            "kind": "pipeline",
            "folder": make("flow", "dtr", "--steps", 3),
            "calls": [{"class_labels": LABELS}, {**quick, "sampler": "heun", "shift": 1.0}],
            "refused": [{"guidance_scale": 2.0}],
        },
        "merged": {
            "kind": "pipeline",
            "folder": make("merged", "switch", "--format", "merged", "--steps", 4),
            "calls": [{"class_labels": LABELS}],
            "refused": [{"class_labels": LABELS, "num_inference_steps": 5}],
        },
        "dense": {
            "kind": "pipeline",
            "folder": make("dense", "dense", "--steps", 2),
            "calls": [{"class_labels": LABELS}],
            "refused": [],
        },
        "program": {
            "kind": "program",
            "folder": make("program", "switch", "--format", "torch-export"),
            "inputs": inputs,
            "timesteps": [0, 500, 999],
        },
    }
    found = loaded([*jobs.values()], folder, {"HF_HUB_OFFLINE": "1"})
    return {
        name: (Path(job["folder"]), result)
        for (name, job), result in zip(jobs.items(), found, strict=True)
    }


def test_what_an_export_must_not_import_is_told_from_what_it_may(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    names = ("json", "torch.nn", "PIL.Image", "yaml", "scipy", "models.gate", "webdataset", "tests")

    found = foreign_modules({name: importlib.import_module(name) for name in names})

    assert found == ["models", "tests", "webdataset"]


def test_the_pipeline_draws_our_images_bit_for_bit(exports, runs, vae):
    _, found = exports["switch"]

    guided = our_latents(runs["switch"], "ddim", 4, seed=5, scale=2.0, interval=(200, 800))
    assert torch.equal(found["latents"][0], guided)
    assert torch.equal(found["by_generator"], guided)
    assert torch.equal(found["latents"][1], our_latents(runs["switch"], "ddpm", 3))
    everywhere = our_latents(runs["switch"], "dpmpp-2m", 3, scale=2.0)
    assert torch.equal(found["latents"][2], everywhere)
    assert torch.equal(found["pixels"], torch.from_numpy(decode_pixels(vae, guided)))
    assert guided.isfinite().all() and guided.std() > 0.1


def test_raw_weights_and_every_kind_of_routing_are_drawn_bit_for_bit(exports, runs):
    names = ("raw", "mlp", "flow", "dense")
    raw, mlp, flow, dense = (exports[name][1]["latents"] for name in names)

    assert torch.equal(raw[0], our_latents(runs["switch"], "ddim", 2, file=RAW_FILE))
    assert torch.equal(mlp[0], our_latents(runs["mlp"], "ddim", 3, scale=2.0))
    assert torch.equal(flow[0], our_latents(runs["dtr"], "euler", 3, shift=2.0))
    assert torch.equal(flow[1], our_latents(runs["dtr"], "heun", 3))
    assert torch.equal(dense[0], our_latents(runs["dense"], "ddim", 2, scale=2.0))


def test_a_mistake_in_a_call_is_named(exports):
    """By the checks of the command line, in the words of the call."""
    refusals = exports["switch"][1]["refusals"]

    assert refusals == [
        "class_labels: unknown class 'dog'; give a number of a class, from 0 to 9, or a name: "
        "'class 0', 'class 1', 'class 2', 'class 3', 'class 4', 'class 5', 'class 6', 'class 7', "
        "'class 8', 'class 9'.",
        "class_labels: 10 is not a number of a class, from 0 to 9.",
        "sampler euler does not fit objective epsilon; use ddim, ddpm or dpmpp-2m.",
        "num_inference_steps must be at least 1, not 0.",
        "shift 2.0 does not fit objective epsilon: only the times of flow are shifted; leave it "
        "out.",
        "2 indices were given for 1 labels.",
        "output_type must be pil, np or latent, not 'jpeg'.",
        "class_labels is empty; give at least one class.",
        "class_labels: a class that is not given by its name must be a whole number, not True.",
        "class_labels: unknown class 'Class 3'; did you mean 'class 3'?",
        "num_inference_steps must be a whole number, not 2.0.",
        "guidance_scale must be a number of at least 0, not -1.0.",
        "guidance_interval 0.9 0.1 is no interval within 0 and 1; give the lower end first.",
        "guidance_interval 0.0 1000.0 is no interval within 0 and 1; give the lower end first.",
        "guidance_interval must be two numbers, not 0.5.",
        "guidance_channels must be from 1 to 4, the latent channels of the model, not 99.",
        "guidance_interval has no effect without guidance, whose scale is 1; choose another scale "
        "or leave it out.",
        "seed must be >=0 and <9223372036854775808, not -1.",
        "indices must be >=0 and <9223372036854775, not -1.",
    ]
    assert exports["flow"][1]["refusals"] == [
        "guidance_scale 2.0 compares predictions with and without the label, but this model was "
        "not trained with both; use guidance_scale 1."
    ]


def test_labels_may_be_what_people_of_torch_and_numpy_have(exports):
    used = exports["switch"][1]["used"]

    for kind in ("tensor", "array", "numbers of numpy", "saved and loaded", "made of components"):
        assert torch.equal(used[kind], used["list"]), kind
    assert torch.equal(used["tensor of none"], used["one"])
    assert used["made of components and parameters"] == 3
    assert used["label ids"] == [3, 0]
    assert used["unsigned seed"] == (1, 4, 16, 16)
    assert (used["half"] - used["list"]).abs().max() < 0.1 * used["list"].abs().max()


def test_what_would_be_drawn_wrong_is_refused(exports):
    used = exports["switch"][1]["used"]
    number = "class_labels: a class that is not given by its name must be a whole number, not "

    assert used["table"] == "class_labels must have one dimension, not 2."
    assert used["truths"] == f"{number}True."
    assert used["fractions"] == f"{number}3.0."
    assert used["bytes"] == f"{number}b'class 3'."
    assert used["generators"].startswith("generator must be one torch.Generator for all images, ")
    assert used["NaN"] == "guidance_scale must be a number of at least 0, not nan."
    sentence = (
        "scheduler: a {} has no effect on this pipeline, whose solvers visit trained timesteps "
        "only; keep the exported one and choose a solver by sampler."
    )
    assert used["another scheduler"] == sentence.format("DPMSolverMultistepScheduler")
    assert used["another scheduler later"] == sentence.format("DDIMScheduler")


@pytest.mark.parametrize("name", ["raw", "merged"])
def test_a_pipeline_is_loaded_from_the_hub(exports, tmp_path, name):
    """It downloads no Python files but those that the index names."""
    folder, found = exports[name]
    job = {"kind": "pipeline", "folder": REPOSITORY_ID, "refused": []}
    job["calls"] = [{"class_labels": LABELS}]

    with fake_hub(folder) as address:
        environment = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
        (from_hub,) = loaded([job], tmp_path, environment)

    assert torch.equal(from_hub["latents"][0], found["latents"][0])
    assert torch.equal(from_hub["pixels"], found["pixels"])


def test_merged_experts_draw_our_images_bit_for_bit_at_their_steps_only(exports, runs):
    folder, found = exports["merged"]

    assert torch.equal(found["latents"][0], our_latents(runs["switch"], "ddim", 4, scale=2.0))
    assert "was merged for the timesteps [0, 333, 666, 999]" in found["refusals"][0]
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert weights["network.merged_weight"].shape == (6, 4, 128, 128)
    assert not any("mixture" in name or "gate" in name for name in weights)


def test_a_program_of_torch_export_predicts_the_same(exports, runs):
    model = network(runs["switch"])
    predictions, refusals = exports["program"][1]

    assert refusals == [
        "t must be from 0 to 999",
        "t must be from 0 to 999",
        "y must be from 0 to 10",
    ]
    for t, theirs in zip((0, 500, 999), predictions, strict=True):
        with torch.no_grad():
            ours = model(INPUTS["x"], torch.tensor([t]), torch.tensor(LABELS)).prediction
        torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-6)


def test_a_file_of_weights_is_that_of_the_checkpoint(run, tmp_path):
    export(run / CHECKPOINT_DIR / TAG, "--format", "safetensors", "--output", tmp_path / "x")

    file = tmp_path / "x" / "model.safetensors"
    weights, original = load_file(file), load_file(run / CHECKPOINT_DIR / TAG / EMA_FILE)
    assert weights.keys() == original.keys()
    assert all(torch.equal(weights[name], original[name]) for name in weights)
    described = json.loads((tmp_path / "x" / "config.json").read_text())
    SwitchDiT(NetworkOptions(**described["model"])).load_state_dict(weights)
    with safe_open(file, framework="pt") as opened:
        assert json.loads(opened.metadata()["origin"])["step"] == STEP
    assert find_weights(run, load_config(run), file=file) == file


@pytest.mark.parametrize("stem", FILES)
def test_exported_code_needs_no_more_than_diffusers(stem):
    text = joined_code(FILES[stem])

    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) <= {"torch", "diffusers", "numpy", "PIL"}


def bound_by(statement):
    """The names that a statement of a module binds, with what they mean."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        source = getattr(statement, "module", None)
        return {name.asname or name.name: (source, name.name) for name in statement.names}
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return {statement.name: statement.lineno}
    targets = [ast.walk(one) for one in getattr(statement, "targets", [])]
    targets += [ast.walk(statement.target)] if hasattr(statement, "target") else []
    names = (part.id for parts in targets for part in parts if isinstance(part, ast.Name))
    return dict.fromkeys(names, statement.lineno)


@pytest.mark.parametrize("stem", FILES)
def test_no_module_of_an_exported_file_redefines_a_name_of_another(stem):
    meanings = {}
    for statement in ast.parse(joined_code(FILES[stem])).body:
        for name, meaning in bound_by(statement).items():
            assert meanings.setdefault(name, meaning) == meaning, name


def test_every_module_of_an_exported_file_is_needed():
    for modules in FILES.values():
        for number, module in enumerate(modules[:-1]):
            later = [source_of(other) for other in modules[number + 1 :]]
            assert any(f"from {module} import" in text for text in later), module


def test_code_of_another_version_has_another_module_name(exports, tmp_path, monkeypatch):
    """Else a model that is loaded second would replace the functions of the first."""
    names = [path.stem for path in exports["switch"][0].rglob("*.py")]

    assert len(names) == 3
    assert write_code(tmp_path, "switch_dit") in names
    monkeypatch.setitem(FILES, "switch_dit", FILES["switch_dit"][:-1])
    assert write_code(tmp_path, "switch_dit") not in names


def test_a_folder_states_the_options_of_its_network(exports):
    described = json.loads((exports["mlp"][0] / "transformer" / "config.json").read_text())

    options = NetworkOptions(**described["options"])
    assert options == network_options(config_of(**RUNS["mlp"])).for_prediction()


def test_the_card_has_the_numbers_that_exist(run, tmp_path):
    digest = record_of(run / CHECKPOINT_DIR / TAG / EMA_FILE).sha256
    records = [{"step": step, "loss/mse": step / 100, "optim/lr": 1} for step in (4, 6, 8)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    scores = run / "evaluation" / "a"
    scores.mkdir(parents=True)
    for name, sha256, fid in (("score-1.json", digest, 12.5), ("score-2.json", "0" * 64, 99.5)):
        card = {"metrics": {"fid": fid}, "weights": {"sha256": sha256}, "images": {"steps": 50}}
        (scores / name).write_text(as_json(card))

    export(run, "--format", "safetensors", "--output", tmp_path / "x")

    text = (tmp_path / "x" / "README.md").read_text()
    for number in (digest, TAG, "| fid | 12.5 |", "| `loss/mse` | 0.06 |", "f" * 64, "448"):
        assert number in text, number
    for number in ("99.5", "0.08", "None"):
        assert number not in text, number
    assert "max_steps: 3000" in text and "not included" in text


def test_a_pipeline_comes_with_its_autoencoder_and_its_licence(exports, vae):
    folder = exports["switch"][0]

    assert "OpenMoji" in (folder / "README.md").read_text()
    assert "CC BY-SA 4.0" in (folder / "vae" / "README.md").read_text()
    theirs = load_vae(folder / "vae")
    assert theirs.sha256 == vae.sha256
    assert not re.search(r'"_name_or_path"|": "/', (folder / "vae" / "config.json").read_text())


def test_a_pipeline_decodes_by_the_statistics_of_the_data_that_the_model_learned_from(
    run, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    text = json.loads((run / "dataset.json").read_text())
    text["vae"] |= {"latents_mean": [-1.6, 1.9, -1.4, 2.5], "latents_std": [8.5, 5.9, 6.5, 5.2]}
    (run / "dataset.json").write_text(json.dumps(text))
    reference = DatasetManifest.parse(json.dumps(text).encode(), "dataset.json").vae

    export(run, "--format", "diffusers", "--output", tmp_path / "x", "--steps", 2)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "x", trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline([0, 1], output_type="latent").images
    pixels = pipeline([0, 1], output_type="np").images

    expected = decode_pixels(load_decoder(None, reference), latents)
    assert np.abs(pixels.astype(int) - expected).max() <= 1
    assert list(pipeline.vae.config.latents_std) == reference.latents_std


def test_the_card_of_a_run_without_numbers_states_none(run, tmp_path):
    export(run, "--format", "safetensors", "--output", tmp_path / "x")

    text = (tmp_path / "x" / "README.md").read_text()
    assert "## Losses" not in text and "## Evaluation" not in text


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        export(*arguments)
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--ema", "0.5"], "error: --ema: the run has no average '0.5'"),
        (["--ema", "0.999", "--raw"], "error: --ema and --raw both choose the weights"),
        (["--checkpoint", "step-3"], "error: --checkpoint: no 'step-3'"),
        (["--format", "onnx"], "error: --format: invalid choice: 'onnx'"),
        (["--autoguidance", "runs/weak"], "error: --autoguidance runs/weak needs the weights of"),
        (["--seed", 5], "error: --seed: an export has none; drop the flag"),
        (["--steps", 30, "--format", "safetensors"], "error: --steps: --format safetensors draws"),
        (["--cfg-scale", 2, "--format", "torch-export"], "error: --cfg-scale: --format torch-exp"),
        (["--sampler", "euler"], "error: --sampler euler does not fit objective epsilon"),
        (
            ["--vae", "data_tools/demo_vae", "--format", "safetensors"],
            "error: --vae data_tools/demo_vae has no effect: --format safetensors holds no VAE",
        ),
        (
            ["--format", "dit"],
            "error: --format dit: is no longer written: away from its number of steps, diffusers' "
            "DiTPipeline drew wrong images without any error; use --format diffusers.\n",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused(run, capsys, arguments, sentence):
    before = files_in(run)

    assert refusal(capsys, run, *arguments).startswith(sentence)
    assert files_in(run) == before


@pytest.mark.parametrize(
    ("changes", "flag"),
    [({"routing": "dtr"}, "--routing dtr"), ({"expert_kind": "mlp"}, "--expert-kind mlp")],
)
def test_only_affine_experts_are_merged(run, capsys, changes, flag):
    (run / "config.yaml").write_text(config_of(**changes).to_yaml())

    told = refusal(capsys, run, "--format", "merged")

    assert told.startswith(f"error: --format merged: a run with {flag} has no affine experts to")


def test_a_run_without_checkpoint_is_refused(run, capsys):
    shutil.rmtree(run / CHECKPOINT_DIR)

    assert refusal(capsys, run) == f"error: {run} has no checkpoint yet; train first.\n"
    assert refusal(capsys, run / "data").startswith(f"error: {run / 'data'} is no run directory")


def test_nothing_is_replaced_but_an_export_with_force(run, capsys, tmp_path):
    output = tmp_path / "x"
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    command = (run, "--format", "safetensors", "--output", output)

    assert refusal(capsys, *command).endswith(
        "choose another folder, or replace it with --force.\n"
    )
    assert "is no export and is not replaced" in refusal(capsys, *command, "--force")
    assert files_in(output) == ["thesis.txt"]

    (output / "thesis.txt").rename(output / "export.json")
    assert "exists; choose another" in refusal(capsys, *command)
    export(*command, "--force")
    assert (output / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_export_lies_in_the_run_unless_told_otherwise(run, capsys):
    export(run, "--format", "safetensors")

    folder = run / "exports" / f"safetensors-{TAG}-0.999"
    assert capsys.readouterr().out.startswith(f"{folder}: safetensors, average 0.999 of run, ")
    assert files_in(folder) == ["README.md", "config.json", "export.json", "model.safetensors"]
