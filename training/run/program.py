"""Record where a run comes from: the program, its packages and machines, a line for every start.

    starts.jsonl                     one line per start, oldest first
    provenance/packages-HASH.txt     the installed packages, as name==version
    provenance/changes-HASH.patch    how the program differs from its commit

The batch system's number of the job is all that is taken from the environment, which may hold
secrets.
"""

import hashlib
import os
import platform
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from data_tools.files import replace_file
from data_tools.formats import Format
from data_tools.process.accelerator import has_gpu
from data_tools.process.launcher import batch_job, own_node
from training.run.starts import STARTS_FILE

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = ("models", "data_tools", "training")
COMPARED = (*SOURCES, "ds_configs", "requirements.txt")  # what decides a result
PROVENANCE_DIR = "provenance"
MAX_CHANGES_BYTES = 1 << 24  # a patch that is larger holds something else than a program
HASH_DIGITS = 12
# A user's settings must neither start programs nor change what is written.
_DIFF = (
    *("diff", "--binary", "--no-color", "--no-ext-diff", "--no-textconv"),
    *("--src-prefix=a/", "--dst-prefix=b/"),
)


@dataclass(frozen=True)
class Start:
    """One start of a run."""

    time: str  # in UTC, ISO 8601
    step: int  # that training began or went on at
    checkpoint: str  # that was loaded; empty at the beginning
    layout: str  # ranks, expert-parallel size, ZeRO stage and precision
    hosts: dict[str, int]  # ranks on each node, by the node's name
    hardware: str  # of rank 0's node
    batch_job: str  # the number that Slurm gave the job; empty without Slurm
    commit: str  # of the program, "unknown" outside of a git repository
    sources: str  # sha256 of the program's Python files
    changes: str  # name of the patch against the commit; empty if there are none
    packages: str  # name of the list of packages
    python: str  # version
    data_hash: str  # of the data set's manifest
    config_changes: list[str]  # against the start before, "key (old -> new)"


START = Format(newest=1, kind=Start)


def count_hosts() -> dict[str, int]:
    """Return how many ranks each node has, by the node's name. All ranks must call this."""
    nodes: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(nodes, own_node())
    return dict(Counter(nodes))


def hardware() -> str:
    """Return what this node computes with."""
    if not has_gpu():
        return "CPU"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"


def installed_packages() -> dict[str, str]:
    """Return the versions of the installed packages, by name."""
    return {found.metadata["Name"]: found.version for found in distributions()}


def commit(folder: Path = REPOSITORY) -> str:
    """Return the commit of a checkout, "unknown" without git or a repository."""
    return _git(folder, "rev-parse", "--verify", "HEAD").decode().strip() or "unknown"


def source_hash(folder: Path = REPOSITORY) -> str:
    """Return the sha256 of the program's Python files, names included."""
    digest = hashlib.sha256()
    for name in SOURCES:
        for path in sorted((folder / name).rglob("*.py")):
            digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


def local_changes(folder: Path = REPOSITORY) -> bytes:
    """Return a patch from the commit to the program as it is, new files included."""
    changes = _git(folder, *_DIFF, "HEAD", "--", *COMPARED)
    new = _git(folder, "ls-files", "-z", "--others", "--exclude-standard", "--", *COMPARED)
    for name in new.decode().split("\0")[:-1]:
        changes += _git(folder, *_DIFF, "--no-index", "--", os.devnull, name)
        if len(changes) > MAX_CHANGES_BYTES:
            break
    if len(changes) > MAX_CHANGES_BYTES:
        return f"The changes have more than {MAX_CHANGES_BYTES} bytes.\n".encode()
    return changes


def _git(folder: Path, *arguments: str) -> bytes:
    if shutil.which("git") is None:
        return b""
    # A checkout may belong to another user, in a container or on a shared disk.
    command = ["git", "-c", "safe.directory=*", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, check=False).stdout


@cache
def _program() -> tuple[str, str, bytes, str]:
    """Return what does not change while a process lives: it runs what it loaded at first."""
    listed = sorted(f"{name}=={version}\n" for name, version in installed_packages().items())
    return commit(), source_hash(), local_changes(), "".join(listed)


def record_start(run_dir: Path, **of_run: Any) -> Start:
    """Add a line to starts.jsonl, and what it refers to. Only rank 0 calls this.

    Args:
        of_run: the values of a Start that are the run's, and not the program's or the machine's.

    Raises:
        OSError: a file cannot be written.
    """
    own_commit, sources, changes, listed = _program()
    folder = run_dir / PROVENANCE_DIR
    start = Start(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=hardware(),
        batch_job=batch_job(),
        commit=own_commit,
        sources=sources,
        changes=_keep(folder, "changes-{}.patch", changes) if changes else "",
        packages=_keep(folder, "packages-{}.txt", listed.encode()),
        python=platform.python_version(),
        **of_run,
    )
    START.append(run_dir / STARTS_FILE, start)
    return start


def _keep(folder: Path, name: str, content: bytes) -> str:
    """Write a file that is named after its content, unless it is there; return its name."""
    name = name.format(hashlib.sha256(content).hexdigest()[:HASH_DIGITS])
    if not (folder / name).exists():
        folder.mkdir(exist_ok=True)
        replace_file(folder / name, lambda file: file.write(content))
    return name


def read_starts(run_dir: Path) -> list[Start]:
    """Return the starts of a run, oldest first; none if it was never started."""
    return START.read_journal(run_dir / STARTS_FILE)
