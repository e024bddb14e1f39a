"""The benchmark of a step: its table, its refusals, and on a GPU what it claims of waits."""

import pytest
import torch

from benchmarks import measure
from benchmarks.sides import config_of, make_batch, our_side
from benchmarks.train_step import main


@pytest.fixture
def _small_products(monkeypatch):
    monkeypatch.setattr(measure, "MIN_PRODUCT_SEC", 0.0)


@pytest.mark.usefixtures("_small_products")
def test_the_table_compares_our_step_with_recomputation_and_with_the_official_way(capsys):
    main(["--size", "demo", "--batch", "1", "--steps", "1", "--dtype", "fp32", "--checkpointing"])

    lines = capsys.readouterr().out.splitlines()
    table = lines[lines.index("demo/2, fp32, batch 1") + 2 :]
    assert [row[:18].strip() for row in table[:3]] == ["ours", "ours, recomputing", "official way"]
    flops, counted = ([float(row[18:].split()[i]) for row in table[:3]] for i in (2, 3))
    assert flops[0] == pytest.approx(counted[0], rel=0.01) and counted[1] > flops[1]
    assert table[2].endswith("1.00")


@pytest.mark.usefixtures("_small_products")
def test_peak_only_prints_both_dtypes_and_no_step(capsys):
    main(["--peak-only", "--size", "demo"])

    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[-2:]] == ["fp32", "bf16"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "auto"], "--batch auto fills the memory of a GPU; give a number on the CPU."),
        (["--batch", "-3"], "--batch must be a positive whole number or auto, not -3."),
        (["--device", "tpu"], "--device must be cpu or cuda, not tpu."),
        (["--steps", "0"], "--steps must be at least 1, not 0."),
        (["--threads", "0"], "--threads must be at least 1, not 0."),
    ],
)
def test_mistakes_are_refused_in_one_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)

    assert message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_step_waits_for_the_gpu_once(dtype):
    config = config_of("demo")
    side = our_side(config, make_batch(config, 4, torch.device("cuda")), dtype)
    side.step(0)

    waits = measure.cuda_waits(lambda: side.step(1))

    assert waits.total() == 1, waits
