"""What is written: the same scalars in two places, and nothing of steps that were lost."""

import json
import time

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer import event_file_writer

from tests.support.configs import small
from tests.support.events import scalars_in_tensorboard
from training.monitoring.dashboard import dashboard
from training.monitoring.event_files import (
    MAX_LOAD_TAGS,
    METRICS_FILE,
    TENSORBOARD_DIR,
    Monitor,
    read_metrics,
)
from training.monitoring.expert_load import load_metrics


def test_tensorboard_and_json_lines_hold_the_same_scalars(tmp_path):
    monitor = Monitor(tmp_path)
    for step in (10, 20):
        monitor.scalars(step, {"loss/total": step / 8, "moe/load_entropy": 0.5})
    monitor.close()

    records = read_metrics(tmp_path)
    for tag, events in scalars_in_tensorboard(tmp_path).items():
        assert events == [(record["step"], record[tag]) for record in records]
    assert [record["step"] for record in records] == [10, 20]


def test_tensorboards_files_are_bounded_and_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("training.monitoring.event_files.MAX_EVENTS_BYTES", 2000)
    # Files of one second are ordered by the end of their names, as text: 100 comes before 99.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(100))
    monitor = Monitor(tmp_path)
    for step in range(1, 201):
        monitor.scalars(step, {"loss/total": step / 8})
    monitor.close()

    files = list((tmp_path / TENSORBOARD_DIR).iterdir())
    assert len(files) > 3
    assert max(file.stat().st_size for file in files) < 2200
    expected = [(step, step / 8) for step in range(1, 201)]
    assert scalars_in_tensorboard(tmp_path)["loss/total"] == expected


def test_thousands_of_experts_are_a_histogram_per_block_and_whole_in_the_records(tmp_path):
    depth, num_experts = 2, MAX_LOAD_TAGS // 2 + 1
    counts = torch.arange(1.0, depth * num_experts + 1).view(depth, num_experts)
    metrics = load_metrics(counts, num_samples=1000)
    monitor = Monitor(tmp_path)
    monitor.scalars(10, metrics)
    monitor.close()

    assert read_metrics(tmp_path) == [{"step": 10} | metrics]
    events = EventAccumulator(str(tmp_path / TENSORBOARD_DIR))
    events.Reload()
    assert events.Tags()["histograms"] == ["moe_load/block_00", "moe_load/block_01"]
    assert len(events.Tags()["scalars"]) == len(metrics) - depth * num_experts
    (histogram,) = events.Histograms("moe_load/block_01")
    assert histogram.histogram_value.num == num_experts


def test_other_ranks_write_nothing(tmp_path):
    monitor = Monitor(None)
    monitor.scalars(1, {"loss/total": 1.0})
    monitor.image(1, "x", np.zeros((2, 2, 3), dtype=np.uint8))
    monitor.text("y", "z")
    monitor.close()

    assert list(tmp_path.iterdir()) == []


def test_resuming_drops_records_of_lost_steps_and_a_torn_line(tmp_path):
    monitor = Monitor(tmp_path)
    for step in (10, 20, 30):
        monitor.scalars(step, {"loss/total": float(step)})
    monitor.close()
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write(json.dumps({"step": 40})[:-4])

    time.sleep(1)  # files are ordered by the second in their names; no run resumes within one
    monitor = Monitor(tmp_path, resume_step=20)
    monitor.scalars(30, {"loss/total": 31.0})
    monitor.close()

    assert [(r["step"], r["loss/total"]) for r in read_metrics(tmp_path)] == [
        (10, 10.0),
        (20, 20.0),
        (30, 31.0),
    ]
    assert scalars_in_tensorboard(tmp_path)["loss/total"] == [(10, 10.0), (20, 20.0), (30, 31.0)]


DAMAGED = (  # lines of what a power cut, a bad disk or another program leaves
    b'{"step": 20, "loss/total"' + bytes(4096) + b"0}",
    b'{"loss/total": 1.0}',
    b'{"step": 20, "loss/total": \xff}',
    b'{"step": 20, "loss/total": "1.0"}',
    b'{"format_version": 2, "step": 20, "loss/total": 1.0}',
    b'{"step": null}',
    b"[20]",
    b"",
)


def test_a_start_keeps_lines_that_it_does_not_understand_and_warns_once(tmp_path, capsys):
    monitor = Monitor(tmp_path)
    for step in (10, 20, 30, 40):
        monitor.scalars(step, {"loss/total": float(step)})
    monitor.close()
    path = tmp_path / METRICS_FILE
    first, *others = path.read_bytes().splitlines(keepends=True)
    strange = b"".join(line + b"\n" for line in DAMAGED)
    path.write_bytes(first + strange + b"".join(others))
    warning = (
        f"warning: {path}: 8 line(s), damaged or of a newer program, are left out; they stay in "
        "the file.\n"
    )

    assert [record["step"] for record in read_metrics(tmp_path)] == [10, 20, 30, 40]
    assert capsys.readouterr().err == warning
    Monitor(tmp_path, resume_step=30).close()

    assert capsys.readouterr().err == warning
    assert path.read_bytes() == first + strange + b"".join(others[:2])
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_a_line_that_is_being_written_is_no_damage(tmp_path, capsys):
    (tmp_path / METRICS_FILE).write_bytes(b'{"step": 10}\n{"step": 2')

    assert read_metrics(tmp_path) == [{"step": 10}]
    assert capsys.readouterr().err == ""


def test_a_last_line_that_lost_only_its_end_is_read_and_gets_it_back(tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_bytes(b'{"step": 10}\n{"step": 20}')

    assert read_metrics(tmp_path) == [{"step": 10}, {"step": 20}]
    Monitor(tmp_path, resume_step=20).close()

    assert path.read_bytes() == b'{"step": 10}\n{"step": 20}\n'


def test_tensorboards_plugins_find_the_charts_and_the_hyperparameters(tmp_path):
    monitor = Monitor(tmp_path)
    monitor.layout(dashboard(small(), depth=6, num_experts=3, num_ranks=2, has_peak=True))
    monitor.hyperparameters({"lr": 1e-4, "size": "XL", "ema_decays": [0.9]})
    monitor.scalars(10, {"loss/total": 1.0})
    monitor.close()

    events = EventAccumulator(str(tmp_path / TENSORBOARD_DIR))
    events.Reload()
    (layout,) = events.Tensors("custom_scalars__config__")
    categories = Layout.FromString(layout.tensor_proto.string_val[0]).category
    assert [category.title for category in categories][0] == "Is it learning?"
    assert "share of the GPU's peak, %" in [chart.title for chart in categories[1].chart]
    assert "block 05" in [chart.title for chart in categories[3].chart]
    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    values = HParamsPluginData.FromString(content).session_start_info.hparams
    assert values["lr"].number_value == 1e-4
    assert values["size"].string_value == "XL"
    assert values["ema_decays"].string_value == "[0.9]"
