"""A run on a disk that is too small for a second checkpoint, until somebody makes room."""

import shlex
import time

import pytest

from tests.support.configs import FP32
from tests.support.launch import TIMEOUT_SEC, deepspeed, finish, run, start
from tests.support.synthetic import make_dataset, random_moments
from training.checkpoints.manifest import latest_checkpoint, read_manifest, verify_file
from training.monitoring.event_files import read_metrics

pytestmark = pytest.mark.cluster  # root mounts disks

SHAPE = (8, 8, 8)
STEPS = 60
# One checkpoint of this model on two ranks is 58 MiB.
TOO_SMALL_MIB, LARGE_MIB = 100, 300


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={TOO_SMALL_MIB}m", "tmpfs", folder)
    yield folder
    run("umount", folder)


def test_a_full_disk_costs_a_checkpoint_and_neither_the_one_before_nor_the_run(disk, tmp_path):
    latents, run_dir, log = tmp_path / "latents", disk / "run", tmp_path / "log"
    make_dataset(latents, [32], shape=SHAPE, moments=random_moments(SHAPE), num_classes=10)
    flags = [
        "--preset",
        "tests/small.yaml",
        "--deepspeed",
        FP32,
        "--data",
        latents,
        "--run-dir",
        run_dir,
    ]
    flags += ["--latent-size", SHAPE[1], "--num-experts", 4, "--global-batch-size", 8]
    flags += ["--max-steps", STEPS, "--log-every", 1, "--save-every", 2, "--sample-every", 0]
    command = shlex.join(map(str, deepspeed(2, "training/main.py", *flags)))

    process = start("bash", "-c", f"exec {command} > {log} 2>&1")
    try:
        deadline = time.monotonic() + TIMEOUT_SEC
        while "could not be written" not in (text := log.read_text() if log.exists() else ""):
            assert process.poll() is None, text
            assert time.monotonic() < deadline, text
            time.sleep(0.02)
        folder = latest_checkpoint(run_dir)
        manifest = read_manifest(folder)
        for name in manifest.files:
            verify_file(manifest, folder / name)
        run("mount", "-o", f"remount,size={LARGE_MIB}m", disk)
    finally:
        finish(process)

    output = log.read_text()
    assert process.returncode == 0, output
    assert "warning: checkpoint of step 4 could not be written: No space left on device" in output
    assert "Traceback" not in output
    assert folder.name == "step-0000002"
    assert latest_checkpoint(run_dir).name == f"step-{STEPS:07d}"
    assert read_metrics(run_dir)[-1]["step"] == STEPS
