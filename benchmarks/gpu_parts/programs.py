"""Start the programs as a user does: tests, the demo on every stage, too large a batch."""

import importlib.util
import json
import math
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.data_sets import NUM_CLASSES, SHAPE, describe, make_shard
from benchmarks.gpu_parts.record import Record, Setting, own_environment
from training.config.network import network_options
from training.config.preset import load_preset
from training.cost.memory import activation_bytes

ROOT = Path(__file__).resolve().parents[2]
LAUNCHED = "zero2"  # the run that DeepSpeed's launcher starts, as the README does
GPU_MARK = "@pytest.mark.gpu"
STEPS, MORE_STEPS, LOG_EVERY = 40, 60, 10
SAME_LOSS = 0.05  # share by which the stages' losses may differ
MAX_GROWTH = 1.2  # of the loss of a run that goes on
LAST_CHARACTERS = 1500  # of the output of a program that failed
TRAINING = ("--log-every", str(LOG_EVERY), "--save-every", "20", "--sample-every", "0")


class Started(NamedTuple):
    """A program that runs, and where its output goes."""

    name: str
    process: subprocess.Popen
    log: Path
    began: float


class Ended(NamedTuple):
    """A program's exit code and output."""

    exit_code: int
    output: str
    seconds: float


def run_gpu_tests(setting: Setting, record: Record) -> None:
    """The tests that need a CUDA device."""
    if not setting.is_gpu:
        record.remark("left out: there is no GPU")
        return
    if importlib.util.find_spec("pytest") is None:
        record.check(False, "pytest is not installed: bring its wheel along")
        return
    # By name: to look through all others, pytest would import what only they need.
    files = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if GPU_MARK in path.read_text(encoding="utf-8")
    ]
    command = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *sorted(files))
    ended = _wait(_start(setting, "tests", *command))
    text = ended.output.strip().splitlines()[-1:]
    record.check(ended.exit_code == 0, f"pytest -m gpu: {''.join(text)}")
    if ended.exit_code:
        record.remark(ended.output[-LAST_CHARACTERS:])


def run_programs(setting: Setting, record: Record) -> None:
    """Encode, train on every stage and in other ways, go on, draw: with the demo's sizes."""
    data = _encode_demo(setting, record)
    if data is None:
        return
    ways = {
        "zero2": ("--deepspeed", "ds_configs/zero2.json"),
        "zero0": ("--deepspeed", "ds_configs/zero0.json"),
        "zero1": ("--deepspeed", "ds_configs/zero1.json"),
        "zero3": ("--deepspeed", "ds_configs/zero3.json"),
        "mlp": ("--expert-kind", "mlp"),
        "dispatched": ("--expert-dispatch", "dispatched"),
        "compiled": ("--compile-blocks",),
    }
    if not setting.is_gpu:  # a CPU tells nothing of the others that the tests do not
        ways = {"zero2": ways["zero2"]}
    started = [_train(setting, name, data, STEPS, *flags) for name, flags in ways.items()]
    losses = {}
    for one in started:  # all at once: a small network leaves most of a GPU to the others
        ended = _wait(one)
        losses[one.name] = _losses(setting, one.name).get(STEPS, math.nan)
        text = f"{one.name}: exit code {ended.exit_code}, loss {losses[one.name]:.4f}"
        _check_end(record, ended, ended.exit_code == 0, text)
        record.number(f"{one.name}: {STEPS} steps beside the others, s", ended.seconds)
    of_stages = [loss for name, loss in losses.items() if name.startswith("zero")]
    is_same = max(of_stages) - min(of_stages) <= SAME_LOSS * max(of_stages)
    record.check(is_same, f"every stage has the same loss to {SAME_LOSS:.0%}: {of_stages}")
    _go_on(setting, record, data, losses["zero2"])


def _encode_demo(setting: Setting, record: Record) -> Path | None:
    images, latents = setting.work / "images", setting.work / "latents"
    count = str(setting.pick(120, 8))
    drawn = _wait(
        _start(
            setting,
            "images",
            "data_tools/make_demo_images.py",
            *("--output", str(images), "--per-class", count),
        )
    )
    _check_end(record, drawn, drawn.exit_code == 0, f"demo images: exit code {drawn.exit_code}")
    encoded = _wait(
        _start(
            setting,
            "encode",
            "data_tools/encode_latents.py",
            *("--input", str(images), "--output", str(latents), "--size", "64"),
            *("--vae", "data_tools/demo_vae"),
        )
    )
    _check_end(record, encoded, encoded.exit_code == 0, f"encode: exit code {encoded.exit_code}")
    record.number("encode: the demo's images, s", encoded.seconds)
    return latents if encoded.exit_code == 0 else None


def _go_on(setting: Setting, record: Record, data: Path, loss: float) -> None:
    """Continue a run that has ended, then draw from it."""
    way = ("--deepspeed", "ds_configs/zero2.json")
    ended = _wait(_train(setting, "zero2", data, MORE_STEPS, *way))
    later = _losses(setting, "zero2").get(MORE_STEPS, math.nan)
    is_resumed = f"at step {STEPS} of {MORE_STEPS}" in ended.output
    has_gone_on = ended.exit_code == 0 and is_resumed and later <= MAX_GROWTH * loss
    text = f"the same command goes on: exit code {ended.exit_code}, loss {loss:.4f}, {later:.4f}"
    _check_end(record, ended, has_gone_on, text)
    run = str(setting.work / "run-zero2")
    drawing = ("training/sample.py", run, "--per-class", "1", "--steps", str(setting.pick(20, 2)))
    ended = _wait(_start(setting, "sample", *drawing))
    grids = list(Path(run).glob("samples/*/grid.png"))
    has_drawn = ended.exit_code == 0 and len(grids) == 1
    _check_end(record, ended, has_drawn, f"sample: exit code {ended.exit_code}")
    record.number("sample: ten images, s", ended.seconds)


def run_out_of_memory(setting: Setting, record: Record) -> None:
    """A micro-batch of twice the GPU's memory: the sentence that the user sees, and no hang."""
    if not setting.is_gpu:
        record.remark("left out: there is no memory of a GPU to run out of")
        return
    data = setting.work / "latents256"
    describe(data, [make_shard(data, 0)])
    options = network_options(load_preset("s"))
    of_one_image = activation_bytes(options, 1, precision="bf16").kept
    total = torch.cuda.mem_get_info(setting.device)[1]
    too_many = str(2 * total // of_one_image)
    flags = ("--preset", "s", "--no-horizontal-flip", "--global-batch-size", too_many)
    assert (options.in_channels, options.num_classes) == (SHAPE[0] // 2, NUM_CLASSES)
    ended = _wait(_train(setting, "memory", data, 2, *flags, has_preset=True))
    lines = [line for line in ended.output.splitlines() if "out of memory" in line]
    text = f"{too_many} images of S/2 at once: exit code {ended.exit_code}, one sentence"
    is_told = bool(lines) and "Traceback" not in ended.output and ended.exit_code not in (0, 2)
    _check_end(record, ended, is_told, text)
    for line in lines:
        record.remark(line)


def _train(
    setting: Setting, name: str, data: Path, steps: int, *flags: str, has_preset: bool = False
) -> Started:
    run = str(setting.work / f"run-{name}")
    where = ("--data", str(data), "--run-dir", run, "--max-steps", str(steps))
    small = () if has_preset or not setting.is_tiny else ("--global-batch-size", "4")
    by = _launcher() if name == LAUNCHED else ()
    return _start(setting, name, *by, "training/main.py", *where, *TRAINING, *small, *flags)


def _launcher() -> tuple[str, ...]:
    """Return what `deepspeed --num_gpus 1` is, where its command is not on the path."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return ("-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", port)


def _start(setting: Setting, name: str, *command: str) -> Started:
    log = setting.folder / f"{name}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=own_environment(setting),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    return Started(name, process, log, time.monotonic())


def _wait(started: Started) -> Ended:
    """Wait for a program; the part's limit ends it, and with it whatever it has started."""
    exit_code = started.process.wait()
    seconds = time.monotonic() - started.began
    return Ended(exit_code, started.log.read_text(encoding="utf-8", errors="replace"), seconds)


def _check_end(record: Record, ended: Ended, has_passed: bool, text: str) -> None:
    record.check(has_passed, text)
    if not has_passed:
        record.remark(ended.output[-LAST_CHARACTERS:])


def _losses(setting: Setting, name: str) -> dict[int, float]:
    """Return a run's loss by step, as metrics.jsonl has it."""
    path = setting.work / f"run-{name}" / "metrics.jsonl"
    if not path.exists():
        return {}
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["loss/total"] for line in lines if "loss/total" in line}
