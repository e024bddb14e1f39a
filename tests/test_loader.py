"""The stream of batches: the same samples whatever the ranks, exact resume, failures reported."""

import dataclasses
import threading
from itertools import islice

import numpy as np
import pytest
import torch

import data_tools.loader
from data_tools.errors import ConfigError
from data_tools.loader import LatentStream, SampleReader
from data_tools.order import StreamOrder
from models.randomness import Stream, uniform
from tests.synthetic import SHAPE, make_dataset

SHARD_SIZES = [13, 40, 27, 5, 0, 31, 8, 22]
N = sum(SHARD_SIZES)
SEED, WINDOW = 11, 3


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("synthetic"), SHARD_SIZES)


def batches(manifest, count, **changes):
    settings = {
        "seed": SEED,
        "window": WINDOW,
        "global_batch_size": 24,
        "micro_batch_size": 24,
        "rank": 0,
        "world_size": 1,
        "horizontal_flip": False,
    }
    with LatentStream(manifest, **(settings | changes)) as stream:
        return list(islice(stream, count))


def sample_ids(batch):
    return batch.raw_latents[:, 0, 0, 0].long().tolist()


def job(manifest, start_step, num_steps, world_size, micro_batch_size, G=24, **changes):
    """Run all ranks of a job; return the global batches it consumed and their positions."""
    accumulation = G // (world_size * micro_batch_size)
    ids, positions = np.zeros((2, num_steps, G), int)
    for rank in range(world_size):
        read = batches(
            manifest,
            num_steps * accumulation,
            global_batch_size=G,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
            start_position=start_step * G,
            **changes,
        )
        for number, batch in enumerate(read):
            step, micro_step = divmod(number, accumulation)
            start = (micro_step * world_size + rank) * micro_batch_size
            ids[step, start : start + micro_batch_size] = sample_ids(batch)
            positions[step, start : start + micro_batch_size] = batch.positions
    return ids, positions


@pytest.mark.parametrize(
    ("world_size", "micro_batch_size"), [(1, 24), (1, 1), (2, 12), (2, 3), (3, 8), (4, 2), (8, 3)]
)
def test_the_stream_is_the_same_for_any_number_of_ranks(manifest, world_size, micro_batch_size):
    num_steps = 14  # 336 samples: more than two epochs of 146, and no multiple of them
    ids, positions = job(manifest, 0, num_steps, world_size, micro_batch_size)
    assert positions.ravel().tolist() == list(range(num_steps * 24))
    expected = StreamOrder(SHARD_SIZES, SEED, WINDOW).sample_ids(0, num_steps * 24)
    np.testing.assert_array_equal(ids.ravel(), expected)
    for epoch in range(2):
        assert sorted(ids.ravel()[epoch * N : (epoch + 1) * N]) == list(range(N))


@pytest.mark.parametrize("stop", [1, 5, 6, 7, 13])
def test_resuming_at_any_step_equals_an_uninterrupted_run(manifest, stop):
    expected, _ = job(manifest, 0, 16, world_size=2, micro_batch_size=6)
    first, _ = job(manifest, 0, stop, world_size=2, micro_batch_size=6)
    second, _ = job(manifest, stop, 16 - stop, world_size=2, micro_batch_size=6)
    np.testing.assert_array_equal(np.concatenate([first, second]), expected)


def test_the_number_of_ranks_may_change_at_every_resume(manifest):
    expected, _ = job(manifest, 0, 16, world_size=1, micro_batch_size=24)
    parts = [(0, 4, 4, 2), (4, 5, 6, 4), (9, 1, 1, 8), (10, 6, 8, 1)]
    found = [job(manifest, *part)[0] for part in parts]
    np.testing.assert_array_equal(np.concatenate(found), expected)


def test_a_global_batch_may_be_larger_than_the_data_set(tmp_path):
    manifest = make_dataset(tmp_path, [3, 2])
    (batch,) = batches(manifest, 1, global_batch_size=12, micro_batch_size=12)
    ids = sample_ids(batch)
    assert sorted(ids[:5]) == sorted(ids[5:10]) == [0, 1, 2, 3, 4]


def test_a_batch_holds_what_its_types_say(manifest):
    (batch,) = batches(manifest, 1)
    assert batch.raw_latents.shape == (24, 8, 4, 4)
    assert batch.raw_latents.dtype == torch.float16
    assert batch.raw_latents.is_contiguous()
    assert batch.labels.dtype == batch.positions.dtype == torch.int64
    assert batch.labels.tolist() == [sample % 3 for sample in sample_ids(batch)]
    assert (batch.raw_latents == batch.raw_latents[:, :1, :1, :1]).all()  # no mixed samples


def test_flips_follow_the_stream_position(manifest):
    plain = batches(manifest, 10)
    flipped = batches(manifest, 10, horizontal_flip=True)
    drawn = uniform(SEED, Stream.FLIP, torch.arange(240), 1)[:, 0] < 0.5
    assert 80 < drawn.sum() < 160
    for one, other in zip(plain, flipped, strict=True):
        is_flip = drawn[one.positions]
        expected = torch.where(
            is_flip[:, None, None, None], -(one.raw_latents + 1), one.raw_latents
        )
        assert torch.equal(other.raw_latents, expected)
        assert torch.equal(other.labels, one.labels)


def test_flips_without_mirrored_latents_are_refused(tmp_path):
    manifest = make_dataset(tmp_path, [3], has_flip=False)
    with pytest.raises(ConfigError, match="^--horizontal-flip true: .* holds no latents of mirr"):
        batches(manifest, 1, horizontal_flip=True)
    assert len(batches(manifest, 2)) == 2


def test_few_files_are_open_at_a_time(manifest, monkeypatch):
    monkeypatch.setattr(data_tools.loader, "MAX_OPEN_SHARDS", 2)
    with LatentStream(
        manifest,
        seed=SEED,
        window=8,
        global_batch_size=50,
        micro_batch_size=50,
        rank=0,
        world_size=1,
        horizontal_flip=False,
    ) as stream:
        ids = [sample_ids(next(stream)) for _ in range(6)]
        assert len(stream.reader._descriptors) <= 2
    expected = StreamOrder(SHARD_SIZES, SEED, 8).sample_ids(0, 300)
    np.testing.assert_array_equal(np.concatenate(ids), expected)


def test_a_failure_in_the_thread_reaches_the_consumer_each_time(tmp_path):
    manifest = make_dataset(tmp_path, [3, 2])
    (tmp_path / "00001.tar").unlink()
    stream = LatentStream(
        manifest,
        seed=0,
        window=1,
        global_batch_size=5,
        micro_batch_size=5,
        rank=0,
        world_size=1,
    )
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"00001\.tar: cannot be read"):
            next(stream)
    stream.close()


def test_a_label_beyond_the_classes_of_the_data_set_is_refused(tmp_path):
    manifest = make_dataset(tmp_path, [6], num_classes=3)
    fewer = dataclasses.replace(manifest, classes=manifest.classes[:2])
    reader = SampleReader(fewer)
    out = torch.empty((6, *SHAPE), dtype=torch.float16)
    with pytest.raises(ConfigError, match=r"00000\.tar: holds label 2, .* labels below 2"):
        reader.read(np.arange(6), np.zeros(6, bool), out)
    reader.close()


def test_closing_stops_the_thread_and_may_be_repeated(manifest):
    before = threading.active_count()
    stream = LatentStream(
        manifest, seed=0, window=2, global_batch_size=8, micro_batch_size=4, rank=1, world_size=2
    )
    next(stream)
    assert threading.active_count() == before + 1
    assert stream.wait_sec > 0
    stream.close()
    stream.close()
    assert threading.active_count() == before
    assert not stream.reader._descriptors
