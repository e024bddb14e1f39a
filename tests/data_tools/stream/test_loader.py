"""The stream of batches: the same samples whatever the ranks, exact resume, failures reported."""

import dataclasses
import os
import threading
from itertools import islice

import numpy as np
import pytest
import torch

import data_tools.stream.reader
from data_tools.errors import ConfigError
from data_tools.stream.loader import LatentStream
from data_tools.stream.order import StreamOrder
from data_tools.stream.reader import SampleReader
from data_tools.stream.shard_feed import NUM_THREADS
from models.randomness import Stream, uniform
from tests.support.launch import run
from tests.support.synthetic import SHAPE, data_of, make_dataset

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
    with LatentStream(data_of(manifest), **(settings | changes)) as stream:
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
            start = rank * (G // world_size) + micro_step * micro_batch_size
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
    with pytest.raises(ConfigError, match="^--horizontal-flip: .* holds no latents of mirr"):
        batches(manifest, 1, horizontal_flip=True)
    assert len(batches(manifest, 2)) == 2


@pytest.mark.parametrize("limit", ["window", "system"])
def test_few_files_are_open_at_a_time(tmp_path, monkeypatch, limit):
    sizes = [3] * 90
    window = 5 if limit == "window" else 80
    if limit == "system":
        monkeypatch.setattr(data_tools.stream.reader, "_allowed_descriptors", lambda wanted: 5)
    data = data_of(make_dataset(tmp_path, sizes))
    settings = {"seed": SEED, "window": window, "global_batch_size": 30, "micro_batch_size": 30}
    with LatentStream(data, rank=0, world_size=1, horizontal_flip=False, **settings) as stream:
        ids = []
        for _ in range(18):
            ids.append(sample_ids(next(stream)))
            assert len(stream.batches.reader.opened) <= (5 if limit == "system" else 3 * window)
    expected = StreamOrder(sizes, SEED, window).sample_ids(0, 540)
    np.testing.assert_array_equal(np.concatenate(ids), expected)


@pytest.mark.processes
def test_more_shards_than_a_process_may_open_by_default_are_shuffled_together(tmp_path):
    """A window of 100 shards where the system allows 300 files, and more if asked."""
    script = (
        "import resource, sys\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))\n"
        "from data_tools.stream.loader import LatentStream\n"
        "from data_tools.stream.training_data import open_data\n"
        "stream = LatentStream(open_data(sys.argv[1]), seed=0, window=100, global_batch_size=100,\n"
        "    micro_batch_size=100, rank=0, world_size=1)\n"
        "next(stream)\n"
        "print(len(stream.batches.reader.opened))\n"
        "stream.close()\n"
    )
    make_dataset(tmp_path, [1] * 120)
    assert int(run("python", "-c", script, tmp_path)) > 50


def settings(**changes):
    return {
        "seed": 0,
        "window": 1,
        "global_batch_size": 5,
        "micro_batch_size": 5,
        "rank": 0,
        "world_size": 1,
    } | changes


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-512]), "has 9728 bytes"),
        (lambda path: path.write_bytes(b"\1" * 10240), "its sha256 is not"),
    ],
)
def test_a_failure_in_a_thread_reaches_the_consumer_each_time(tmp_path, damage, what):
    data = data_of(make_dataset(tmp_path, [3, 2]))
    damage(tmp_path / "00001.tar")
    with LatentStream(data, **settings()) as stream:
        for _ in range(2):
            with pytest.raises(ConfigError, match=rf"00001\.tar: {what}"):
                next(stream)


def test_a_label_beyond_the_classes_of_the_data_set_is_refused(tmp_path):
    data = data_of(make_dataset(tmp_path, [6], num_classes=3))
    part = dataclasses.replace(data.parts[0], class_of_label=np.arange(2))
    fewer = dataclasses.replace(data, parts=(part,))
    reader = SampleReader(fewer, fewer.stores("size", None))
    out = torch.empty((6, *SHAPE), dtype=torch.float16)
    with pytest.raises(ConfigError, match=r"00000\.tar: holds label 2, .* labels below 2"):
        reader.read(np.arange(6), np.zeros(6, bool), out)
    reader.close()


def test_reads_that_return_less_than_asked_for_are_continued(tmp_path, monkeypatch):
    """As file systems in user space do."""
    manifest, preadv = make_dataset(tmp_path, [6]), os.preadv

    def short(descriptor, buffers, offset):
        (first, *_) = [buffer for buffer in buffers if len(buffer)]
        return preadv(descriptor, [memoryview(first)[:100]], offset)

    expected = batches(manifest, 1, horizontal_flip=True)
    monkeypatch.setattr(os, "preadv", short)
    found = batches(manifest, 1, horizontal_flip=True)
    assert torch.equal(found[0].raw_latents, expected[0].raw_latents)
    assert torch.equal(found[0].labels, expected[0].labels)


@pytest.mark.parametrize("num_streams", [1, 2, 4])
def test_streams_and_ranks_read_what_the_plan_says(manifest, num_streams):
    data = data_of(manifest)
    plan = data.plan(seed=SEED, window=WINDOW, global_batch_size=24, num_streams=num_streams)
    expected = plan.sample_ids(0, 24 * 20)
    for world_size, micro_batch_size in ((1, 24), (2, 4), (4, 6), (8, 3)):
        ids, positions = job(manifest, 0, 20, world_size, micro_batch_size, num_streams=num_streams)
        assert positions.ravel().tolist() == list(range(24 * 20))
        np.testing.assert_array_equal(ids.ravel(), expected)


def test_closing_stops_the_threads_and_may_be_repeated(manifest):
    before = threading.active_count()
    ranks = {"rank": 1, "world_size": 2, "global_batch_size": 8, "micro_batch_size": 4}
    stream = LatentStream(data_of(manifest), **settings(window=2, **ranks))
    next(stream)
    assert threading.active_count() == before + 1 + NUM_THREADS
    assert stream.wait_sec > 0
    stream.close()
    stream.close()
    assert threading.active_count() == before
    assert not stream.batches.reader.opened
