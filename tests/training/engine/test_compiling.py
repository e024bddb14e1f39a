"""Whether blocks are compiled where the command leaves it open."""

import shutil

import pytest

from data_tools.errors import ConfigError
from tests.support.configs import small
from training.config.command_line import parse_command_line
from training.config.network import network_options
from training.engine import compiling
from training.engine.compiling import explain_compiling, reason_against, with_compiling_decided


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        ((), None),
        (("--compile-blocks",), True),
        (("--compile-blocks", "on"), True),
        (("--no-compile-blocks",), False),
        (("--compile-blocks", "off"), False),
        (("--compile-blocks", "auto"), None),
    ],
)
def test_the_flag_has_three_states(flags, asked):
    config = parse_command_line(["--preset", "demo", *flags]).config

    assert config.model.compile_blocks is asked
    assert network_options(config).compile_blocks is (asked is True)


def test_another_state_is_refused():
    with pytest.raises(ConfigError, match=r"--compile-blocks must be on, off, auto, not 'yes'"):
        parse_command_line(["--compile-blocks", "yes"])


def test_on_a_cpu_blocks_are_compiled_only_if_asked_for():
    asked, left_open = small(compile_blocks=True), small()

    assert with_compiling_decided(asked, 2) == asked
    assert not with_compiling_decided(left_open, 2).model.compile_blocks
    assert explain_compiling(left_open, 2) == ""


def test_on_a_gpu_blocks_are_compiled_where_triton_can(monkeypatch):
    monkeypatch.setattr(compiling, "has_gpu", lambda: True)
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(compiling.Path, "exists", lambda _: True)
    monkeypatch.delenv("CC", raising=False)

    assert with_compiling_decided(small(), 2).model.compile_blocks
    assert "compiled in the first step" in explain_compiling(small(), 2)
    assert reason_against(small(), 3) == "ZeRO 3 replaces what was compiled"
    shared = small(expert_parallel_size=2)
    assert reason_against(shared, 2) == "it was never tried with expert parallelism"
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert reason_against(small(), 2) == "Triton finds no C compiler"
    assert "not compiled, Triton finds no C compiler" in explain_compiling(small(), 2)
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda _: None)
    assert reason_against(small(), 2) == "Triton is not installed"
