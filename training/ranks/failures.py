"""Why a rank cannot go on, in words for a person."""

import re
import traceback
from typing import NamedTuple

import torch

from data_tools.errors import ConfigError
from training.ranks.diagnosis import AGAIN

FAILED_EXIT_CODE = 1  # a crash: worth another try, a bounded number of times
MAX_TRACEBACK_LINES = 60
MEMORY_ADVICE = (
    "lower --micro-batch-size, set --activation-checkpointing, take a higher ZeRO stage or more "
    "ranks, or see what else runs on its node"
)


class Failure(NamedTuple):
    """Why a rank cannot go on.

    Attributes:
        is_cause: False if a collective failed, most likely because of another rank.
        text: one sentence without a full stop.
        advice: what to do.
        trace: of a mistake of the program.
        exit_code: what the job ends with because of it.
    """

    is_cause: bool
    text: str
    advice: str = f"{AGAIN}."
    trace: str = ""
    exit_code: int = FAILED_EXIT_CODE


def describe_failure(error: BaseException) -> Failure:
    """Sort an exception by what a person can do about it."""
    first = (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, ConfigError):
        return Failure(True, *str(error).rpartition("; ")[::2], exit_code=error.exit_code)
    is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if is_memory or "can't allocate memory" in first or "Cannot allocate memory" in first:
        found = re.search(r"tried to allocate [\d.]+ \w+", first, re.IGNORECASE)
        reason = f" ({found[0].lower()})" if found else ""
        return Failure(True, f"out of memory{reason}", f"{MEMORY_ADVICE}; {AGAIN}.")
    if isinstance(error, torch.distributed.DistError) or "gloo" in first:
        return Failure(False, first.split("] ", 1)[-1].split(". ")[0])
    lines = "".join(traceback.format_exception(error)).splitlines()
    if len(lines) > MAX_TRACEBACK_LINES:
        lines = [*lines[:2], "  ...", *lines[-MAX_TRACEBACK_LINES:]]
    text, trace = f"{type(error).__name__}: {first}", "\n".join(lines) + "\n"
    return Failure(True, text, "a mistake of the program, or of its node; see above.", trace)
