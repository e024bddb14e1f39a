"""The page on runs: complete, self-contained, harmless, and true to the records."""

import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from data_tools.files import append_line
from tests.support.launch import run
from tests.support.reported_run import STEPS, Page, make_run
from training.report import main
from training.reports.rows import Comparison, Row, rows_of, spread_of
from training.reports.run_data import load_runs

pytestmark = pytest.mark.processes  # git says which program a run is of


def test_the_page_of_a_run_holds_everything_and_loads_nothing(tmp_path):
    folder = make_run(tmp_path / "a")

    output = run("python", "training/report.py", folder)

    path = folder / "report/report.html"
    assert output.startswith(f"{path} (")
    page = Page(path)
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "script" not in page.tags and "b" in page.tags
    assert "warning: loss spike <b>at</b> step 3" in page.text, "texts are no markup"
    for text in ("demo/2, 3 experts, 2 per timestep", "60 of 3,000", "n<1>", "Loads over time"):
        assert text in page.text
    names = {file.name for file in path.parent.glob("*.png")}
    assert len(names) == len(page.links)
    assert {"loss-total.png", "history-a.png", "loads-a.png", "samples-a-0000060.png"} <= names


def write_scores(folder, losses):
    """Cards of held-out losses by step, and one of drawn images."""
    cards = {
        f"validation-step-{step:07d}-ema-abc-t8-9-data.json": {
            "weights": {"step": step},
            "validation_loss": {"mse": {"mean": loss}},
        }
        for step, loss in losses.items()
    }
    cards["ddim50/score-1.json"] = {
        "weights": {"step": 60, "average": "ema"},
        "images": {"sampler": "ddim"},
        **{name: {"sha256": "0"} for name in ("reference", "features")},
        "metrics": {"fid": 12.345678, "precision": 0.75},
    }
    for name, card in cards.items():
        path = folder / "evaluation" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(card))


def test_scores_are_curves_over_checkpoints_and_a_table(tmp_path):
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
    write_scores(folders[0], {20: 0.5, 40: 0.25})

    main([*map(str, folders), "--output", str(tmp_path / "both")])

    text = re.sub(r"\s+", " ", Page(tmp_path / "both/report.html").text)
    assert "loss mse Lower is better." in text and "precision Higher" not in text
    assert re.search(r"a ddim50-\w{8} 60 fid 12.35, precision 0.75 a loss-", text)
    assert text.count("loss mse 0.5 ") == text.count("loss mse 0.25 ") == 1
    assert [path.name for path in (tmp_path / "both").glob("eval-*")] == ["eval-loss_mse.png"]
    main([str(folders[1])])
    assert "How good" not in (folders[1] / "report/report.html").read_text()


def test_several_runs_are_compared(tmp_path):
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", lr=0.5)]

    main([*map(str, folders), "--output", str(tmp_path / "both")])

    text = re.sub(r"\s+", " ", Page(tmp_path / "both/report.html").text)
    assert "What was set differently a b lr 0.001 0.5 Are they" in text
    assert "No row has several runs" in text and text.count("1, so no spread is known") == 2


def test_runs_that_differ_in_their_seeds_are_one_row_with_a_spread(tmp_path):
    folders = [
        make_run(tmp_path / f"{name}{seed}", seed=seed, run_dir=f"{name}{seed}", **values)
        for name, values in (("a", {"lr": 0.5}), ("b", {}))
        for seed in (0, 1, 2)
    ]
    for i, folder in enumerate(folders):
        write_scores(folder, {20: 0.5 + 0.01 * (i % 3), 40: [0.2, 0.4][i // 3] + 0.01 * (i % 3)})

    main([*map(str, folders), "--output", str(tmp_path / "both")])

    text = re.sub(r"\s+", " ", Page(tmp_path / "both/report.html").text)
    assert "a0 (3 runs) b0 (3 runs) runs 3 (a0, a1, a2), seeds 0; 1; 2 3 (b0, b1, b2)" in text
    assert "What was set differently a0 (3 runs) b0 (3 runs) lr 0.5 0.001 Are they" in text
    assert "0.0167 ± 0.0000" in text  # the loss, which does not depend on the seed here
    assert "0.21 ± 0.01 b0 (3 runs): 0.41 ± 0.01 -0.2 0.0227 a0 (3 runs) is lower" in text
    assert "fid 12.35 ± 0, precision" in text
    assert "fid at step 60" in text and "0 0 not told apart" in text
    names = {file.name for file in (tmp_path / "both").glob("*.png")}
    assert {"loss-total.png", "eval-loss_mse.png", "loads-b2.png"} <= names


def test_one_configuration_in_another_place_or_length_is_found_out(tmp_path):
    """A place makes no other row; a length, a data set and a seed that was met before do."""
    runs = load_runs(
        [
            make_run(tmp_path / "a", seed=1),
            make_run(tmp_path / "b", seed=2, data_cache="/elsewhere", log_every=7),
            make_run(tmp_path / "c", seed=1),
            make_run(tmp_path / "d", seed=3, max_steps=9),
            make_run(tmp_path / "e", seed=4),
        ]
    )
    runs[4].starts[-1] = dataclasses.replace(runs[4].starts[-1], data_hash="other")

    found = [[run.name for run in row.runs] for row in rows_of(runs)]

    assert found == [["a", "b"], ["c"], ["d"], ["e"]]


def test_a_row_is_measured_up_to_the_step_that_all_its_runs_reached(tmp_path):
    folders = [make_run(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    text = (folders[1] / "metrics.jsonl").read_text().replace("0.025", "0.035")
    (folders[1] / "metrics.jsonl").write_text("".join(text.splitlines(keepends=True)[:2]))

    (row,) = rows_of(load_runs(folders))

    assert row.last_step == 40
    assert row.final("loss/total") == pytest.approx((0.03, 0.005 * 2**0.5, 2))
    assert row.described() == "2 (0, 1), seeds 0; 1; compared up to step 40, which all reached"
    steps, values = row.series("loss/total")
    assert steps == [20, 40]
    np.testing.assert_allclose(values, [[0.05, 0.025], [0.05, 0.035]])


@pytest.mark.parametrize("counts", [(2, 2), (3, 3), (5, 2), (9, 30)])
def test_rows_are_told_apart_as_by_welchs_test(counts):
    """Its quantiles are read off lines between a few, so that it is stricter by a little."""
    random = np.random.default_rng(sum(counts))
    rows, verdicts = (Row([SimpleNamespace(name="a")]), Row([SimpleNamespace(name="b")])), []
    for shift in np.linspace(0.0, 8.0, 200):
        values = [random.normal(i * shift, 1.0 + i, count) for i, count in enumerate(counts)]
        spreads = tuple(spread_of(list(v)) for v in values)
        found = Comparison("", rows, spreads)
        chance = stats.ttest_ind(*values, equal_var=False).pvalue
        is_told = found.verdict == f"{'ab'[int(values[0].mean() > values[1].mean())]} is lower"
        assert is_told or found.verdict == "not told apart"
        assert not (is_told and chance > 0.0501), "never told apart where Welch's test does not"
        verdicts.append((is_told, chance < 0.05))
    assert sum(map(all, verdicts)) > 0.7 * sum(welch for _, welch in verdicts) > 10


def test_one_run_has_no_spread_and_equal_ones_are_not_told_apart():
    rows = tuple(Row([SimpleNamespace(name=name)]) for name in "ab")

    def verdict(*values):
        return Comparison("", rows, tuple(map(spread_of, values))).verdict

    assert verdict([1.0], [2.0, 3.0]) == "no spread known: a row has one run"
    assert verdict([1.0, 1.0], [1.0, 1.0]) == "not told apart"
    assert verdict([1.0, 1.0], [0.5, 0.5]) == "b is lower"


def test_runs_of_one_name_keep_their_pictures_apart(tmp_path):
    folders = [make_run(tmp_path / "a/XL"), make_run(tmp_path / "b/XL", lr=0.5)]

    main([*map(str, folders), "--output", str(tmp_path / "both")])

    text = Page(tmp_path / "both/report.html").text
    assert all(str(folder) in text for folder in folders)
    names = {file.name for file in (tmp_path / "both").glob("*.png")}
    assert {"loads-1-XL.png", "loads-2-XL.png", "samples-2-XL-0000060.png"} <= names


def test_numbers_are_those_of_the_records(tmp_path):
    (found,) = load_runs([make_run(tmp_path / "a")])

    assert found.series("loss/mse") == (list(STEPS), [0.5 / step for step in STEPS])
    assert found.final("loss/mse") == 0.5 / 60
    assert found.final("loss/vlb") is None
    steps, loads = found.loads()
    assert steps == list(STEPS)
    assert loads.shape == (3, 6, 3)
    assert loads[2, 5, 1] == found.records[2]["moe_load/block_05/expert_1"]
    assert found.events == [("2026-01-01T00:00:00Z", "warning: loss spike <b>at</b> step 3")]


FAULTS = ("no run", "no records", "card", "vanished", "twice", "no output")


def test_damaged_records_are_left_out_with_a_warning(tmp_path, capsys):
    folder = make_run(tmp_path / "a")
    append_line(folder / "metrics.jsonl", "{")

    main([str(folder)])

    warning = f"warning: {folder / 'metrics.jsonl'}: 1 line(s), damaged or of a newer program"
    assert capsys.readouterr().err.startswith(warning)
    assert "60 of 3,000" in Page(folder / "report/report.html").text


@pytest.mark.parametrize("fault", FAULTS)
def test_mistakes_are_one_sentence_and_write_nothing(fault, tmp_path, capsys):
    folder = make_run(tmp_path / "a")
    arguments, message = [folder], "nothing was recorded yet; train first."
    if fault == "no run":
        arguments, message = [tmp_path], "is no run directory"
    elif fault == "no records":
        (folder / "metrics.jsonl").unlink()
    elif fault in ("card", "vanished"):
        card = folder / "evaluation/way/score-1.json"
        card.parent.mkdir(parents=True)
        card.mkdir() if fault == "card" else card.symlink_to("nowhere")
        message = f"error: {folder}: {card} cannot be read ("
    elif fault == "twice":
        arguments, message = [folder, folder, "--output", tmp_path / "b"], "a run is named twice"
    else:
        shutil.copytree(folder, tmp_path / "b")
        arguments, message = [folder, tmp_path / "b"], "--output: name a folder"
    before = sorted(tmp_path.rglob("*"))

    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])

    output = capsys.readouterr().err
    assert left.value.code == 2
    assert output.count("\n") == 1 and message in output
    assert sorted(tmp_path.rglob("*")) == before
