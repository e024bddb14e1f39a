"""Begin a new run with the weights of another model (--init-from): a warm start.

Not to be confused with resuming, which continues a run where it was: a warm start has weights from
elsewhere and everything else new: step 0, a fresh optimizer, averages that begin at these weights.
What matches by name and shape is loaded; the rest stays freshly initialised; both are reported.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from data_tools.errors import ConfigError
from models.import_weights import ImportedWeights, check_positions, import_weights
from training.checkpoints.foreign_weights import read_state_dict
from training.checkpoints.manifest import sha256_of
from training.checkpoints.weight_entries import Entry
from training.config.tree import Config, differences
from training.engine.build import build_model
from training.engine.deepspeed_internals import unsharded_shape

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


def compare_source(path: Path, origin: Config | None, config: Config) -> WarmStart:
    """Compare the weights that a run is to begin with with its model; change nothing.

    `origin` is the configuration of the run, if any, that the file of weights belongs to.

    Raises:
        ConfigError: they cannot be read, or no block of the model is in them.
    """
    flag = f"--init-from {config.run.init_from}"
    imported, (entry, *others) = _read(path, flag)
    with torch.device("meta"):
        model = build_model(config)
    ours = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    theirs = {name: list(value.shape) for name, value in imported.weights.items()}
    matched = {  # quantised weights are whole numbers, which mean nothing without their scales
        name
        for name, shape in ours.items()
        if theirs.get(name) == shape and imported.weights[name].is_floating_point()
    }
    here = origin and replace(origin, model=config.model, diffusion=config.diffusion)
    _check_blocks(ours, theirs, matched, flag)
    _check_values(imported, matched, model, flag)
    return WarmStart(
        source=config.run.init_from,
        file=str(path),
        sha256=sha256_of(path),
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
        differing_options=differences(origin, here, of_any_kind=True) if origin else [],
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
        shape = unsharded_shape(parameter)
        if value.shape != shape:  # experts, stacked: this rank holds some of them
            share = shape[0]
            value = value[rank * share % len(value) :][:share]
        yield parameter, value


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


def _listed(names: list[str]) -> str:
    """Join names, those of all blocks as one."""
    grouped = Counter(re.sub(r"^blocks\.\d+\.", "blocks.*.", name) for name in names)
    texts = [f"{name} x {count}" if count > 1 else name for name, count in grouped.items()]
    more = f" and {len(texts) - NAMES_SHOWN} more" if len(texts) > NAMES_SHOWN else ""
    return ", ".join(texts[:NAMES_SHOWN]) + more or "nothing"


def _both_shapes(name: str, theirs: list[int], ours: list[int]) -> str:
    there, here = ("x".join(map(str, shape)) for shape in (theirs, ours))
    rows = ": a row per class and one for no label" if name == LABEL_TABLE else ""
    return f"{there} there, {here} here{rows}"
