"""A run to report on, without a checkpoint, and what the page on it says and loads."""

from html.parser import HTMLParser

import torch
from PIL import Image

from data_tools.files import append_line
from tests.support.configs import small
from training.monitoring.event_files import Monitor
from training.monitoring.expert_load import load_metrics
from training.run.directory import CONFIG_FILE
from training.run.program import record_start

STEPS = (20, 40, 60)


def make_run(folder, **values):
    """A run directory of three intervals and two starts, without a checkpoint."""
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(small(**values).to_yaml())
    common = {"layout": "1 rank(s)", "hosts": {"n<1>": 1}, "data_hash": "0", "config_changes": []}
    record_start(folder, step=0, checkpoint="", **common)
    record_start(folder, step=40, checkpoint="step-0000040", **common)
    monitor = Monitor(folder)
    for step in STEPS:
        counts = torch.rand(6, 3, generator=torch.Generator().manual_seed(step)) + 0.1
        losses = {"loss/total": 1 / step, "loss/mse": 0.5 / step, "mse_by_timestep/000-099": 0.1}
        monitor.scalars(step, losses | load_metrics(counts, 3.0))
    monitor.close()
    (folder / "samples").mkdir()
    for step in STEPS:
        Image.new("RGB", (8, 8), (step, 0, 0)).save(folder / f"samples/{step:07d}.png")
    append_line(folder / "log.txt", "2026-01-01T00:00:00Z warning: loss spike <b>at</b> step 3")
    append_line(folder / "log.txt", "2026-01-01T00:00:01Z step 20/60  loss 1")
    return folder


class Page(HTMLParser):
    """What a browser would show, and what it would load."""

    def __init__(self, path):
        super().__init__()
        self.text, self.links, self.tags = "", [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "srcset")]

    def handle_data(self, data):
        self.text += f" {data}"
