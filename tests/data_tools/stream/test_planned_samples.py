"""The planned order inside webdataset: the stream that training reads, with or without workers."""

from itertools import islice

import numpy as np
import pytest
import torch
import webdataset as wds

from data_tools.stream.loader import LatentStream
from data_tools.stream.webdataset_stage import PlannedSamples
from tests.support.synthetic import data_of, make_dataset

SETTINGS = {"seed": 5, "window": 3, "check": "size"}
BATCH, NUM_BATCHES = 6, 20


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return data_of(make_dataset(tmp_path_factory.mktemp("planned"), [13, 40, 7, 0, 25]))


def expected(data, **ranks):
    ranks = {"rank": 0, "world_size": 1, "global_batch_size": BATCH} | ranks
    with LatentStream(data, micro_batch_size=BATCH, **SETTINGS, **ranks) as stream:
        return list(islice(stream, NUM_BATCHES))


def check(found, batches):
    assert len(found) == len(batches)
    for (latents, labels, positions), batch in zip(found, batches, strict=True):
        assert torch.equal(torch.as_tensor(latents), batch.raw_latents)
        assert torch.equal(torch.as_tensor(labels), batch.labels)
        assert torch.equal(torch.as_tensor(positions), batch.positions)


def pipeline(source):
    names = wds.to_tuple("moments.npy", "cls", "position")
    return wds.DataPipeline(source, names, wds.batched(BATCH))


@pytest.mark.processes
@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_a_web_loader_yields_the_planned_order(data, num_workers):
    source = PlannedSamples(data, batch_size=BATCH, stop_position=NUM_BATCHES * BATCH, **SETTINGS)
    loader = wds.WebLoader(pipeline(source), batch_size=None, num_workers=num_workers)
    check(list(loader), expected(data))


def test_ranks_and_streams_of_a_resumed_job_are_those_of_training(data):
    ranks = {"rank": 1, "world_size": 2, "global_batch_size": 24, "num_streams": 2}
    ranks |= {"start_position": 48, "horizontal_flip": False}
    source = PlannedSamples(data, batch_size=BATCH, **SETTINGS, **ranks)
    check(list(islice(pipeline(source), NUM_BATCHES)), expected(data, **ranks))


def test_samples_are_as_webdataset_decodes_them(data, tmp_path):
    source = PlannedSamples(data, batch_size=5, horizontal_flip=False, **SETTINGS)
    folder = data.parts[0].location.folder
    urls = [str(folder / shard.name) for shard in data.manifest.shards if shard.num_samples]
    decoded = list(wds.WebDataset(urls, shardshuffle=False).decode())
    known = {sample["moments.npy"][0, 0, 0].item(): sample for sample in decoded}
    for sample in islice(source, data.manifest.num_samples):
        other = known.pop(sample["moments.npy"][0, 0, 0].item())
        assert sample["cls"] == other["cls"]
        assert sample["moments.npy"].dtype == other["moments.npy"].dtype
        np.testing.assert_array_equal(sample["moments.npy"], other["moments.npy"])
    assert known == {}
