"""Warm start: a new run that begins with the weights of another model (--init-from).

Not to be confused with resuming, which continues a run where it was: a warm start has weights from
elsewhere and everything else new: step 0, a fresh optimizer, averages that begin at these weights.
What matched by name and shape is loaded, the rest stays freshly initialised, and both are said.
"""

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data_tools.errors import ConfigError
from models.import_weights import ImportedWeights, check_positions, import_weights
from training.checkpoints.foreign_weights import read_state_dict
from training.checkpoints.manifest import (
    CHECKPOINT_DIR,
    LATEST_FILE,
    MANIFEST_FILE,
    RAW_FILE,
    latest_checkpoint,
    sha256_of,
)
from training.checkpoints.weight_entries import Entry
from training.checkpoints.weight_files import find_weights
from training.config.tree import Config
from training.engine.build import build_model
from training.run.directory import CONFIG_FILE, load_config

DEEPSPEED_FILES = re.compile(r".*mp_rank_\d+_(model|optim)_states\.pt")
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
DIFFUSERS_FOLDERS = ("", "transformer")  # of the model alone, of a pipeline
LABEL_TABLE = "y_embedder.embedding_table.weight"
NAMES_SHOWN = 8


@dataclass(frozen=True)
class WarmStart:
    """A checked source of initial weights; also what RUN/init.json says of it."""

    source: str  # as given
    file: str
    sha256: str
    kind: str  # which model it is of, and which program's names it has
    entry: str | None  # of the file, such as "ema"
    other_entries: list[str]  # models that the file holds as well
    matched_tensors: int
    matched_parameters: int
    freshly_initialised: list[str]  # names of this model that the source lacks or has otherwise
    other_shape: dict[str, str]  # those that it has in another shape: "11x384 there, 21x384 here"
    unused: list[str]  # names of the source that this model lacks
    differing_options: list[str]  # of model and diffusion, if the source is a run

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def report(self) -> str:
        """Describe in a few lines what was and what was not taken from the source."""
        entry = f", entry {self.entry!r}" if self.entry else ""
        others = ", ".join(map(repr, self.other_entries[:NAMES_SHOWN]))
        fresh = [
            f"{name} ({self.other_shape[name]})" if name in self.other_shape else name
            for name in self.freshly_initialised
        ]
        lines = [
            f"--init-from {self.source}: {self.kind}{entry}",
            f"  file                 {self.file}, sha256 {self.sha256[:12]}",
            f"  loaded               {self.matched_tensors} tensors, "
            f"{self.matched_parameters:,} parameters",
            f"  freshly initialised  {_listed(fresh)}",
        ]
        if self.unused:
            lines.append(f"  not used             {_listed(self.unused)}")
        if others:
            lines.append(f"  also in the file     {others}")
        if self.differing_options:
            lines.append(f"  configured with      {', '.join(self.differing_options)}")
        return "\n".join(lines)


class Source(NamedTuple):
    """A file of weights, and the configuration of the run that it belongs to."""

    path: Path
    config: Config | None


def check_is_elsewhere(config: Config) -> None:
    """Refuse a run that would start from itself."""
    source, run_dir = config.run.init_from, Path(config.run.run_dir)
    if source is None:
        return
    path = _split_tag(source)[0].resolve()
    if run_dir.resolve() in (path, *path.parents):
        raise ConfigError(
            f"--init-from {source} is --run-dir {run_dir} itself; to continue that run leave "
            "--init-from as it was, to start another from it choose a new --run-dir."
        )


def with_own_origin(config: Config) -> tuple[Config, str]:
    """Give a run that goes on the source that it began with, which is not read again.

    That source may be left out, or have moved. Another one is left to be refused.

    Returns:
        the configuration, and what should be said of a source that has moved.
    """
    run_dir, given = Path(config.run.run_dir), config.run.init_from
    # os.path, which never raises, of whatever name.
    if not os.path.exists(run_dir / CONFIG_FILE) or latest_checkpoint(run_dir) is None:
        return config, ""
    first = load_config(run_dir).run.init_from
    if first is None or first == given:
        return config, ""
    note, before = "", _split_tag(first)[0]
    if given is not None:
        now = _split_tag(given)[0]
        if before.exists() and before.resolve() != now.resolve():
            return config, ""
        note = (
            f"--init-from {given}: is not read; {run_dir} goes on from its own checkpoint and "
            f"began with {first}; to begin with other weights use a new --run-dir."
        )
    return replace(config, run=replace(config.run, init_from=first)), note


def check_initial_weights(config: Config) -> WarmStart | None:
    """Check what a run begins with; None if it initialises all its weights, or is resumed."""
    is_resumed = latest_checkpoint(Path(config.run.run_dir)) is not None
    return None if config.run.init_from is None or is_resumed else check_warm_start(config)


def check_warm_start(config: Config) -> WarmStart:
    """Find the source of the initial weights and compare it with the model; change nothing.

    Raises:
        ConfigError: it cannot be read, or no block of the model is in it.
    """
    flag = f"--init-from {config.run.init_from}"
    source = _locate(config.run.init_from)
    imported, (entry, *others) = _read(source.path, flag)
    with torch.device("meta"):
        model = build_model(config)
    ours = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    theirs = {name: list(value.shape) for name, value in imported.weights.items()}
    matched = {  # quantised weights are whole numbers, which mean nothing without their scales
        name
        for name, shape in ours.items()
        if theirs.get(name) == shape and imported.weights[name].is_floating_point()
    }
    _check_blocks(ours, theirs, matched, flag)
    _check_values(imported, matched, model, flag)
    return WarmStart(
        source=config.run.init_from,
        file=str(source.path),
        sha256=sha256_of(source.path),
        kind=imported.kind,
        entry=entry.name or None,
        other_entries=[other.name for other in others],
        matched_tensors=len(matched),
        matched_parameters=sum(imported.weights[name].numel() for name in matched),
        freshly_initialised=[name for name in ours if name not in matched],
        other_shape={
            name: _both_shapes(name, theirs[name], shape)
            for name, shape in ours.items()
            if name in theirs and theirs[name] != shape
        },
        unused=[*(name for name in theirs if name not in ours), *entry.outside],
        differing_options=_differing_options(source.config, config),
    )


def initial_values(
    warm_start: WarmStart, model: nn.Module, rank: int
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """List the parameters that the source has, each with this rank's part of its value.

    Args:
        warm_start: as checked on this rank.
        model: of this rank, under expert parallelism with its share of the experts.
        rank: of this process among all; expert-parallel groups are consecutive ranks.
    """
    imported, _ = _read(Path(warm_start.file), f"--init-from {warm_start.source}")
    is_fresh = set(warm_start.freshly_initialised)
    for name, parameter in model.named_parameters():
        if name in is_fresh:
            continue
        value = imported.weights[name]
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO 3 leaves it empty
        if value.shape != shape:  # experts, stacked: this rank holds some of them
            share = shape[0]
            value = value[rank * share % len(value) :][:share]
        yield parameter, value


def _split_tag(source: str) -> tuple[Path, str | None]:
    """Split RUN:TAG, unless a path has this very name."""
    folder, colon, tag = source.rpartition(":")
    if not colon or Path(source).exists():
        return Path(source), None
    return Path(folder), tag


def _locate(source: str) -> Source:
    if "://" in source:
        raise ConfigError(
            f"--init-from {source}: URLs are not fetched; download the file and give its path."
        )
    path, tag = _split_tag(source)
    if (path / CONFIG_FILE).exists():
        return _averaged_weights(path, tag, source)
    if tag is not None:
        raise ConfigError(f"--init-from {source}: {path} is no run directory; give RUN:TAG or RUN.")
    if (path / MANIFEST_FILE).exists():  # a checkpoint's folder
        return _averaged_weights(path.parents[1], path.name, source)
    _check_is_no_part(path, source)
    for folder in DIFFUSERS_FOLDERS:
        if (path / folder / DIFFUSERS_FILE).exists():
            return Source(path / folder / DIFFUSERS_FILE, None)
    return Source(path, None)


def _check_is_no_part(path: Path, source: str) -> None:
    """Refuse what lies in a run but is not its weights; say what to give instead."""
    folder = path.parent if path.name == LATEST_FILE else path
    if folder.name == CHECKPOINT_DIR and (folder.parent / CONFIG_FILE).exists():
        raise ConfigError(
            f"--init-from {source} is a part of a run; give the run, {folder.parent}, or one of "
            f"its checkpoints, {folder.parent}:TAG."
        )
    if DEEPSPEED_FILES.fullmatch(path.name) and path.exists():
        whole = path.with_name(RAW_FILE)
        advice = f"give {whole}" if whole.exists() else "make one of it by DeepSpeed's zero_to_fp32"
        raise ConfigError(
            f"--init-from {source} is DeepSpeed's own file for resuming, not a model's weights in "
            f"one file; {advice}."
        )


def _averaged_weights(run_dir: Path, tag: str | None, source: str) -> Source:
    try:
        config = load_config(run_dir)
        return Source(find_weights(run_dir, config, checkpoint=tag), config)
    except ConfigError as err:
        reason = str(err).removeprefix("--checkpoint: ").removeprefix("--run-dir ")
        raise ConfigError(f"--init-from {source}: {reason}") from err


def _read(path: Path, flag: str) -> tuple[ImportedWeights, list[Entry]]:
    """Return the weights, and the models in the file, of which they are the first."""
    entries = read_state_dict(path, flag)
    try:
        return import_weights(entries[0].weights), entries
    except ValueError as err:
        raise ConfigError(f"{flag}: {err}; give weights of a DiT, DTR or Switch-DiT.") from err


def _check_blocks(
    ours: dict[str, list[int]], theirs: dict[str, list[int]], matched: Collection[str], flag: str
) -> None:
    if any(name.startswith("blocks.") for name in matched):
        return
    why = "it has none"
    if both := [name for name in ours if name.startswith("blocks.") and name in theirs]:
        name = both[0]
        why = f"{name}: {_both_shapes(name, theirs[name], ours[name])}"
    raise ConfigError(
        f"{flag}: none of its blocks fits the model ({why}); use the --size that it was trained in."
    )


def _check_values(
    imported: ImportedWeights, matched: Collection[str], model: nn.Module, flag: str
) -> None:
    for name in matched:
        if not imported.weights[name].float().isfinite().all():  # float8 cannot be asked
            raise ConfigError(f"{flag}: {name} holds values that are not finite; choose another.")
    if imported.positions is not None:
        try:
            check_positions(imported.positions, model.options.grid)
        except ValueError as err:
            raise ConfigError(f"{flag}: its {err} that this model has; choose another.") from err


def _differing_options(theirs: Config | None, ours: Config) -> list[str]:
    """List what model and diffusion process are configured otherwise in the source's run."""
    if theirs is None:
        return []
    before, after = theirs.to_dict(), ours.to_dict()
    return [
        f"{key} ({value} -> {after[section][key]})"
        for section in ("model", "diffusion")
        for key, value in before[section].items()
        if value != after[section][key]
    ]


def _listed(names: list[str]) -> str:
    """Join names, those of all blocks as one."""
    grouped: dict[str, int] = {}
    for name in names:
        key = re.sub(r"^blocks\.\d+\.", "blocks.*.", name)
        grouped[key] = grouped.get(key, 0) + 1
    texts = [f"{name} x {count}" if count > 1 else name for name, count in grouped.items()]
    more = f" and {len(texts) - NAMES_SHOWN} more" if len(texts) > NAMES_SHOWN else ""
    return ", ".join(texts[:NAMES_SHOWN]) + more or "nothing"


def _both_shapes(name: str, theirs: list[int], ours: list[int]) -> str:
    there, here = ("x".join(map(str, shape)) for shape in (theirs, ours))
    rows = ": a row per class and one for no label" if name == LABEL_TABLE else ""
    return f"{there} there, {here} here{rows}"
