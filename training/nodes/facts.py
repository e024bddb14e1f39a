"""Collect facts about a rank's node before any collective, and find the nodes that cannot train."""

import platform
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from data_tools.errors import ConfigError, some
from data_tools.exit_codes import CONFIG_ERROR_EXIT_CODE
from data_tools.process.accelerator import is_kept_to_cpu
from data_tools.process.launcher import own_node, slurm_gpus
from training.ranks.process_group import Ranks, select_accelerator
from training.run.program import commit, hardware, installed_packages, source_hash

MIN_TEMPORARY_MIB = 256  # torch, Triton and data loaders write there
SHORT_COMMIT = 10  # digits that a sentence shows
NUM_NAMED = 3  # packages that a sentence names


@dataclass(frozen=True)
class NodeFacts:
    """One rank's node."""

    rank: int
    node: str
    problem: str  # why this rank cannot train, one sentence; empty if it can
    hardware: str
    commit: str
    sources: str  # sha256 of our Python files
    python: str
    packages: dict[str, str]  # version by name
    data: str  # hash of the data set's manifest
    checkpoint: str  # that a run would continue from
    exit_code: int = 0  # of the problem


def collect(ranks: Ranks, check: Callable[[], tuple[str, str]]) -> NodeFacts:
    """Look at this node.

    `check` raises ConfigError if this rank cannot train, and returns the hash of the data and the
    checkpoint to continue from.
    """
    problem, exit_code, data, checkpoint = "", 0, "", ""
    try:
        _check_gpus()
        select_accelerator(ranks)
        _check_temporary_space()
        data, checkpoint = check()
    except ConfigError as err:
        problem, exit_code = str(err), err.exit_code
    return NodeFacts(
        rank=ranks.rank,
        node=own_node(),
        problem=problem,
        hardware=hardware(),
        commit=commit()[:SHORT_COMMIT],
        sources=source_hash(),
        python=platform.python_version(),
        packages=installed_packages(),
        data=data,
        checkpoint=checkpoint,
        exit_code=exit_code,
    )


def _check_gpus() -> None:
    given, seen = slurm_gpus(), torch.cuda.device_count()
    if not is_kept_to_cpu() and seen < given:
        raise ConfigError(
            f"torch sees {seen} GPU(s) and Slurm gave {given}; look at nvidia-smi and at the "
            "driver there, or set DS_ACCELERATOR=cpu."
        )


def _check_temporary_space() -> None:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free >> 20
    if free < MIN_TEMPORARY_MIB:
        raise ConfigError(
            f"{folder}: {free} MiB are free, {MIN_TEMPORARY_MIB} are needed; free some space, or "
            "set TMPDIR."
        )


def compare(everyone: list[NodeFacts]) -> list[str]:
    """Return one sentence for every node that cannot train or differs from most others."""
    problems = [facts.problem for facts in everyone]
    if problems[0] and len(set(problems)) == 1:  # the same everywhere: not a node's fault
        return [problems[0]]
    sentences = {}
    everyone = _with_one_checkpoint(everyone)
    usual = {name: _most_common(everyone, name) for name in ("commit", "sources", "python")}
    usual |= {name: _most_common(everyone, name) for name in ("hardware", "data", "checkpoint")}
    packages = dict(_most_common(everyone, "packages"))
    for facts in everyone:
        if facts.node not in sentences:
            what = facts.problem or _difference(facts, usual, packages)
            if what:
                sentences[facts.node] = f"node {facts.node}: {what}"
    return list(sentences.values())


def exit_code_of(everyone: list[NodeFacts]) -> int:
    """Return what a job leaves with that cannot train: another code than 2 for outages alone."""
    return max(facts.exit_code for facts in everyone) or CONFIG_ERROR_EXIT_CODE


def _with_one_checkpoint(everyone: list[NodeFacts]) -> list[NodeFacts]:
    """Return the same facts with one name for all checkpoints that were found.

    The ranks look at different moments, and an earlier job that still saves may publish one in
    between; training chooses one under the run directory's lock. Only none is another disk.
    """
    newest = max(facts.checkpoint for facts in everyone)
    return [replace(facts, checkpoint=facts.checkpoint and newest) for facts in everyone]


def _most_common(everyone: list[NodeFacts], name: str) -> Any:
    """Return what most of the ranks that can train have; of packages, the items."""
    values = [getattr(facts, name) for facts in everyone if not facts.problem]
    if name == "packages":
        values = [tuple(sorted(value.items())) for value in values]
    return Counter(values).most_common(1)[0][0] if values else ""


def _difference(facts: NodeFacts, usual: dict[str, str], packages: dict[str, str]) -> str:
    hints = {
        "hardware": "choose nodes of one kind, e.g. with sbatch --constraint.",
        "commit": "check out the same commit everywhere.",
        "python": "make VENV in slurm/site.sh the same everywhere.",
        "data": "copy the same data set there.",
        "checkpoint": "put --run-dir on a disk that all nodes share.",
        "sources": "its copy of this program was changed; make it the same everywhere.",
    }
    for name, hint in hints.items():
        have = getattr(facts, name)
        if have != usual[name]:
            if name in ("sources", "data"):  # a hash says nothing to a person
                return f"{name} differ from the other nodes'; {hint}"
            return f"{name} {have or 'none'}, the other nodes have {usual[name] or 'none'}; {hint}"
    names = sorted(facts.packages.keys() | packages.keys())
    other = [name for name in names if facts.packages.get(name) != packages.get(name)]
    if not other:
        return ""
    named = ", ".join(
        f"{name} {facts.packages.get(name, 'missing')} instead of {packages.get(name, 'none')}"
        for name in other[:NUM_NAMED]
    )
    more = f" and {len(other) - NUM_NAMED} more" if len(other) > NUM_NAMED else ""
    return f"packages differ from the other nodes': {named}{more}; make VENV the same everywhere."


def summary(everyone: list[NodeFacts]) -> str:
    """Return what all nodes have in common, for the log."""
    nodes = list(dict.fromkeys(facts.node for facts in everyone))
    first = everyone[0]
    return (
        f"{len(everyone)} rank(s) on {len(nodes)} node(s) ({some(nodes, NUM_NAMED)}), "
        f"{first.hardware}, commit {first.commit}, torch {first.packages.get('torch')}, "
        f"deepspeed {first.packages.get('deepspeed')}"
    )
