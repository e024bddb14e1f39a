"""Make one example of every file that this version of the program writes, small enough to keep.

    python tests/formats/make.py tests/formats/NAME

Run this when a format changes, into a folder of a new name; what older versions wrote stays as it
is, and test_formats.py reads all of them. The model begins with zeros, so that its checkpoints
pack to almost nothing: what is large lies in large.tar.xz, beside the files that people can read.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import numpy as np
import torch
import webdataset
from PIL import Image
from safetensors.torch import save_file

from tests.support.evaluated_run import save_network
from training.config.preset import load_preset
from training.engine.build import build_model

LARGE_BYTES = 40_000
PRESET = """\
model: {size: demo, patch_size: 2, latent_channels: 4, latent_size: 4, num_classes: 2,
        num_experts: 2, top_k: 1}
diffusion: {noise_schedule: linear}
data: {data: data, shuffle_window: 8}
optim: {lr: 1e-3, warmup_steps: 1, gradient_clipping: 1.0, ema_decays: [0.999],
        ema_stds: [0.05, 0.1], ema_snapshot_every: 1, ema_warmup: true, global_batch_size: 4}
run: {run_dir: run, seed: 0, init_from: zeros.safetensors, max_steps: 2, log_every: 1,
      save_every: 2, keep_last: 1, sample_every: 0, sample_count: 2, sample_steps: 2,
      sample_cfg_scale: 1.0}
"""


def python(script, *flags, expect=0):
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    env |= {"DS_ACCELERATOR": "cpu", "SLURMD_NODENAME": "node", "SWITCH_DIT_CACHE": "../cache"}
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    assert subprocess.run(command, env=env, check=False).returncode == expect, command


def make_pictures(folder, seed=0, count=16):
    rng = np.random.default_rng(seed)
    for i in range(count):
        path = folder / ("red_cars" if i % 2 else "blue_cars") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((16, 16), Image.Resampling.BICUBIC).save(path)


def make_data():
    make_pictures(Path("images"))
    encode = ["--input", "images", "--vae", "data_tools/demo_vae", "--size", 16]
    encode += ["--shard-size", 4, "--batch-size", 2, "--precision", "fp32", "--device", "cpu"]
    python("data_tools/encode_latents.py", *encode, "--output", "data")
    make_pictures(Path("held_out_images"), seed=1)
    python(
        "data_tools/encode_latents.py",
        *encode,
        "--input",
        "held_out_images",
        "--output",
        "held_out",
    )
    begin_encoding(encode)
    Path("tars").mkdir()
    for number in range(2):
        with webdataset.TarWriter(f"tars/part-{number}.tar") as writer:
            for i in range(4 * number, 4 * number + 4):
                latent = np.random.default_rng(i).standard_normal((4, 4, 4)).astype(np.float32)
                writer.write({"__key__": f"img{i}", "latent.npy": latent, "cls": i % 2})
    index = ["--array", "latent.npy", "--kind", "latents", "--vae", "data_tools/demo_vae"]
    python("data_tools/index_shards.py", "--input", "tars/part-{0,1}.tar", *index)


def begin_encoding(flags):
    """Kill an encoding of images in a tar after its first shard."""
    Path("image_tars").mkdir()
    with webdataset.TarWriter("image_tars/images.tar") as writer:
        for i, path in enumerate(sorted(Path("images").rglob("*.png"))):
            writer.write({"__key__": f"{i:04d}", "png": path.read_bytes(), "cls": i % 2})
    command = [sys.executable, ROOT / "data_tools/encode_latents.py", *flags, "--input"]
    command += ["image_tars", "--output", "unfinished"]
    process = subprocess.Popen([str(part) for part in command])
    while not Path("unfinished/00000.json").exists():
        assert process.poll() is None
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path("unfinished/dataset.json").exists()


def make_run():
    Path("preset.yaml").write_text(PRESET)
    Path("fp32.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    with torch.device("meta"):
        shapes = {k: p.shape for k, p in build_model(load_preset("preset.yaml")).named_parameters()}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, "zeros.safetensors")
    train = ["training/main.py", "--preset", "preset.yaml", "--deepspeed", "fp32.json"]
    python(*train)
    python(*train)  # a second start
    python("training/retry.py", 1, "--run-dir", "run")
    python("training/reconstruct_ema.py", "run", "--std", 0.08)
    python("training/sample.py", "run", "--per-class", 1, "--steps", 2)


def make_scores():
    features = ["--features", save_network(Path("features.pt")), "--device", "cpu"]
    reference = ["--size", 16, "--keep", 8, *features]
    python(
        "training/reference_statistics.py",
        "--input",
        "images",
        *reference,
        *("--output", "reference.npz"),
    )
    score = ["--num-images", 14, "--steps", 2, "--batch-size", 7, "--reference", "reference.npz"]
    python("training/evaluate.py", "run", *score, *features[:2], "--sweep-cfg-scale", "1,2")
    python(
        "training/evaluate.py", "run", "--validation-data", "held_out", "--validation-timesteps", 2
    )
    samples = next(Path("run/evaluation").rglob("samples.npz"))
    python(
        "training/score_images.py",
        samples,
        "--reference",
        "reference.npz",
        *features,
        "--output",
        "card.json",
    )
    for kind in ("safetensors", "diffusers", "merged", "torch-export"):
        steps = ["--steps", 2] if kind in ("diffusers", "merged") else []
        python("training/export.py", "run", "--format", kind, *steps)


def pack(large):
    """Move what is large into one archive."""
    with tarfile.open("large.tar.xz", "w:xz") as archive:
        for path in sorted(large):
            archive.add(path)
            path.unlink()


def main():
    folder = Path(sys.argv[1]).absolute()
    folder.mkdir()
    os.chdir(folder)
    make_data()
    make_run()
    make_scores()
    # The VAE of an export is diffusers' format, and does not pack.
    for path in [Path("held_out"), Path("held_out_images"), *Path("run/exports").glob("*/vae")]:
        shutil.rmtree(path)
    for path in Path().rglob("events.out.tfevents.*"):  # TensorBoard's own format
        path.unlink()
    files = [path for path in Path().rglob("*") if path.is_file()]
    exports = [path for path in files if "exports" in path.parts]
    pack({path for path in files if path.stat().st_size > LARGE_BYTES} | set(exports))


if __name__ == "__main__":
    main()
