"""What "auto" precision stands for: what the hardware multiplies, or is said to."""

import os
import re

import pytest
import torch

from data_tools.errors import ConfigError
from tests.support.launch import run
from training.checkpoints.manifest import latest_checkpoint, read_manifest
from training.config.precision import BF16_VARIABLE, detect_hardware
from training.monitoring.event_files import read_metrics

pytestmark = pytest.mark.precision

BF16_RELATIVE = 1e-2  # bf16 keeps 8 bits: 0.4 % per rounding, averaged over many
STEPS = 2
# Four tokens a sample, because a CPU without bf16 instructions is very slow at it.
TINY = [
    *("--preset", "tests/small.yaml", "--num-experts", 2, "--patch-size", 8, "--warmup-steps", 2),
    *("--global-batch-size", 4, "--log-every", 1, "--sample-every", 0, "--max-steps", STEPS),
]
SAID = {"0": ("fp32", "does not multiply"), "1": ("bf16", "multiplies")}


@pytest.mark.parametrize("stated", SAID)
def test_one_variable_says_what_the_hardware_multiplies(monkeypatch, stated):
    monkeypatch.setenv(BF16_VARIABLE, stated)

    hardware = detect_hardware()

    assert hardware.has_bf16 == (stated == "1")
    assert hardware.name.endswith(f", by {BF16_VARIABLE}={stated},")


def test_another_value_of_the_variable_is_refused(monkeypatch):
    monkeypatch.setenv(BF16_VARIABLE, "yes")

    with pytest.raises(ConfigError, match=r"^SWITCH_DIT_BF16=yes: must be 1 \(the hardware"):
        detect_hardware()


@pytest.mark.parametrize("stated", [None, ""])
def test_without_the_variable_torch_is_asked(monkeypatch, stated):
    monkeypatch.delenv(BF16_VARIABLE)
    if stated is not None:
        monkeypatch.setenv(BF16_VARIABLE, stated)

    hardware = detect_hardware()

    if not torch.cuda.is_available():
        assert hardware == ("this CPU", torch.ops.mkldnn._is_mkldnn_bf16_supported())
    assert BF16_VARIABLE not in hardware.name


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is asked, not the CPU")
def test_a_cpu_without_bf16_instructions_is_recognized():
    command = (
        "from training.config.precision import detect_hardware as detect; print(detect().has_bf16)"
    )

    printed = run("python", "-c", command, ONEDNN_MAX_CPU_ISA="AVX2", **{BF16_VARIABLE: ""})

    assert printed.split()[-1] == "False"


def test_tests_do_not_ask_the_hardware():
    assert BF16_VARIABLE in os.environ, "conftest.py says what it multiplies"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, demo_latents, train_forked):
    """Train with the default --deepspeed on hardware that is said to multiply bf16, and not to.

    Returns the run directory and the output by what is said.
    """
    folder = tmp_path_factory.mktemp("runs")

    def train(stated):
        flags = ("--data", demo_latents, "--run-dir", folder / stated)
        return train_forked(*TINY, *flags, num_ranks=1, **{BF16_VARIABLE: stated})

    return {stated: (folder / stated, train(stated)) for stated in SAID}


@pytest.mark.processes
@pytest.mark.parametrize("stated", SAID)
def test_training_uses_what_the_hardware_is_said_to_multiply_and_says_why(runs, stated):
    run_dir, output = runs[stated]
    precision, verb = SAID[stated]

    assert read_manifest(latest_checkpoint(run_dir)).layout.precision == precision
    reason = rf'sets bf16.enabled to "auto"; .*, by {BF16_VARIABLE}={stated}, {verb} bf16 natively'
    line = rf"^precision: {precision} .*{reason}"
    assert re.search(line, output, re.MULTILINE), output


@pytest.mark.processes
def test_training_is_the_same_in_either_precision(runs):
    records = [read_metrics(run_dir) for run_dir, _ in runs.values()]

    for in_fp32, in_bf16 in zip(*records, strict=True):
        assert in_bf16["loss/total"] == pytest.approx(in_fp32["loss/total"], rel=BF16_RELATIVE)
    assert len(records[0]) == STEPS


@pytest.mark.processes
def test_a_run_does_not_go_on_unnoticed_on_hardware_of_the_other_kind(
    runs, demo_latents, train_forked
):
    flags = ("--data", demo_latents, "--run-dir", runs["1"][0], "--max-steps", STEPS + 1)

    output = train_forked(*TINY, *flags, num_ranks=1, expect=2, **{BF16_VARIABLE: "0"})

    assert "was saved with precision bf16, this command has fp32; change the precision" in output
    assert read_metrics(runs["1"][0])[-1]["step"] == STEPS
