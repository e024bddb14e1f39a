"""What pictures show, against tables whose content is known."""

import numpy as np
import torch

from training.monitoring.expert_pictures import (
    CELL_HEIGHT,
    CELL_WIDTH,
    HEAD_PIXELS,
    HISTORY_ROW_PIXELS,
    MAP_BELOW_PIXELS,
    MAP_GAP_PIXELS,
    MAP_LEFT_PIXELS,
    MAP_ROW_PIXELS,
    MARK_COLOUR,
    MAX_COLUMNS,
    PALETTE,
    TABLE_PIXELS,
    active_experts,
    affinity_map,
    expert_map,
    load_history,
    load_map,
    mark_timestep,
)


def test_the_expert_map_shows_chosen_experts_only():
    gate_table = torch.zeros(2, 4, 3)
    gate_table[..., 0] = 0.6
    gate_table[..., 1] = 0.3
    gate_table[..., 2] = 0.1

    picture = expert_map(gate_table, top_k=2)

    rows = picture[:-MAP_BELOW_PIXELS, MAP_LEFT_PIXELS:].reshape(2, -1, 4, 3)
    assert picture.dtype == np.uint8
    assert (rows[:, 0] > rows[:, MAP_ROW_PIXELS]).any(), "a larger gate value is brighter"
    assert (rows[:, 2 * MAP_ROW_PIXELS] == 0).all(), "an expert outside the top k is black"


def test_a_timestep_is_marked_in_its_column_only():
    picture = expert_map(torch.full((2, 9, 3), 1 / 3), top_k=2)

    marked = mark_timestep(picture, 5, 9)

    changed = (marked != picture).any(axis=2)
    assert changed.any(axis=0).nonzero()[0].tolist() == [MAP_LEFT_PIXELS + i for i in (4, 5, 6)]
    assert (marked[0, MAP_LEFT_PIXELS + 5] == MARK_COLOUR).all()
    ends = [mark_timestep(picture, t, 9).shape for t in (0, 8)]
    assert ends == [picture.shape] * 2


def test_a_timestep_is_marked_where_several_share_a_column():
    picture = expert_map(torch.full((2, 1000, 3), 1 / 3), top_k=2)

    changed = (mark_timestep(picture, 999, 1000) != picture).any(axis=2)

    assert changed.any(axis=0).nonzero()[0].max() == MAP_LEFT_PIXELS + MAX_COLUMNS - 1


def test_the_table_of_a_timestep_shows_its_experts():
    weight = torch.zeros(2, 3)
    weight[0, 0], weight[0, 2], weight[1, 1] = 0.6, 0.05, 0.3

    picture = active_experts(weight).astype(int)

    corners = picture[HEAD_PIXELS + 1 :: CELL_HEIGHT, MAP_LEFT_PIXELS + 1 :: CELL_WIDTH].sum(axis=2)
    assert ((corners == 0).tolist()) == (weight == 0).tolist(), "black is an expert not met"
    assert corners[0, 0] > corners[1, 1] > corners[0, 2], "a larger gate is brighter"


def test_a_table_of_many_experts_stays_narrow():
    weight = torch.zeros(1, 100)
    weight[0, 99] = 0.5

    picture = active_experts(weight)

    assert picture.shape[1] <= MAP_LEFT_PIXELS + TABLE_PIXELS
    cell = TABLE_PIXELS // 100
    corners = picture[HEAD_PIXELS + 1, MAP_LEFT_PIXELS + 1 :: cell].astype(int).sum(axis=1)
    assert corners[:99].max() == 0 < corners[99]


def test_the_load_map_shows_the_share_of_each_range_of_timesteps():
    counts = torch.zeros(2, 3, 4)
    counts[0, :, 0] = torch.tensor([6.0, 2.0, 0.0])
    counts[1, 2, 3] = 5.0

    picture = load_map(counts, num_timesteps=8)

    rows = picture[:-MAP_BELOW_PIXELS, MAP_LEFT_PIXELS:].reshape(2, -1, 8, 3).astype(int)
    first, second, third = (rows[0, e * MAP_ROW_PIXELS, :2].sum() for e in range(3))
    assert first > second > third == 0, "a larger share is brighter"
    assert (rows[0, : 3 * MAP_ROW_PIXELS, 2:] == 128).all(), "no sample in these ranges: grey"
    assert (rows[1, 2 * MAP_ROW_PIXELS, 6:] == 255).all()


def test_the_affinity_map_is_white_where_timesteps_share_all_experts():
    S = 8
    gate_table = torch.zeros(2, S, 4)
    gate_table[:, : S // 2, :2] = 0.5  # the clean half has experts 0 and 1 in both blocks
    gate_table[0, S // 2 :, 2:] = 0.5  # the noisy half has others in one block
    gate_table[1, S // 2 :, 1:3] = 0.5  # and one of them in the other

    picture = affinity_map(gate_table, top_k=2)

    cells = picture[:S, MAP_LEFT_PIXELS : MAP_LEFT_PIXELS + S]
    assert (cells[: S // 2, : S // 2] == 255).all()
    assert (cells[S // 2 :, S // 2 :] == 255).all()
    other = cells[: S // 2, S // 2 :].reshape(-1, 3)
    assert (other == other[0]).all()
    assert tuple(other[0]) == (191, 0, 0), "a quarter in common: (0 + 1/2) / 2"


def test_pictures_are_no_wider_than_tensorboard_shows_them():
    gates = torch.zeros(1, 1000, 4)
    gates[0, :500, 1] = gates[0, 500:, 2] = 1.0
    maps = expert_map(gates, 1), load_map(torch.ones(1, 4, 10), 1000), affinity_map(gates, 1)

    assert {picture.shape[1] for picture in maps} == {MAP_LEFT_PIXELS + MAX_COLUMNS}
    rows = maps[0][:, MAP_LEFT_PIXELS:, 0] > 0
    half = MAX_COLUMNS // 2
    assert rows[MAP_ROW_PIXELS].nonzero()[0].tolist() == list(range(half))
    assert rows[2 * MAP_ROW_PIXELS].nonzero()[0].tolist() == list(range(half, MAX_COLUMNS))
    assert maps[2].shape[0] == MAX_COLUMNS + MAP_BELOW_PIXELS


def test_maps_of_many_experts_have_narrower_rows():
    tall = expert_map(torch.rand(28, 10, 16), 2)

    assert tall.shape[0] == 28 * (16 * 2 + MAP_GAP_PIXELS) + MAP_BELOW_PIXELS
    assert load_map(torch.ones(28, 16, 10), 10).shape == tall.shape


def test_the_load_history_stacks_shares_from_the_first_interval_to_the_last():
    loads = np.zeros((2, 1, 3))
    loads[0, 0] = 1.0, 0.5, 0.5
    loads[1, 0] = 0.0, 0.0, 2.0

    picture = load_history(loads, [10, 20])

    band = picture[:HISTORY_ROW_PIXELS, MAP_LEFT_PIXELS : MAP_LEFT_PIXELS + MAX_COLUMNS]
    expected = np.repeat([0, 1, 2], np.array([2, 1, 1]) * HISTORY_ROW_PIXELS // 4)
    assert (band[:, 0] == PALETTE[expected]).all()
    assert (band[:, -1] == PALETTE[2]).all()
    assert (picture[HISTORY_ROW_PIXELS : HISTORY_ROW_PIXELS + MAP_GAP_PIXELS, -1] == 255).all()
