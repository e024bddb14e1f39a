"""Grids of samples: every image, and labels that can be read."""

import numpy as np

from training.sampling.image_files import image_grid


def test_a_grid_holds_every_image_and_pads_the_last_row():
    pixels = np.stack([np.full((4, 4, 3), value, dtype=np.uint8) for value in (10, 20, 30)])

    grid = image_grid(pixels, columns=2)

    for value in (10, 20, 30):
        assert (grid == value).all(axis=-1).sum() == 16
    assert grid.shape[0] < grid.shape[1] * 2


def test_labels_take_a_line_above_each_row():
    pixels = np.zeros((2, 16, 16, 3), dtype=np.uint8)

    plain, labelled = (
        image_grid(pixels, columns=1, row_labels=labels) for labels in (None, ["cat", "dog"])
    )

    assert labelled.shape[0] > plain.shape[0]
    assert labelled.shape[1] == plain.shape[1]


def test_labels_show_letters_beyond_ascii():
    pixels = np.zeros((1, 16, 16, 3), dtype=np.uint8)

    grids = [image_grid(pixels, columns=1, row_labels=[name]) for name in "ÄßЖ"]

    assert len({grid.tobytes() for grid in grids}) == 3, "a missing letter is always the same box"
