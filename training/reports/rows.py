"""Put runs of one configuration together as one row of a report, and tell rows apart.

A row's numbers are means over its runs, with the standard deviation between them (division by
n - 1). Two means are told apart by Welch's test at the level of 5 %.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from training.config.tree import Config, options
from training.reports.run_data import RunData, flat

SEEDS = ("seed", "seed_init", "seed_data", "seed_noise")  # keys of a run
KEPT = ("max_steps",)  # may change in a run, and makes another result
# The 97.5 % quantiles of Student's t by degrees of freedom. Lines between them lie above the curve.
T_QUANTILES = {1: 12.71, 2: 4.303, 3: 3.183, 4: 2.777, 5: 2.571, 6: 2.447, 8: 2.307, 10: 2.229}
T_QUANTILES |= {15: 2.132, 20: 2.087, 30: 2.043, 60: 2.001}
SPREAD_END = "_std"  # ends the names of scores that are spreads themselves


class Spread(NamedTuple):
    """A number of several runs."""

    mean: float
    std: float | None  # None of one run
    count: int

    def text(self, form: str) -> str:
        """Write the mean, and behind it the standard deviation if there is one."""
        mean = format(self.mean, form)
        return mean if self.std is None else f"{mean} ± {format(self.std, form)}"


def spread_of(values: list[float]) -> Spread:
    """Return the mean and the sample standard deviation of a number of each run."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(float(np.mean(values)), std, len(values))


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seeds and places only; one run without any like it is a row too."""

    runs: list[RunData]

    @property
    def label(self) -> str:
        """A short name, different for every row."""
        count = len(self.runs)
        return self.runs[0].name if count == 1 else f"{self.runs[0].name} ({count} runs)"

    @property
    def last_step(self) -> int:
        """The last step that all runs have recorded."""
        return min(int(run.records[-1]["step"]) for run in self.runs)

    def described(self) -> str:
        """Say how many runs these are, which, and what numbers of them mean."""
        if len(self.runs) == 1:
            return "1, so no spread is known"
        steps = {int(run.records[-1]["step"]) for run in self.runs}
        until = f"; compared up to step {self.last_step:,}, which all reached"
        seeds = "; ".join(_seed_text(run) for run in self.runs)
        names = ", ".join(run.name for run in self.runs)
        return f"{len(self.runs)} ({names}), seeds {seeds}{until if len(steps) > 1 else ''}"

    def final(self, tag: str, until: int | None = None) -> Spread | None:
        """Return a number at the end of what all runs (and `until`) reached; None if one lacks it.

        Of each run it is the mean over its end.
        """
        values = [run.final(tag, min(self.last_step, until or self.last_step)) for run in self.runs]
        return None if None in values else spread_of(values)

    def series(self, tag: str) -> tuple[list[int], np.ndarray]:
        """Return the steps at which all runs recorded a number, and the numbers (runs, steps)."""
        found = [dict(zip(*run.series(tag), strict=True)) for run in self.runs]
        steps = sorted(set.intersection(*map(set, found)))
        return steps, np.array([[values[step] for step in steps] for values in found])

    def scores(self) -> dict[str, dict[int, dict[str, Spread]]]:
        """Return evaluation's scores by way, step and tag, of the runs that have them."""
        found: dict[str, dict[int, dict[str, list[float]]]] = {}
        for run in self.runs:
            for way, by_step in run.scores.items():
                for step, values in by_step.items():
                    place = found.setdefault(way, {}).setdefault(step, {})
                    for tag, value in values.items():
                        place.setdefault(tag, []).append(value)
        return {
            way: {
                step: {tag: spread_of(values) for tag, values in by_tag.items()}
                for step, by_tag in by_step.items()
            }
            for way, by_step in found.items()
        }

    def settings(self) -> dict[str, str]:
        """Return the configuration by key, several values listed; runs' names are known."""
        tables = [flat(run.config) for run in self.runs]
        keys = [key for key in tables[0] if key != "run_dir"]
        return {key: unique(table[key] for table in tables) for key in keys}


def unique(values: Iterable[object]) -> str:
    """List different values once, in their order."""
    return "; ".join(dict.fromkeys(map(str, values)))


def rows_of(runs: list[RunData]) -> list[Row]:
    """Put runs together. One with the seeds of another repeats it, and is a row of its own."""
    rows: dict[tuple[str, int], Row] = {}
    for run in runs:
        key, repeat = _configuration(run), 0
        while (key, repeat) in rows and any(
            _seeds(other.config) == _seeds(run.config) for other in rows[key, repeat].runs
        ):
            repeat += 1
        rows.setdefault((key, repeat), Row([])).runs.append(run)
    return list(rows.values())


def _configuration(run: RunData) -> str:
    """Return what runs of one row have in common: all but seeds, places and machines."""
    free = {leaf.name for leaf in options() if leaf.field.metadata["may_change"]} - {*KEPT}
    values = {k: v for k, v in flat(run.config).items() if k not in free and k not in SEEDS}
    data = run.starts[-1].data_hash if run.starts else run.config.data.data
    return repr((sorted(values.items()), data))


def _seeds(config: Config) -> list[object]:
    """Return the seeds; one that is not given is that of the run."""
    values = flat(config)
    given = [values.get(name) for name in SEEDS]
    return [values["seed"] if seed is None else seed for seed in given]


def _seed_text(run: RunData) -> str:
    return "/".join(dict.fromkeys(map(str, _seeds(run.config))))


class Comparison(NamedTuple):
    """One number of two rows."""

    number: str
    rows: tuple[Row, Row]
    values: tuple[Spread, Spread]

    @property
    def verdict(self) -> str:
        """Say whether the means differ by more than the spread allows for."""
        if self.limit is None:
            return "no spread known: a row has one run"
        gap = self.values[0].mean - self.values[1].mean
        if abs(gap) <= self.limit:
            return "not told apart"
        return f"{self.rows[gap > 0].label} is lower"

    @property
    def limit(self) -> float | None:
        """How much the means must differ to be told apart; None if a row has no spread."""
        if any(value.std is None for value in self.values):
            return None
        squares = [value.std**2 / value.count for value in self.values]
        if not (total := sum(squares)):
            return 0.0
        shares = [s**2 / (v.count - 1) for s, v in zip(squares, self.values, strict=True)]
        freedom = total**2 / sum(shares)  # Welch and Satterthwaite's
        return float(np.interp(freedom, [*T_QUANTILES], [*T_QUANTILES.values()])) * total**0.5


def comparisons(rows: list[Row]) -> list[Comparison]:
    """Compare every two rows by their losses, and by the scores that both have."""
    pairs = [(one, other) for i, one in enumerate(rows) for other in rows[i + 1 :]]
    found = []
    for one, other in pairs:
        until = min(one.last_step, other.last_step)
        for tag in ("loss/total", "loss/mse"):
            values = one.final(tag, until), other.final(tag, until)
            if None not in values:
                name = f"{tag.replace('/', ' ')} at step {until:,}"
                found.append(Comparison(name, (one, other), values))
        scores = one.scores(), other.scores()
        for way in sorted(set(scores[0]) & set(scores[1])):
            steps = set(scores[0][way]) & set(scores[1][way])
            if not steps:
                continue
            step = max(steps)
            tables = [table[way][step] for table in scores]
            for tag in tables[0]:
                if tag in tables[1] and not is_spread(tag):
                    name = f"{score_name(tag)} at step {step:,} ({way})"
                    found.append(Comparison(name, (one, other), (tables[0][tag], tables[1][tag])))
    return found


def is_spread(tag: str) -> bool:
    """Tell whether a score is the spread of another one; behind a slash may be its network."""
    return tag.split("/")[1].endswith(SPREAD_END)


def score_name(tag: str) -> str:
    """Name a score for people."""
    return tag.removeprefix("eval/").replace("_", " ")
