"""DS_ACCELERATOR=cpu keeps a machine's GPUs out of everything."""

import ast
import os

import pytest
import torch

from data_tools.encoding.command import choose_device
from data_tools.process.accelerator import has_gpu
from data_tools.vae.autoencoder import resolve_device
from tests.support.launch import REPOSITORY
from training.config.precision import BF16_VARIABLE, detect_hardware
from training.ranks.process_group import Ranks, select_accelerator
from training.run.program import hardware

CPU = torch.device("cpu")
ASKING = "data_tools/process/accelerator.py"


def looked_at(*_, **__):
    raise AssertionError("a GPU was looked at, which makes forked ranks fail")


@pytest.fixture
def a_gpu_that_must_not_be_touched(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.delenv(BF16_VARIABLE, raising=False)
    for name in ("is_available", "device_count", "get_device_name", "is_bf16_supported"):
        monkeypatch.setattr(torch.cuda, name, looked_at)


@pytest.mark.usefixtures("a_gpu_that_must_not_be_touched")
def test_a_run_that_is_kept_to_the_cpu_looks_at_no_gpu():
    assert not has_gpu()
    assert detect_hardware().name == "this CPU" and hardware() == "CPU"
    assert select_accelerator(Ranks(0, 1, 0)) == resolve_device(None) == choose_device(None) == CPU


def test_without_the_variable_a_gpu_is_taken(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    assert has_gpu()
    assert resolve_device(None).type == select_accelerator(Ranks(0, 1, 0)).type == "cuda"


def test_tests_see_no_gpu():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()


def test_one_file_asks_torch_for_a_gpu():
    asking = set()
    for folder in ("models", "data_tools", "training"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and node.attr == "is_available":
                    asking.add(str(path.relative_to(REPOSITORY)))

    assert asking == {ASKING}
