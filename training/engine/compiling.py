"""Decide whether a run's blocks are compiled (torch.compile), where the command leaves it open.

On a GPU half of a block's time is predicted to go into reading and writing what a compiler fuses;
no GPU has measured it. On a CPU compiling was measured: nothing in fp32, a twentieth in bf16, for
half a minute at every start. So there it is off unless asked for.
"""

import importlib.util
import os
import shutil
import sysconfig
from dataclasses import replace
from pathlib import Path

from data_tools.process.accelerator import has_gpu
from training.config.deepspeed_config import MAX_STAGE
from training.config.tree import Config

# Triton builds what launches its kernels with the first of these, unless CC names another.
_C_COMPILERS = ("clang", "gcc", "cc")


def reason_against(config: Config, stage: int) -> str | None:
    """Say why blocks should not be compiled unless the command asks for it; None if they should.

    Args:
        config: of the run.
        stage: ZeRO's.
    """
    if not has_gpu():
        return "it gains little on a CPU"
    if stage == MAX_STAGE:
        return "ZeRO 3 replaces what was compiled"
    if config.run.expert_parallel_size > 1:
        return "it was never tried with expert parallelism"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not any(map(shutil.which, [os.environ["CC"]] if "CC" in os.environ else _C_COMPILERS)):
        return "Triton finds no C compiler"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Triton finds no Python.h"
    return None


def with_compiling_decided(config: Config, stage: int) -> Config:
    """Return the configuration with `compile_blocks` true or false."""
    if config.model.compile_blocks is not None:
        return config
    decided = reason_against(config, stage) is None
    return replace(config, model=replace(config.model, compile_blocks=decided))


def explain_compiling(config: Config, stage: int) -> str:
    """Return the line that says whether blocks are compiled and why; empty where nobody asks."""
    if config.model.compile_blocks is not None or not has_gpu():
        return ""
    reason = reason_against(config, stage)
    if reason is None:
        return "blocks: compiled in the first step, a minute or less (--compile-blocks auto)"
    return f"blocks: not compiled, {reason} (--compile-blocks auto)"
