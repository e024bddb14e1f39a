"""Our order of samples as the first stage of a webdataset pipeline.

    data = open_data("datasets/photos")
    source = PlannedSamples(data, seed=0, window=16, batch_size=256)
    pipeline = wds.DataPipeline(source, wds.to_tuple("moments.npy", "cls"), wds.batched(256))
    loader = wds.WebLoader(pipeline, batch_size=None, num_workers=2)

Samples are as `wds.WebDataset(...).decode()` gives them, with their stream position beside them.
Batch k comes from worker k modulo the number of workers, and torch takes the workers' batches in
turn: so the loader yields exactly the planned order, however many workers there are, as long as the
stages in between neither drop, add nor reorder samples and batches have `batch_size` samples.
"""

from collections.abc import Iterator
from itertools import islice, takewhile
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from data_tools.stream.loader import BatchReader
from data_tools.stream.plan import micro_batches
from data_tools.stream.training_data import TrainingData


class PlannedSamples(IterableDataset):
    """A rank's samples in the planned order, as dictionaries; endless, or up to a position."""

    def __init__(
        self,
        data: TrainingData,
        *,
        batch_size: int,
        global_batch_size: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        start_position: int = 0,
        stop_position: int | None = None,
        **settings: Any,
    ) -> None:
        """Prepare; files are opened in the process that iterates.

        Args:
            batch_size: of the batches that later stages make; a worker reads as many in one go.
            global_batch_size: samples per step over all ranks; None = batch_size x world_size.
            start_position: stream position to begin at, between two steps.
            stop_position: where to end; None = never.
            settings: of BatchReader: seed and window, perhaps num_streams and others.
        """
        super().__init__()
        self.data, self.batch_size, self.stop_position = data, batch_size, stop_position
        self._ranks = {
            "global_batch_size": global_batch_size or batch_size * world_size,
            "rank": rank,
            "world_size": world_size,
        }
        self._settings = {**self._ranks, **settings}
        self._start_position = start_position

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        starts = micro_batches(
            start_position=self._start_position, micro_batch_size=self.batch_size, **self._ranks
        )
        if self.stop_position is not None:
            starts = takewhile(lambda start: start < self.stop_position, starts)
        batches = BatchReader(self.data, **self._settings)
        members = self.data.manifest.members
        label_name = members.label if members.label.isalnum() else "cls"
        try:
            for start in islice(starts, number, None, count):
                latents, labels, positions = batches.read(start, self.batch_size)
                values = zip(latents.numpy(), labels.tolist(), positions.tolist(), strict=True)
                for array, label, position in values:
                    yield {
                        "__key__": f"{position:012d}",
                        members.array: array,
                        label_name: label,
                        "position": torch.tensor(position),
                    }
        finally:
            batches.close()
