"""Pages in a real browser: the one to play with, and the report that is mailed."""

import io
import os
import re
import shutil
import signal
from contextlib import contextmanager
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support import evaluated_run, reported_run
from tests.support.browser import TIMEOUT_MS, visit
from tests.support.launch import finish, run, start
from training.checkpoints.manifest import CHECKPOINT_DIR, RAW_FILE, tag_of
from training.playground.playground import Playground

pytestmark = pytest.mark.cluster


@contextmanager
def served(run_dir, folder):
    """Serve the page of a run; yields its address and its process, which is ended at last.

    Its temporary files are in `folder`/tmp, and what it looked up or sent to in `folder`/asked.
    """
    (folder / "tmp").mkdir()
    program = ("tests/support/watched_module.py", folder / "asked", "training.demo")
    process = start("python", *program, run_dir, "--port", 0, TMPDIR=str(folder / "tmp"))
    try:
        line = process.stdout.readline()
        found = re.fullmatch(r"(http://127\.0\.0\.1:\d+) \(Ctrl-C ends it\)\n", line)
        assert found, line + process.stdout.read()
        yield found[1], process
    finally:
        process.terminate()
        output = finish(process)
    assert (process.returncode, output) == (0, "")
    assert list((folder / "tmp").iterdir()) == []
    asked = (folder / "asked").read_text().splitlines()
    strange = [line for line in asked if "127.0.0.1" not in line]
    assert asked and strange == [], "nobody else is asked for anything"


def fill(page, **values):
    for name, value in values.items():
        field = page.locator(f"#{name} input[type=number]")
        field.fill(str(value))
        field.press("Tab")


def choose(page, name, text):
    page.locator(f"#{name} input").click()
    page.get_by_role("option", name=text).click()


def draw(found, count):
    """Draw, and return the files of the images that appear."""
    found.page.locator("#draw").click()
    found.page.wait_for_function(
        "count => [...document.querySelectorAll('#images img')]"
        ".filter(i => i.complete && i.naturalWidth > 0).length == count",
        arg=count,
    )
    sources = found.pictures("#images img")
    return [found.page.request.get(source).body() for source in sources]


def shown_experts(found, other_than):
    """The picture of the experts at a timestep as soon as it is another one, and its address."""
    found.page.wait_for_function(
        "old => { const i = document.querySelector('#experts img');"
        " return i && i.src != old && i.complete && i.naturalWidth > 0; }",
        arg=other_than,
    )
    (source,) = found.pictures("#experts img")
    png = found.page.request.get(source).body()
    return np.asarray(Image.open(io.BytesIO(png))), source


def test_a_visitor_draws_images_and_looks_at_experts(tmp_path):
    run_dir = tmp_path / "run"
    evaluated_run.make_run(run_dir, tmp_path / "data")
    flags = ("--classes", 2, "--per-class", 3, "--steps", 4, "--seed", 6, "--sampler", "ddpm")
    run("python", "training/sample.py", run_dir, *flags, "--output", tmp_path / "drawn")
    expected = [path.read_bytes() for path in sorted((tmp_path / "drawn").glob("0*.png"))]
    playground = Playground(run_dir, torch.device("cpu"))

    with served(run_dir, tmp_path) as (address, _), visit(address) as found:
        table, source = shown_experts(found, other_than="")
        assert np.array_equal(table, playground.experts_at(499)[0])
        choose(found.page, "class", "class 2")
        choose(found.page, "sampler", "ddpm")
        fill(found.page, steps=4, seed=6, count=3)
        assert draw(found, 3) == expected, "the very files of training/sample.py"

        found.page.locator("#timestep input[type=range]").press("Home")
        table, source = shown_experts(found, other_than=source)
        assert np.array_equal(table, playground.experts_at(0)[0])
        choose(found.page, "weights", "raw, as trained")
        table, source = shown_experts(found, other_than=source)
        assert np.array_equal(table, playground.experts_at(0, weights="raw")[0])

        assert {urlsplit(request).hostname for request in found.requests} == {"127.0.0.1"}
        assert found.complaints == []


def test_a_page_without_classes_and_experts_says_what_is_wrong_and_can_be_stopped(tmp_path):
    run_dir = tmp_path / "run"
    evaluated_run.make_run(run_dir, tmp_path / "data", num_classes=0, routing="dense")

    with served(run_dir, tmp_path) as (address, process), visit(address) as found:
        page = found.page
        assert len(draw(found, 8)) == 8
        assert [page.locator(f"#{name}").count() for name in ("class", "cfg", "timestep")] == [
            0
        ] * 3
        assert "Switch" not in page.content()
        foreign = page.request.get(address, headers={"Host": "foreign.example"})
        assert (foreign.status, foreign.text()) == (400, "Invalid host header")

        fill(page, steps=1000, count=16)
        page.locator("#draw").click()
        page.get_by_text(re.compile(r"\d+/1000 steps")).first.wait_for()
        page.locator("#stop").click()
        page.get_by_text("Stopped.").wait_for()

        shutil.copy(tmp_path / "asked", run_dir / CHECKPOINT_DIR / tag_of(7) / RAW_FILE)
        choose(page, "weights", "raw, as trained")
        page.locator("#draw").click()
        page.get_by_text("its manifest.json says").wait_for()

        choose(page, "weights", "average 0.999")
        page.locator("#draw").click()
        page.get_by_text(re.compile(r"\d+/1000 steps")).first.wait_for()
        os.kill(process.pid, signal.SIGTERM)
        process.wait(timeout=TIMEOUT_MS / 1000)  # although it was drawing


def test_another_host_is_warned_of_and_a_mistake_is_one_sentence(tmp_path):
    output = run(
        *("python", "-m", "training.demo", tmp_path, "--host", "0.0.0.0", "--port", 0), expect=2
    )

    warning, error = output.splitlines()
    assert warning.startswith("warning: --host 0.0.0.0: whoever reaches this machine can use")
    assert error.startswith(f"error: {tmp_path} is no run directory")


def test_a_report_opens_without_asking_for_anything(tmp_path):
    folders = [reported_run.make_run(tmp_path / "a"), reported_run.make_run(tmp_path / "b", lr=0.5)]
    evaluated_run.make_run(tmp_path / "other", tmp_path / "data")
    shutil.copytree(tmp_path / "other" / CHECKPOINT_DIR, folders[0] / CHECKPOINT_DIR)
    run("python", "training/report.py", *folders, "--output", tmp_path / "both")
    address = (tmp_path / "both/report.html").as_uri()

    with visit(address) as found:
        found.page.wait_for_function(
            "() => [...document.images].every(image => image.complete)", timeout=TIMEOUT_MS
        )
        num_pictures = found.page.locator("img").count()
        assert num_pictures == len(list((tmp_path / "both").glob("*.png")))
        assert len(found.pictures("img")) == num_pictures, "every picture was decoded"
        experts = found.page.get_by_alt_text("Experts", exact=True).bounding_box()
        assert experts["width"] > 1000, "a pixel for every timestep"
        for width in (1280, 420):
            found.page.set_viewport_size({"width": width, "height": 900})
            shown = found.page.evaluate("document.documentElement.scrollWidth")
            assert shown == width, "no need to scroll sideways"
        assert found.page.get_by_role("heading", name="Over training").is_visible()
        assert found.requests == [address]
        assert found.complaints == []
