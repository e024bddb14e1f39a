"""Draw what scaling.py predicts: images per second over GPUs, and where the time of a step goes."""

import math

import numpy as np

from benchmarks.cost_model import Prediction
from training.monitoring.charts import COLOURS as PALETTE
from training.monitoring.charts import new_figure, pixels_of

WIDTH, HEIGHT = 1360, 600
COLOURS = {
    "products": "#1f5fa8",
    "imbalance": "#e4572e",
    "memory-bound": "#76b7e5",
    "launching": "#b7b7b7",
    "all-to-all": "#f2a541",
    "gradients": "#3f9b5a",
    "weights": "#9ed3a0",
    "optimizer": "#8c6bb1",
}


def draw_scaling(best: list[Prediction], title: str) -> np.ndarray:
    """Draw the best layouts of some numbers of ranks.

    Args:
        best: one prediction for each number of ranks, ascending.
        title: of the picture.

    Returns:
        (height, width, 3) uint8.
    """
    figure = new_figure(WIDTH, HEIGHT, layout="constrained")
    figure.suptitle(title, fontsize=15)
    speed, shares = figure.subplots(1, 2, width_ratios=(11, 8))
    counts = [prediction.layout.world_size for prediction in best]
    speeds = [prediction.images_per_sec for prediction in best]
    ideal = [speeds[0] * count / counts[0] for count in counts]
    speed.loglog(counts, ideal, "--", color="0.6", label="perfect scaling")
    speed.loglog(counts, speeds, "-o", color=PALETTE[0], linewidth=2, label="images per second")
    for count, value, prediction in zip(counts, speeds, best, strict=True):
        layout = prediction.layout
        is_parallel = layout.expert_parallel_size > 1
        label = f"Z{layout.stage}" + f" EP{layout.expert_parallel_size}" * is_parallel
        place = {"xytext": (4, -4), "textcoords": "offset points", "va": "top"}
        speed.annotate(label, (count, value), fontsize=9, **place)
    speed.set_xticks(counts, counts, minor=False)
    speed.minorticks_off()
    speed.yaxis.set_major_formatter("{x:,g}")
    speed.margins(x=0.1)
    low, high = min(speeds), max(*ideal, *speeds)
    speed.set_ylim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(1.01 * high)))
    speed.grid(color="0.9")
    speed.set_xlabel("GPUs (Z: ZeRO stage, EP: expert-parallel size)")
    speed.legend(frameon=False, loc="upper left")
    names, level = [str(count) for count in counts], np.zeros(len(best))
    for part, colour in COLOURS.items():
        percent = [100 * each.parts.get(part, 0.0) / each.sec for each in best]
        shares.bar(names, percent, 0.7, level, color=colour, label=part)
        level += percent
    shares.set(ylim=(0, 100), xlabel="GPUs", title="share of a step")
    shares.yaxis.set_major_formatter("{x:.0f} %")
    shares.legend(reverse=True, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return pixels_of(figure)
