"""The commands of README and docs, run whole: on pictures of this test, a small network, few steps.

What is started otherwise stands in STARTED_BY, with the test that does it.
"""

import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.support.configs import FP32, small
from tests.support.documents import OURS, program_and_arguments
from tests.support.evaluated_run import save_network
from tests.support.image_inputs import make_tar, picture, save
from tests.support.launch import REPOSITORY, environment, run
from training.engine.build import build_model

STARTED_BY = {  # commands by their first words
    "sbatch": "cluster/test_cluster_slurm.py",
    "bash slurm/train_xl.sh": "cluster/test_slurm_templates.py",
    "mpirun": "cluster/test_cluster_launchers.py",
    "deepspeed --hostfile": "cluster/test_cluster_launchers.py",
    "python benchmarks/gpu_acceptance.py": "benchmarks/test_gpu_acceptance.py",
    "python -m training.demo": "cluster/test_cluster_browser.py",
    "python -m training.config.options_table": "training/config/test_config.py",
    "python -m training.monitoring.metrics_table": "training/monitoring/test_registry.py",
}
NETWORK = "--size demo --latent-size 16 --num-classes 10"
STEPS = f"--global-batch-size 8 --max-steps 2 --save-every 2 --sample-every 0 --deepspeed {FP32}"
VAE = "--vae data_tools/demo_vae --size 64"
FIRST = [  # what the pages take for granted
    f"data_tools/encode_latents.py --input held-out --output latents/imagenet256-val {VAE}",
    f"data_tools/encode_latents.py --input photos --output datasets/demo {VAE}",
    f"training/main.py --data datasets/demo {NETWORK} {STEPS} --run-dir runs/demo",
    f"training/main.py --data datasets/demo {NETWORK} {STEPS} --run-dir runs/XL --ema-stds 0.05,0.1"
    " --ema-snapshot-every 1",
]
POSTHOC = "runs/XL/posthoc/std0.080"
INSTEAD = {"FOLDER": "datasets/photos", "IMAGES": "photos", "FILE": "file.png"}
INSTEAD |= {
    f"{POSTHOC}-step-0003000.safetensors": f"{POSTHOC}-step-0000002.safetensors",
    "--inception": "--features",
    "pt_inception-2015-12-05-6726825d.pth": "means.pt",  # nobody else's weights pass for Inception
}
# What is small here, by the first words of a command without its launcher; the first that fits.
# Of a flag that is given twice, the last one counts.
SMALL = {
    "data_tools/encode_latents.py --input": VAE,
    "data_tools/encode_latents.py": f"--input photos --output datasets/demo {VAE}",
    "data_tools/index_shards.py": VAE,
    "training/main.py --preset xl --run-dir runs/XL-from-DiT": (
        f"{NETWORK} {STEPS} --routing dense --data datasets/demo"
    ),
    "training/main.py": f"{NETWORK} {STEPS}",
    "training/sample.py runs/demo": "--steps 2 --per-class 1",
    "training/sample.py": "--steps 2",
    "training/evaluate.py runs/XL --validation-data": "",
    "training/evaluate.py": "--num-images 16 --steps 2 --features means.pt",
    "training/score_images.py": "--features means.pt",
    "training/reference_statistics.py": "--size 64 --features means.pt",
    "benchmarks/compare_routing.py": "--steps 1",
    "benchmarks/attention.py": "--tokens 8 --batch 1 --repeats 1",
    "benchmarks/data.py": "--folder . --num-shards 2 --repeats 1 --memory-samples 4096",
    "benchmarks/encoding.py": "--images 8 --repeats 1 --shard-size 4 --workers 1",
    "benchmarks/expert_parallel.py": "--steps 1 --batch 2 --width 16 --tokens 4 --ranks 2",
    "benchmarks/experts.py": "--max-gflop 0.1 --device cpu",
    "benchmarks/metrics_cost.py": "--size demo --batch 2 --steps 1",
    "benchmarks/placement.py": "--steps 1 --batch 8",
    "benchmarks/prior_matching.py": "--experts 3",
    "benchmarks/sampling.py": "--size demo --images 1 --steps 1 --repeats 1",
    "benchmarks/train_step.py": "--size demo --batch 2 --steps 1 --device cpu",
}
IN_ORDER = (
    "data_tools/encode_latents.py",
    "data_tools/",
    "training/main.py",
    "training/export.py",
    "training/reconstruct",
)


def arguments_here(command):
    """What a command starts here: its program and arguments, smaller."""
    words = program_and_arguments(command)
    said = " ".join(words)
    small = next((added for start, added in SMALL.items() if said.startswith(start)), "")
    return [*(INSTEAD.get(word, word) for word in words), *small.split()]


def place_in_order(arguments):
    """Commands that others need the results of go first."""
    return next((k for k, start in enumerate(IN_ORDER) if arguments[0].startswith(start)), 9)


HERE = {
    command: arguments_here(command)
    for command in OURS
    if not command.startswith(tuple(STARTED_BY))
}
BENCHMARKS = [command for command in HERE if HERE[command][0].startswith("benchmarks/")]
PROGRAMS = sorted(
    (command for command in HERE if command not in BENCHMARKS),
    key=lambda command: place_in_order(HERE[command]),
)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, demo_images):
    """A folder in which every name of the documentation stands for something."""
    folder = tmp_path_factory.mktemp("workshop")
    for name in ("training", "models", "data_tools", "benchmarks", "ds_configs", "slurm"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "photos").symlink_to(demo_images)
    for shade, photos in enumerate(sorted(demo_images.iterdir())):
        for k in range(2):
            save(folder / "held-out" / photos.name / f"{k}.png", shade)
    (folder / "runs").mkdir()
    (folder / "runs/XL-16-experts").symlink_to("one")
    for k in range(147):
        members = [("a.png", picture(k)), ("a.cls", b"%d" % (k % 10))]
        make_tar(folder / f"imagenet/{k:03d}.tar", members)
    names = {str(k): [f"n{k:08d}", f"name {k}"] for k in range(10)}
    (folder / "imagenet_class_index.json").write_text(json.dumps(names))
    latents = np.random.default_rng(0).standard_normal((24, 4, 16, 16)).astype(np.float16)
    members = []
    for k, latent in enumerate(latents):
        array = io.BytesIO()
        np.save(array, latent)
        members += [(f"{k:04d}.cls", b"%d" % (k % 10)), (f"{k:04d}.latent.npy", array.getvalue())]
    make_tar(folder / "tars/0.tar", members)
    save_network(folder / "means.pt")
    config = small(routing="dense")
    torch.save(build_model(config).state_dict(), folder / "DiT-XL-2-256x256.pt")
    images = np.random.default_rng(0).integers(0, 255, (16, 64, 64, 3), np.uint8)
    for name in ("images", "samples", "VIRTUAL_imagenet256_labeled"):
        np.savez(folder / f"{name}.npz", arr_0=images)
    return folder


@pytest.fixture(scope="module")
def outcomes(workshop):
    """For every program but benchmarks: exit code and output."""
    commands = [*(command.split() for command in FIRST), *(HERE[name] for name in PROGRAMS)]
    result = subprocess.run(
        [sys.executable, REPOSITORY / "tests/support/run_commands.py"],
        input=json.dumps(commands),
        cwd=workshop,
        env=environment(DS_ACCELERATOR="cpu", PYTHONUTF8="1"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return dict(zip([*FIRST, *PROGRAMS], map(json.loads, result.stdout.splitlines()), strict=True))


@pytest.mark.processes
@pytest.mark.parametrize("command", [*FIRST, *PROGRAMS])
def test_a_documented_command_does_its_work(outcomes, command):
    code, output = outcomes[command]

    assert code == 0, output


@pytest.mark.long
@pytest.mark.parametrize("command", BENCHMARKS)
def test_a_documented_benchmark_runs(workshop, command):
    if "compare_routing" in command:
        run("python", "data_tools/encode_latents.py", *FIRST[0].split()[1:], cwd=workshop)

    run("python", *HERE[command], cwd=workshop, DS_ACCELERATOR="cpu")


@pytest.mark.parametrize(("start", "test"), STARTED_BY.items(), ids=STARTED_BY)
def test_other_commands_are_started_by_another_test(start, test):
    word = re.split(r"[./]", start.removesuffix(".sh"))[-1].split()[-1]

    assert any(command.startswith(start) for command in OURS), "stale: no page has it"
    assert word in (REPOSITORY / "tests" / test).read_text()
