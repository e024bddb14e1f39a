"""Where metrics and pictures go: TensorBoard and metrics.jsonl, from rank 0 only."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from data_tools.files import append_whole, replace_file
from training.expert_load import by_block

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"
MAX_EVENTS_BYTES = 64 << 20  # of one of TensorBoard's files; then the next one is begun
MAX_LOAD_TAGS = 512  # TensorBoard gets slow with thousands; beyond, it has a histogram per block
MAP_ROW_PIXELS, MAP_GAP_PIXELS = 10, 4
MAP_LEFT_PIXELS, MAP_BELOW_PIXELS = 58, 18  # room for the axes' texts
NO_SAMPLES_GREY = 128


class Monitor:
    """Write metrics under the same names to TensorBoard and to metrics.jsonl.

    Args:
        run_dir: None on ranks that write nothing; every method is then a no-op.
        resume_step: steps already done; records of later steps, left by a run that died after its
            last checkpoint, are dropped from both places.
    """

    def __init__(self, run_dir: Path | None, resume_step: int = 0) -> None:
        self._writer, self._lines, self._has_warned = None, None, False
        if run_dir is None:
            return
        path = run_dir / METRICS_FILE
        _drop_later_records(path, resume_step)
        self._lines = path.open("ab", buffering=0)
        self._folder = run_dir / TENSORBOARD_DIR
        self._writer = SummaryWriter(str(self._folder), purge_step=resume_step + 1)

    def scalars(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of one logging interval that ended with `step`."""
        if self._writer is None:
            return
        with self.surviving_disk_errors():
            append_whole(self._lines, json.dumps({"step": step} | metrics))
        with self.surviving_disk_errors():
            loads = by_block(metrics)
            if sum(map(len, loads.values())) <= MAX_LOAD_TAGS:
                loads = {}
            for name, values in loads.items():
                self._writer.add_histogram(name, np.array(values), step)
            for name, value in metrics.items():
                if name.rpartition("/")[0] not in loads:
                    self._writer.add_scalar(name, value, step)
            self._writer.flush()
            if _newest_size(self._folder) > MAX_EVENTS_BYTES:
                self._writer.close()
                self._writer = SummaryWriter(str(self._folder))

    def timing(self, step: int, name: str, seconds: float) -> None:
        """Record how long something took that is no part of the training: TensorBoard only."""
        if self._writer is not None:
            with self.surviving_disk_errors():
                self._writer.add_scalar(name, seconds, step)

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Record a picture, (H, W, 3) uint8."""
        if self._writer is not None:
            with self.surviving_disk_errors():
                self._writer.add_image(name, picture, step, dataformats="HWC")

    def text(self, name: str, text: str, step: int | None = None) -> None:
        """Record a text, shown as preformatted."""
        if self._writer is not None:
            indented = "\n".join(f"    {line}" for line in text.splitlines())
            with self.surviving_disk_errors():
                self._writer.add_text(name, indented, step)

    def event(self, step: int, text: str) -> None:
        """Record something out of the ordinary that happened at a step."""
        self.text("events", text, step)

    def close(self) -> None:
        """Flush and close both files."""
        if self._writer is not None:
            with self.surviving_disk_errors():
                self._writer.close()
            self._lines.close()

    @contextmanager
    def surviving_disk_errors(self) -> Iterator[None]:
        """Lose a record rather than the training; say so once."""
        try:
            yield
        except OSError as err:
            if not self._has_warned:
                sys.stderr.write(
                    f"warning: metrics or pictures could not be written ({err.strerror or err}); "
                    "training goes on without them, TensorBoard shows no more until a restart.\n"
                )
            self._has_warned = True


def _newest_size(folder: Path) -> int:
    """Return the bytes of the file that TensorBoard's writer writes."""
    return max((file.stat() for file in folder.iterdir()), key=lambda s: s.st_mtime_ns).st_size


def _drop_later_records(path: Path, resume_step: int) -> None:
    """Keep the complete records up to `resume_step`; a torn last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="ascii").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > resume_step:
            break
        kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="ascii")
    os.replace(temporary, path)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read the records of a run, one dict per logging interval."""
    with (run_dir / METRICS_FILE).open(encoding="ascii") as lines:
        return [json.loads(line) for line in lines]


def expert_map(gate_table: Tensor, top_k: int) -> np.ndarray:
    """Draw which experts serve which timestep: the paper's timestep-to-expert map.

    Args:
        gate_table: (L, S, E) gate probabilities.
        top_k: experts kept per timestep.

    Returns:
        (height, width, 3) uint8. One row per block and expert, the first block at the top, with
        timestep 0 (clean) on the left; brightness is the gate value of a chosen expert, black is
        an expert that the timestep does not meet.
    """
    L, S, E = gate_table.shape
    table = gate_table.detach().float().cpu()
    chosen = torch.zeros_like(table).scatter_(2, table.topk(top_k, dim=2).indices, 1.0)
    brightness = (table * chosen).transpose(1, 2).repeat_interleave(MAP_ROW_PIXELS, dim=1)
    return _stacked(_warm(brightness.numpy()))


def load_map(counts: Tensor, num_timesteps: int) -> np.ndarray:
    """Draw how the samples of each range of timesteps spread over the experts.

    Args:
        counts: (L, E, B) samples of each block, expert and range.
        num_timesteps: S.

    Returns:
        A picture as of `expert_map`; brightness is the share of a range's samples that met the
        expert, relative to the largest share in the picture. A range without samples is grey.
    """
    total = counts.sum(dim=1, keepdim=True)  # (L, 1, B)
    share = counts / total.clamp(min=1)
    share = share / share.max().clamp(min=1e-9)
    rows = _warm(share.repeat_interleave(MAP_ROW_PIXELS, dim=1).numpy())  # (L, E * pixels, B, 3)
    rows[np.broadcast_to((total == 0).numpy(), rows.shape[:3])] = NO_SAMPLES_GREY
    return _stacked(rows[:, :, np.arange(num_timesteps) * counts.shape[2] // num_timesteps])


def _warm(brightness: np.ndarray) -> np.ndarray:
    """Colour values in [0, 1] by a ramp from black through orange to white; adds a last axis."""
    ramp = [np.clip(brightness * 3.0 - shift, 0.0, 1.0) for shift in (0.0, 1.0, 2.0)]
    return np.round(np.stack(ramp, axis=-1) * 255.0).astype(np.uint8)


def _stacked(rows: np.ndarray) -> np.ndarray:
    """Put the blocks' rows (L, height, width, 3) below one another, with gaps and axes."""
    L, height, width, _ = rows.shape
    blocks = np.full((L, height + MAP_GAP_PIXELS, width, 3), 255, dtype=np.uint8)
    blocks[:, :height] = rows
    return _with_axes(blocks.reshape(-1, width, 3), L)


def _with_axes(rows: np.ndarray, num_blocks: int) -> np.ndarray:
    """Name the blocks on the left of the rows, and timesteps below them."""
    height, S, _ = rows.shape
    canvas = Image.new("RGB", (MAP_LEFT_PIXELS + S, height + MAP_BELOW_PIXELS), "white")
    canvas.paste(Image.fromarray(rows), (MAP_LEFT_PIXELS, 0))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=12)
    for block in range(num_blocks):
        middle = (block + 0.5) * height / num_blocks - MAP_GAP_PIXELS / 2
        draw.text((2, middle), f"block {block}", fill="black", font=font, anchor="lm")
    for tick in range(5):
        t = tick * (S - 1) // 4
        anchor = "la" if tick == 0 else "ra" if tick == 4 else "ma"
        draw.text(
            (MAP_LEFT_PIXELS + t, height + 2), f"t = {t}", fill="black", font=font, anchor=anchor
        )
    return np.asarray(canvas)


def save_png(path: Path, picture: np.ndarray) -> None:
    """Write a picture (H, W, 3) uint8 whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda file: Image.fromarray(picture).save(file, format="PNG"))
