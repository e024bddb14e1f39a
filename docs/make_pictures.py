"""Make the pictures of the documentation from a finished run: docs/pictures/*.png.

    python -m docs.make_pictures runs/demo

The run needs samples (training/sample.py). TensorBoard and the report are shown by a headless
Chromium, through playwright. `--only architecture` draws the one picture that needs no run.
"""

import argparse
import io
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from PIL import Image

from models.prior import diffusion_prior
from tests.support.browser import visit
from tests.support.launch import free_port, run

PICTURES = Path(__file__).resolve().parent / "pictures"
MAX_BYTES = 200 * 1000
MAX_WIDTH = 1200  # pixels; GitHub shows fewer
NUM_COLOURS = 128  # of a palette: these pictures have flat areas, and small files matter
GAP = 24  # pixels between the halves of a grid
START_SEC = 120  # patience with TensorBoard's start

INK, GREY, PALE = "#24292f", "#8c959f", "#f6f8fa"
BLUE, ORANGE, GREEN = "#ddf0ff", "#ffe8d1", "#dcf5e0"


def save(picture: Image.Image, name: str) -> None:
    """Write a picture with few colours and at most MAX_WIDTH pixels of width."""
    if picture.width > MAX_WIDTH:
        height = round(picture.height * MAX_WIDTH / picture.width)
        picture = picture.resize((MAX_WIDTH, height), Image.Resampling.LANCZOS)
    path = PICTURES / f"{name}.png"
    picture.convert("RGB").quantize(NUM_COLOURS).save(path, optimize=True)
    assert path.stat().st_size < MAX_BYTES, f"{path} has {path.stat().st_size} bytes"


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, fill: str) -> None:
    """Draw a rounded box with a text in its middle; x, y are its lower left corner."""
    shape = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", fc=fill, ec=INK, lw=1.1
    )
    axes.add_patch(shape)
    middle = (x + width / 2, y + height / 2)
    axes.text(*middle, text, ha="center", va="center", color=INK, fontsize=9.5)


def arrow(axes: Axes, *points: tuple[float, float], color: str = INK) -> None:
    """Draw a line through the points that ends in an arrow."""
    xs, ys = zip(*points[:-1], strict=True)
    axes.plot(xs, ys, color=color, lw=1.3, solid_capstyle="butt")
    style = {"arrowstyle": "-|>", "color": color, "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", points[-1], points[-2], arrowprops=style)


def note(axes: Axes, x: float, y: float, text: str, align: str = "center") -> None:
    """Write a small text."""
    axes.text(x, y, text, ha=align, va="center", color=INK, fontsize=9.5, linespacing=1.3)


def title(axes: Axes, text: str) -> None:
    """Write what a part of the drawing shows."""
    axes.set_title(text, loc="left", fontsize=12, color=INK, fontweight="bold")


def draw_network(axes: Axes) -> None:
    """Draw the whole network: what goes in, the blocks, the gates, what comes out."""
    title(axes, "The network")
    box(axes, 0.0, 0.2, 3.0, 0.8, "noisy latent $x_t$", PALE)
    box(axes, 0.0, 1.7, 3.0, 0.8, "patches + positions", BLUE)
    for k, number in enumerate("12L"):
        y = 3.2 + 1.5 * k
        box(axes, 0.0, y, 3.0, 0.8, f"block {number}", BLUE)
        box(axes, 4.7, y, 2.2, 0.8, f"gate {number}", ORANGE)
        arrow(axes, (4.7, y + 0.4), (3.0, y + 0.4))
        arrow(axes, (7.3, y + 0.4), (6.9, y + 0.4))
    box(axes, 0.0, 7.7, 3.0, 0.8, "final layer", BLUE)
    box(axes, 0.0, 9.2, 3.0, 0.8, "noise, variance", PALE)
    for y in (1.0, 2.5, 4.0, 7.0, 8.5):
        arrow(axes, (1.5, y), (1.5, y + 0.7))
    axes.plot((1.5, 1.5), (5.5, 6.2), color=INK, lw=1.6, ls=":")
    note(axes, 3.85, 7.0, "weights of\nE experts")
    box(axes, 4.7, 0.2, 2.2, 0.8, "timestep $t$", PALE)
    box(axes, 4.7, 1.7, 2.2, 0.8, "embedding", GREEN)
    arrow(axes, (5.8, 1.0), (5.8, 1.7))
    axes.plot((6.9, 7.3, 7.3), (2.1, 2.1, 6.6), color=INK, lw=1.3)
    note(
        axes,
        3.5,
        9.6,
        "A gate sees only $t$, so all routing\nis known before the first block.",
        "left",
    )
    note(axes, 3.5, 8.3, "$t$ and the label also set shifts\nand scales of every block.", "left")


def draw_block(axes: Axes) -> None:
    """Draw one block: the mixture's mask splits the stream."""
    title(axes, "One block")
    arrow(axes, (2.8, -0.1), (2.8, 0.9))
    note(axes, 3.0, 0.3, "stream $x$", "left")
    box(axes, 0.0, 0.9, 5.6, 2.6, "", ORANGE)
    for k, number in enumerate("12E"):
        box(axes, 0.2 + 1.8 * k, 1.15, 1.6, 0.8, f"expert {number}", "white")
    note(axes, 2.8, 2.75, "mask  $m = 1 +$ weighted sum of\nthe $k$ experts that the gate chose")
    arrow(axes, (2.8, 3.5), (2.8, 4.6))
    note(axes, 3.0, 4.05, "$m \\cdot x$", "left")
    box(axes, 1.3, 4.6, 3.0, 0.9, "attention", BLUE)
    arrow(axes, (2.8, 5.5), (2.8, 6.1))
    box(axes, 1.3, 6.1, 3.0, 0.9, "MLP", BLUE)
    arrow(axes, (2.8, 7.0), (2.8, 8.1))
    axes.plot(2.8, 8.4, "o", ms=17, mfc="white", mec=INK)
    axes.plot(2.8, 8.4, "+", ms=9, color=INK)
    arrow(axes, (2.8, 8.7), (2.8, 9.8))
    arrow(axes, (5.0, 3.5), (5.0, 8.4), (3.15, 8.4))
    note(axes, 5.15, 6.0, "$(1-m) \\cdot x$\npasses by", "left")


def draw_prior(axes: Axes) -> None:
    """Draw the prior: the windows of timesteps that a loss pulls the gates towards."""
    prior = diffusion_prior(1000, depth=6, num_experts=3, top_k=2)  # (S, U)
    axes.imshow(prior.T, aspect="auto", cmap="Blues", vmin=0, vmax=1.6, interpolation="nearest")
    title(axes, "The prior")
    axes.set_xlabel("timestep: clean to noise", fontsize=9.5)
    axes.set_ylabel("experts of all blocks", fontsize=9.5)
    axes.set_yticks([])
    axes.tick_params(labelsize=8.5)


def draw_architecture() -> None:
    """Draw the architecture, from the paper's equations as the code has them."""
    figure = plt.figure(figsize=(12, 5.6), dpi=100)
    places = ((0.01, 0.40, (-0.3, 8.2)), (0.42, 0.31, (-0.2, 6.9)))
    for (left, width, limits), draw in zip(places, (draw_network, draw_block), strict=True):
        axes = figure.add_axes((left, 0.02, width, 0.91))
        axes.set(xlim=limits, ylim=(-0.2, 10.2))
        axes.axis("off")
        draw(axes)
    draw_prior(figure.add_axes((0.77, 0.36, 0.215, 0.57)))
    text = (
        "A loss pulls the gates towards this map.\nClean timesteps share all their experts;\n"
        "noisy ones share fewer and fewer."
    )
    figure.text(0.77, 0.23, text, va="top", color=INK, fontsize=9.5, linespacing=1.4)
    buffer = io.BytesIO()
    figure.savefig(buffer)
    plt.close(figure)
    save(Image.open(buffer), "architecture")


def show_samples(run_dir: Path) -> None:
    """Show the newest grid that training/sample.py has drawn."""
    grids = sorted(run_dir.glob("samples/*/grid.png"))
    assert grids, f"{run_dir} has no samples; run python training/sample.py {run_dir}"
    grid = Image.open(grids[-1])
    half = grid.height // 2  # one half of the classes beside the other: a wide picture
    wide = Image.new("RGB", (2 * grid.width + GAP, half), "white")
    wide.paste(grid.crop((0, 0, grid.width, half)), (0, 0))
    wide.paste(grid.crop((0, half, grid.width, 2 * half)), (grid.width + GAP, 0))
    save(wide, "samples")


def show_report(run_dir: Path) -> None:
    """Make the run's report; photograph its top and its picture of the experts."""
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "training/report.py", run_dir.resolve(), "--output", folder)
        with visit((Path(folder) / "report.html").as_uri()) as found:
            found.page.wait_for_function("() => [...document.images].every(i => i.complete)")
            save(Image.open(io.BytesIO(found.page.screenshot())), "report")
            experts = found.page.get_by_alt_text("Experts", exact=True)
            save(Image.open(io.BytesIO(experts.screenshot())), "experts")


def wait_for(address: str) -> None:
    """Wait until somebody answers at an address."""
    end = time.monotonic() + START_SEC
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(address, timeout=START_SEC).close()
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
        else:
            return
    raise TimeoutError(f"{address} does not answer")


def show_tensorboard(run_dir: Path) -> None:
    """Start TensorBoard on the run and photograph the page that it opens on."""
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run_dir)]
    server = subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/data/runs")
        with visit(f"http://127.0.0.1:{port}/#custom_scalars") as found:
            found.page.wait_for_timeout(15_000)  # charts are drawn after their numbers came
            save(Image.open(io.BytesIO(found.page.screenshot())), "tensorboard")
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    """Make one picture or all."""
    makers = {
        "architecture": lambda _: draw_architecture(),
        "samples": show_samples,
        "report": show_report,
        "tensorboard": show_tensorboard,
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, help="e.g. runs/demo")
    parser.add_argument("--only", choices=makers, help="make this picture")
    args = parser.parse_args()
    PICTURES.mkdir(exist_ok=True)
    for name, make in makers.items():
        if args.only in (None, name):
            make(args.run_dir)


if __name__ == "__main__":
    main()
