"""Pictures of what experts do, for TensorBoard and reports.

They are as wide as TensorBoard shows pictures, or it would leave out rows and columns of pixels,
and nobody could read the texts.

L blocks, E experts, S timesteps, B ranges of timesteps.
"""

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from training.sampling.image_files import font

MAP_ROW_PIXELS, MAP_GAP_PIXELS = 10, 4
MIN_ROW_PIXELS, MAP_PIXELS = 2, 1200  # many rows are narrower, so that maps are about so high
MAP_LEFT_PIXELS, MAP_BELOW_PIXELS = 58, 18  # room for the axes' texts
NO_SAMPLES_GREY = 128
GAP_COLOUR = (150, 170, 200)  # no value has it
MAX_COLUMNS = 280
HISTORY_ROW_PIXELS = 40
TEXT_SIZE = 11
AXIS_GREY = (150, 150, 150)
CELL_HEIGHT, CELL_WIDTH, MIN_CELL_WIDTH = 20, 46, 6  # of a table of experts, with its lines
TABLE_PIXELS = 736  # of a table's cells; more experts get narrower ones
HEAD_PIXELS = 18  # room for the experts' numbers
DIM, BRIGHT = 0.2, 0.66  # brightness of the smallest gates and of the largest
DARK = 0.4  # brightness below which a text is white
MARK_COLOUR = (86, 180, 233)
# Colours that stay apart for colour-blind eyes (Okabe and Ito, 2008); more experts repeat them.
PALETTE = np.array(
    [
        *((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66)),
        *((0, 114, 178), (213, 94, 0), (204, 121, 167), (90, 90, 90)),
    ],
    dtype=np.uint8,
)


def expert_map(gate_table: Tensor, top_k: int, max_columns: int = MAX_COLUMNS) -> np.ndarray:
    """Draw which experts serve which timestep: the paper's timestep-to-expert map.

    Args:
        gate_table: (L, S, E) gate probabilities.
        top_k: experts kept per timestep.
        max_columns: of the map; TensorBoard's pages have room for the default.

    Returns:
        (height, width, 3) uint8. One row per block and expert, the first block at the top, with
        timestep 0 (clean) on the left; brightness is the gate value of a chosen expert, black is
        an expert that the timestep does not meet. A column is the mean of neighbours if there are
        more than `max_columns`.
    """
    L, S, E = gate_table.shape
    table = gate_table.detach().float().cpu()
    chosen = torch.zeros_like(table).scatter_(2, table.topk(top_k, dim=2).indices, 1.0)
    brightness = (table * chosen).transpose(1, 2)  # (L, E, S)
    if max_columns < S:
        brightness = torch.nn.functional.adaptive_avg_pool1d(brightness, max_columns)
    height = _row_pixels(L * E)
    return _stacked(_warm(brightness.repeat_interleave(height, dim=1).numpy()), S)


def mark_timestep(picture: np.ndarray, timestep: int, num_timesteps: int) -> np.ndarray:
    """Return an expert map with a line through the column of a timestep."""
    marked, width = picture.copy(), picture.shape[1] - MAP_LEFT_PIXELS
    column = MAP_LEFT_PIXELS + timestep * width // num_timesteps
    marked[:-MAP_BELOW_PIXELS, max(column - 1, MAP_LEFT_PIXELS) : column + 2] = MARK_COLOUR
    return marked


def active_experts(expert_weight: Tensor) -> np.ndarray:
    """Draw which experts one timestep meets.

    Args:
        expert_weight: (L, E) gate values, zero where an expert is not chosen.

    Returns:
        (height, width, 3) uint8. A row per block and a column per expert; brighter is a larger gate
        value, relative to the largest, which is also written where there is room; black is an
        expert that is not met.
    """
    L, E = expert_weight.shape
    values = expert_weight.detach().float().cpu().numpy()
    brightness = (values > 0) * (DIM + (BRIGHT - DIM) * values / max(values.max(), 1e-9))
    colours = _warm(brightness)  # (L, E, 3)
    cell = max(MIN_CELL_WIDTH, min(CELL_WIDTH, TABLE_PIXELS // E))
    size = (MAP_LEFT_PIXELS + E * cell, HEAD_PIXELS + L * CELL_HEIGHT)
    canvas = Image.new("RGB", size, "white")
    draw, small = ImageDraw.Draw(canvas), font(TEXT_SIZE)
    draw.text((2, HEAD_PIXELS // 2), "expert", fill="black", font=small, anchor="lm")
    for expert in range(0, E, -(-CELL_WIDTH // cell)):  # as many numbers as fit side by side
        middle = MAP_LEFT_PIXELS + expert * cell + cell // 2
        draw.text((middle, HEAD_PIXELS // 2), f"{expert}", fill="black", font=small, anchor="mm")
    for block, name in enumerate(_block_names(L)):
        top = HEAD_PIXELS + block * CELL_HEIGHT
        middle = top + CELL_HEIGHT // 2
        draw.text((2, middle), name, fill="black", font=small, anchor="lm")
        for expert in range(E):
            left, value = MAP_LEFT_PIXELS + expert * cell, values[block, expert]
            corners = (left, top, left + cell - 2, top + CELL_HEIGHT - 2)
            draw.rectangle(corners, fill=tuple(colours[block, expert].tolist()))
            if value > 0 and cell == CELL_WIDTH:
                fill = "white" if brightness[block, expert] < DARK else "black"
                place = (left + cell // 2, middle)
                draw.text(place, f"{value:.2f}", fill=fill, font=small, anchor="mm")
    return np.asarray(canvas)


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
    height = _row_pixels(counts.shape[0] * counts.shape[1])
    rows = _warm(share.repeat_interleave(height, dim=1).numpy())  # (L, E * height, B, 3)
    rows[np.broadcast_to((total == 0).numpy(), rows.shape[:3])] = NO_SAMPLES_GREY
    width = min(num_timesteps, MAX_COLUMNS)
    return _stacked(rows[:, :, np.arange(width) * counts.shape[2] // width], num_timesteps)


def _row_pixels(num_rows: int) -> int:
    return min(MAP_ROW_PIXELS, max(MIN_ROW_PIXELS, MAP_PIXELS // num_rows))


def _warm(brightness: np.ndarray) -> np.ndarray:
    """Colour values in [0, 1] by a ramp from black through orange to white; adds a last axis."""
    ramp = [np.clip(brightness * 3.0 - shift, 0.0, 1.0) for shift in (0.0, 1.0, 2.0)]
    return np.round(np.stack(ramp, axis=-1) * 255.0).astype(np.uint8)


def _stacked(rows: np.ndarray, num_timesteps: int) -> np.ndarray:
    """Put the blocks' rows (L, height, width, 3) below one another, with gaps and axes."""
    L, height, width, _ = rows.shape
    blocks = np.full((L, height + MAP_GAP_PIXELS, width, 3), GAP_COLOUR, dtype=np.uint8)
    blocks[:, :height] = rows
    rows = blocks.reshape(-1, width, 3)
    return _with_axes(rows, _block_names(L), _timestep_ticks(num_timesteps))


def _block_names(num_blocks: int) -> list[str]:
    return [f"block {block}" for block in range(num_blocks)]


def _timestep_ticks(num_timesteps: int) -> list[str]:
    return [f"t = {tick * (num_timesteps - 1) // 4}" for tick in range(5)]


def _with_axes(rows: np.ndarray, names: list[str], ticks: list[str]) -> np.ndarray:
    """Name equal parts of the rows on the left, and equally spaced columns below them."""
    height, width, _ = rows.shape
    canvas = Image.new("RGB", (MAP_LEFT_PIXELS + width, height + MAP_BELOW_PIXELS), "white")
    canvas.paste(Image.fromarray(rows), (MAP_LEFT_PIXELS, 0))
    draw, small = ImageDraw.Draw(canvas), font(TEXT_SIZE)
    # Else nobody would see where a map ends that is white, as its page is.
    corner = (MAP_LEFT_PIXELS - 1, height)
    draw.line([(corner[0], 0), corner, (canvas.width, height)], fill=AXIS_GREY)
    for i, name in enumerate(names):
        middle = (i + 0.5) * height / len(names) - MAP_GAP_PIXELS / 2
        draw.text((2, middle), name, fill="black", font=small, anchor="lm")
    last = len(ticks) - 1
    for i, tick in enumerate(ticks):
        anchor = "la" if i == 0 else "ra" if i == last else "ma"
        place = (MAP_LEFT_PIXELS + i * (width - 1) // last, height + 2)
        draw.text(place, tick, fill="black", font=small, anchor=anchor)
    return np.asarray(canvas)


def affinity_map(gate_table: Tensor, top_k: int) -> np.ndarray:
    """Draw which tasks share experts: timesteps against timesteps, both with 0 (clean) first.

    Args:
        gate_table: (L, S, E) gate probabilities.
        top_k: experts kept per timestep.

    Returns:
        (height, width, 3) uint8; the brightness is the share of chosen experts that two timesteps
        have in common, as the mean over blocks: white = all, black = none.
    """
    L, S, E = gate_table.shape
    places = torch.linspace(0, S - 1, min(S, MAX_COLUMNS)).round().long()
    table = gate_table.detach().float().cpu()[:, places]
    chosen = torch.zeros_like(table).scatter_(2, table.topk(top_k, dim=2).indices, 1.0)
    share = (chosen @ chosen.transpose(1, 2)).mean(dim=0) / top_k
    names = ["t = 0", "", "", "", f"t = {S - 1}"]
    return _with_axes(_warm(share.numpy()), names, _timestep_ticks(S))


def load_history(loads: np.ndarray, steps: list[int]) -> np.ndarray:
    """Draw how the samples of each block have spread over its experts, from the beginning on.

    Args:
        loads: (intervals, L, E) fractions of samples that the experts received.
        steps: (intervals,) that the intervals ended with.

    Returns:
        (height, width, 3) uint8. A band per block, time from left to right; in a column the
        experts' shares lie on one another, the first expert at the top, in the palette's colours.
    """
    _, L, E = loads.shape
    columns = np.linspace(0, len(steps) - 1, MAX_COLUMNS).round().astype(int)
    share = loads / loads.sum(axis=2, keepdims=True)  # (intervals, L, E)
    ends = np.cumsum(share, axis=2)[columns].transpose(1, 0, 2)  # (L, width, E)
    middles = (np.arange(HISTORY_ROW_PIXELS) + 0.5) / HISTORY_ROW_PIXELS  # (height,)
    expert = (middles[None, :, None, None] > ends[:, None]).sum(axis=3)  # (L, height, width)
    bands = PALETTE[np.minimum(expert, E - 1) % len(PALETTE)]  # rounding may leave a sum below 1
    gap = np.full((L, MAP_GAP_PIXELS, MAX_COLUMNS, 3), 255, dtype=np.uint8)
    rows = np.concatenate((bands, gap), axis=1).reshape(-1, MAX_COLUMNS, 3)
    ticks = [f"{steps[tick * (len(steps) - 1) // 4]:,}" for tick in range(5)]
    return _with_axes(rows, _block_names(L), ticks)
