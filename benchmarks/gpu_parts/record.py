"""Keep what a part of the acceptance finds: checks, numbers, remarks; a JSON file for each part."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from data_tools.files import write_text

RUNNING, DONE, STOPPED, BROKEN, LEFT_OUT = "running", "done", "stopped", "broken", "left out"


@dataclass(frozen=True)
class Setting:
    """Where and how large the acceptance runs.

    Attributes:
        device: the GPU, or the CPU in its place.
        is_tiny: the smallest sizes, to rehearse; numbers mean nothing then.
        folder: for results.
        work: for data sets and runs; deleted afterwards.
        environment: of this process, as it was before it took its place in a group of its own.
    """

    device: torch.device
    is_tiny: bool
    folder: Path
    work: Path
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    @property
    def is_gpu(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"

    def preset(self, full: str) -> str:
        """Return a preset: the real one, or the one of a rehearsal."""
        return "demo" if self.is_tiny else full

    def pick(self, full: int, tiny: int) -> int:
        """Return a size: the real one, or the one of a rehearsal."""
        return tiny if self.is_tiny else full


@dataclass
class Check:
    """Something that must be so, and whether it was."""

    text: str
    has_passed: bool


@dataclass
class Record:
    """What one part found.

    Attributes:
        part: its name.
        state: RUNNING, DONE; STOPPED by its limit; BROKEN by an error; LEFT_OUT for want of time.
        began: seconds since the epoch.
        seconds: that it took.
        checks: in order.
        numbers: by what they are, with their unit.
        remarks: sentences, such as the one that a program printed.
    """

    part: str
    state: str = RUNNING
    began: float = field(default_factory=time.time)
    seconds: float = 0.0
    checks: list[Check] = field(default_factory=list)
    numbers: dict[str, float] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def check(self, has_passed: bool, text: str) -> None:
        """Note whether something is as it must be."""
        self.checks.append(Check(text, bool(has_passed)))
        print(f"  {'ok  ' if has_passed else 'FAIL'} {text}", flush=True)

    def number(self, name: str, value: float) -> None:
        """Note a measured number; its name ends in a comma and its unit."""
        self.numbers[name] = float(value)
        print(f"       {name:<58} {value:12.4g}", flush=True)

    def remark(self, text: str) -> None:
        """Note a sentence."""
        self.remarks.append(text)
        print(f"       {text}", flush=True)

    @property
    def failures(self) -> list[str]:
        """What is not as it must be; a part that did not end is one."""
        failed = [check.text for check in self.checks if not check.has_passed]
        return failed if self.state == DONE else [*failed, f"{self.part}: {self.state}"]

    def write(self, folder: Path) -> None:
        """Store it as PART.json, at once or not at all."""
        write_text(folder / f"{self.part}.json", json.dumps(asdict(self), indent=1) + "\n")


def read_record(folder: Path, part: str) -> Record | None:
    """Return what a part has stored so far; None if it has not begun."""
    path = folder / f"{part}.json"
    if not path.exists():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    checks = [Check(**check) for check in values.pop("checks")]
    return Record(**values, checks=checks)


def forget_records(folder: Path, parts: list[str]) -> None:
    """Remove what an earlier acceptance has stored of these parts."""
    for part in parts:
        (folder / f"{part}.json").unlink(missing_ok=True)


Part = Callable[[Setting, Record], None]


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return |got - wanted| / |wanted| over all numbers, in float64 on the host."""
    got, wanted = got.detach().double().cpu(), wanted.detach().double().cpu()
    return float((got - wanted).norm() / wanted.norm())


def own_environment(setting: Setting) -> dict[str, str]:
    """Return the environment of the programs that the acceptance starts."""
    env = setting.environment | {"PYTHONUNBUFFERED": "1", "DS_SKIP_CUDA_CHECK": "1"}
    if not setting.is_gpu:
        env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return env
