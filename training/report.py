"""Write one page on a run, or on several side by side, that can be mailed: report.html.

    python training/report.py runs/XL
    python training/report.py runs/XL runs/XL-16-experts --output comparison

Runs that differ in nothing but their seeds, places and machines are one row: means with the
standard deviation between runs, and whether that tells rows apart.

Made from metrics.jsonl, log.txt, starts.jsonl, checkpoints.jsonl, grids of samples, the scores of
evaluations and the newest checkpoint; the runs may still be training. The page holds its pictures;
they also lie beside it as PNG files.
"""

import argparse
import base64
import sys
from pathlib import Path

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import jinja2

from data_tools.errors import (
    ArgumentParser,
    ConfigError,
    count_of,
    exit_on_config_error,
    os_errors_as,
)
from data_tools.files import replace_file
from data_tools.process.entry_point import enter
from data_tools.user_files.paths import typed_path
from training.reports import figures as report_figures
from training.reports.figures import FigureOf
from training.reports.rows import Row, comparisons, rows_of, score_name, unique
from training.reports.run_data import RunData, load_runs

PAGE_FILE = "report.html"
DEFAULT_FOLDER = "report"
FINAL = {  # numbers of the end, by title and tag, and how they are written
    ("loss", "loss/total"): ".4f",
    ("mean squared error", "loss/mse"): ".4f",
    ("samples per second", "speed/samples_per_sec"): ",.1f",
}
TEMPLATE = Path(__file__).with_name("reports") / "template.html"


def build_parser() -> ArgumentParser:
    """Build the command line."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=typed_path, nargs="+", metavar="RUN", help="e.g. runs/demo")
    parser.add_argument(
        "--output",
        type=typed_path,
        metavar="FOLDER",
        help=f"for {PAGE_FILE} and pictures (default: RUN/{DEFAULT_FOLDER}; needed for several)",
    )
    return parser


def summary(row: Row) -> dict[str, str]:
    """Return a row's numbers for the table on top; texts that its runs do not share are listed."""
    found = {"runs": row.described()}
    texts = [_texts_of(run) for run in row.runs]
    keys = dict.fromkeys(key for table in texts for key in table)
    listed = {key: unique(table[key] for table in texts if key in table) for key in keys}
    found |= {key: listed.pop(key) for key in ("model", "steps", "samples")}
    for (title, tag), form in FINAL.items():
        if (spread := row.final(tag)) is not None:
            found[f"{title}, last 5 %"] = spread.text(form)
    return found | listed


def _texts_of(run: RunData) -> dict[str, str]:
    step, config = int(run.records[-1]["step"]), run.config
    model = config.model
    rows = {
        "model": f"{model.size}/{model.patch_size}, {_experts_of(run)}",
        "steps": f"{step:,} of {config.run.max_steps:,}",
        "samples": f"{step * config.optim.global_batch_size:,}",
    }
    if run.starts:
        last = run.starts[-1]
        rows["starts"] = str(len(run.starts))
        rows["machines"] = f"{sum(last.hosts.values())} rank(s) on {len(last.hosts)} node(s)"
        rows["hardware"] = last.hardware
        rows["layout"] = last.layout
        rows["program"] = last.commit[:10] + (", changed" if last.changes else "")
        rows["data"] = last.data_hash[:10]
    rows["newest checkpoint"] = run.checkpoint.name if run.checkpoint else "none"
    return rows


def _experts_of(run: RunData) -> str:
    model = run.config.model
    if model.routing != "switch":
        return model.routing
    return f"{count_of(model.num_experts, 'expert')}, {model.top_k} per timestep"


def write_report(runs: list[RunData], folder: Path) -> Path:
    """Write the page and its pictures; return the page's path.

    Raises:
        OSError: a file cannot be written.
    """
    rows = rows_of(runs)
    shared = report_figures.curves(rows)
    scores = report_figures.scores(rows)
    own = {run.name: _figures_of(run) for run in runs}
    folder.mkdir(parents=True, exist_ok=True)
    for figure in [*shared, *scores, *(figure for figures in own.values() for figure in figures)]:
        replace_file(folder / figure.name, lambda file, png=figure.png: file.write(png))
    summaries = {row.label: summary(row) for row in rows}
    settings = {row.label: row.settings() for row in rows}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["data_url"] = _data_url
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        runs=runs,
        rows=rows,
        names=list(dict.fromkeys(key for table in summaries.values() for key in table)),
        summaries=summaries,
        settings=settings,
        different=[
            key
            for key in settings[rows[0].label]
            if len({table[key] for table in settings.values()}) > 1
        ],
        comparisons=comparisons(rows),
        score_name=score_name,
        shared=shared,
        scores=scores,
        own=own,
    )
    path = folder / PAGE_FILE
    replace_file(path, lambda file: file.write(page.encode()))
    return path


def _figures_of(run: RunData) -> list[FigureOf]:
    first = report_figures.history(run), report_figures.error_by_timestep(run)
    return [
        *(figure for figure in first if figure is not None),
        *report_figures.experts(run),
        *report_figures.grids(run),
    ]


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def main(argv: list[str] | None = None) -> None:
    """Write the report of the runs on the command line."""
    args = build_parser().parse_args(argv)
    with exit_on_config_error():
        if args.output is None and len(args.runs) > 1:
            raise ConfigError("--output: name a folder for a report on several runs.")
        if len({path.resolve() for path in args.runs}) < len(args.runs):
            raise ConfigError(
                f"{' '.join(map(str, args.runs))}: a run is named twice; name it once."
            )
        runs = load_runs(args.runs)
        folder = args.output or args.runs[0] / DEFAULT_FOLDER
        with os_errors_as(f"--output {folder}: cannot write", "choose another folder"):
            path = write_report(runs, folder)
    print(f"{path} ({path.stat().st_size / 2**20:.1f} MiB)")


if __name__ == "__main__":
    enter(main)
