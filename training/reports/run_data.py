"""Read what a report says of a run from its directory."""

import bisect
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from data_tools.errors import ConfigError
from training.checkpoints.manifest import EMA_FILE, latest_checkpoint, read_manifest
from training.config.tree import Config
from training.engine.gate_table import read_gate_table
from training.evaluation.job import EVALUATION_DIR
from training.evaluation.score_events import read_scores
from training.monitoring.event_files import METRICS_FILE, read_metrics
from training.run.checkpoint_notes import CheckpointNote, read_notes
from training.run.console_log import LOG_FILE, NUM_OLDER
from training.run.directory import SAMPLES_DIR, load_config
from training.run.program import Start, read_starts

NUM_GRIDS = 4
LAST_SHARE = 0.05  # of the records, for numbers of a run's end
MAX_EVENTS = 50
_EVENT = re.compile(r"(\S+Z) ((?:warning|error): .*)")
_GRID = re.compile(r"\d{7}\.png")


@dataclass(frozen=True)
class RunData:
    """A run as a report sees it.

    Attributes:
        name: of the run's directory, or its path if two have one name.
        slug: for names of files, different for every run.
        records: of metrics.jsonl.
        starts: oldest first.
        checkpoint_notes: what became of its checkpoints.
        events: warnings and errors of the log with their times, the newest MAX_EVENTS of them.
        grids: at most NUM_GRIDS pictures of samples, from the first to the last.
        scores: of evaluations, by way of measuring, step and tag.
        checkpoint: the newest one; None if there is none.
    """

    name: str
    slug: str
    folder: Path
    config: Config
    records: list[dict[str, float]]
    starts: list[Start]
    checkpoint_notes: list[CheckpointNote]
    events: list[tuple[str, str]]
    grids: list[Path]
    scores: dict[str, dict[int, dict[str, float]]]
    checkpoint: Path | None

    def series(self, tag: str) -> tuple[list[int], list[float]]:
        """Return the steps at which a number was recorded, and the number."""
        found = [(int(record["step"]), record[tag]) for record in self.records if tag in record]
        return [step for step, _ in found], [value for _, value in found]

    def tags(self, prefix: str) -> list[str]:
        """Return the names with a prefix, in order."""
        return sorted({tag for record in self.records for tag in record if tag.startswith(prefix)})

    def final(self, tag: str, until: int | None = None) -> float | None:
        """Return the mean over the end of the run, or of its steps up to `until`."""
        steps, values = self.series(tag)
        if until is not None:
            values = values[: bisect.bisect_right(steps, until)]
        return float(np.mean(values[-max(1, int(LAST_SHARE * len(values))) :])) if values else None

    def loads(self) -> tuple[list[int], np.ndarray]:
        """Return steps and (intervals, L, E) fractions of samples; none without experts."""
        tags = self.tags("moe_load/")
        records = [record for record in self.records if tags and tags[0] in record]
        blocks = sorted({tag.split("/")[1] for tag in tags})
        num_experts = len(tags) // max(1, len(blocks))
        names = [[f"moe_load/{b}/expert_{e}" for e in range(num_experts)] for b in blocks]
        table = [[[record[name] for name in row] for row in names] for record in records]
        return [int(record["step"]) for record in records], np.array(table)

    def gate_table(self) -> Tensor | None:
        """Return the newest checkpoint's averaged gates (L, S, E); None without gates."""
        if self.checkpoint is None or self.config.model.routing != "switch":
            return None
        return read_gate_table(self.checkpoint / EMA_FILE, self.config.diffusion.num_timesteps)


def flat(config: Config) -> dict[str, object]:
    """Return a configuration's values by key."""
    return {key: value for part in config.to_dict().values() for key, value in part.items()}


def load_runs(folders: list[Path]) -> list[RunData]:
    """Read the runs of a report.

    Raises:
        ConfigError: a folder is no run directory, has no records yet or cannot be read.
    """
    names = [folder.resolve().name for folder in folders]
    is_clear = len(set(names)) == len(names)
    runs = []
    for i, (folder, name) in enumerate(zip(folders, names, strict=True), 1):
        shown, slug = (name, name) if is_clear else (str(folder), f"{i}-{name}")
        try:
            runs.append(_load(folder, shown, slug))
        except OSError as err:
            raise ConfigError(
                f"{folder}: {err.filename} cannot be read ({err.strerror}); make it readable."
            ) from err
    return runs


def _load(folder: Path, name: str, slug: str) -> RunData:
    config = load_config(folder)
    if not (folder / METRICS_FILE).exists() or not (records := read_metrics(folder)):
        raise ConfigError(f"{folder}: nothing was recorded yet; train first.")
    grids = sorted(p for p in (folder / SAMPLES_DIR).glob("*.png") if _GRID.fullmatch(p.name))
    chosen = np.linspace(0, len(grids) - 1, min(NUM_GRIDS, len(grids))).round().astype(int)
    checkpoint = latest_checkpoint(folder)
    if checkpoint is not None:
        read_manifest(checkpoint)  # refuses one that is damaged
    return RunData(
        name=name,
        slug=slug,
        folder=folder,
        config=config,
        records=records,
        starts=read_starts(folder),
        checkpoint_notes=read_notes(folder),
        events=read_events(folder),
        grids=[grids[i] for i in chosen],
        scores=read_scores(folder / EVALUATION_DIR),
        checkpoint=checkpoint,
    )


def read_events(folder: Path) -> list[tuple[str, str]]:
    """Return the newest warnings and errors of a run's log, oldest first."""
    names = [*(f"{LOG_FILE}.{i}" for i in range(NUM_OLDER, 0, -1)), LOG_FILE]
    texts = [
        (folder / name).read_text(encoding="utf-8", errors="replace")
        for name in names
        if (folder / name).is_file()
    ]
    found = [_EVENT.fullmatch(line) for text in texts for line in text.splitlines()]
    return [(match[1], match[2]) for match in found if match][-MAX_EVENTS:]
