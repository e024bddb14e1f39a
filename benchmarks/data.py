"""Measure how fast latents are read: ours, plain webdataset, .npy files and safetensors.

    python benchmarks/data.py --folder FOLDER

One run reads the same latents (float16, 8x32x32) and labels in every format, in batches of 256 in
one tensor, with warm and cold page cache, by one and by two processes. Then it measures the stream
that training consumes, the time to the first batch after a resume in the middle of 1.28 M samples,
and the memory over a million samples.
"""

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
import webdataset as wds
from safetensors import safe_open

from benchmarks.data_sets import (
    SHAPE,
    SHARD_SIZE,
    describe,
    make_large,
    make_npy,
    make_safetensors,
    make_shard,
)
from benchmarks.measure import describe_machine
from data_tools.process.entry_point import enter
from data_tools.stream.loader import LatentStream
from data_tools.stream.reader import SampleReader
from data_tools.stream.training_data import open_data
from data_tools.user_files.paths import typed_path

BATCH = 256
WINDOW = 16
NPY_HEADER = 128
LARGE_SHARDS = 625  # x 2048 = 1.28 M samples

Reader = Callable[[Path, int, int], Iterator[torch.Tensor]]


def read_ours(folder: Path, part: int, num_parts: int) -> Iterator[torch.Tensor]:
    """Read at random places in the planned order: one thread, nothing read ahead."""
    data = open_data(str(folder / "tar"))
    plan = data.plan(seed=0, window=WINDOW, global_batch_size=BATCH)
    reader = SampleReader(data, data.stores("size", None), num_open_shards=WINDOW)
    for start in range(part * BATCH, data.manifest.num_samples, num_parts * BATCH):
        ids = plan.sample_ids(start, start + BATCH)
        latents = torch.empty((len(ids), *SHAPE), dtype=torch.float16)
        reader.read(ids, np.zeros(len(ids), bool), latents)
        yield latents
    reader.close()


def read_stream(folder: Path, part: int, num_parts: int) -> Iterator[torch.Tensor]:
    """Read as training does: threads read ahead; order and labels are included."""
    data = open_data(str(folder / "tar"))
    steps = data.manifest.num_samples // (BATCH * num_parts)
    with LatentStream(
        data,
        seed=0,
        window=WINDOW,
        global_batch_size=BATCH * num_parts,
        micro_batch_size=BATCH,
        rank=part,
        world_size=num_parts,
        horizontal_flip=False,
        check="size",
    ) as stream:
        for _ in range(steps):
            yield next(stream).raw_latents


def _tars(folder: Path, part: int, num_parts: int) -> list[str]:
    return [str(path) for path in sorted((folder / "tar").glob("*.tar"))[part::num_parts]]


def _batched(samples: Iterator[tuple[np.ndarray, int]]) -> Iterator[torch.Tensor]:
    latents = torch.empty((BATCH, *SHAPE), dtype=torch.float16)
    labels, count = torch.empty(BATCH, dtype=torch.int64), 0
    for array, label in samples:
        latents[count] = torch.from_numpy(array)
        labels[count] = label
        count += 1
        if count == BATCH:
            yield latents
            latents, count = torch.empty_like(latents), 0


def read_webdataset(folder: Path, part: int, num_parts: int) -> Iterator[torch.Tensor]:
    """Read with plain webdataset; values by np.frombuffer."""
    samples = wds.WebDataset(_tars(folder, part, num_parts), shardshuffle=False)
    return _batched(
        (
            np.frombuffer(s["moments.npy"], np.float16, offset=NPY_HEADER).reshape(SHAPE).copy(),
            int(s["cls"]),
        )
        for s in samples
    )


def read_decoded(folder: Path, part: int, num_parts: int) -> Iterator[torch.Tensor]:
    """Read with plain webdataset and its own .decode()."""
    samples = wds.WebDataset(_tars(folder, part, num_parts), shardshuffle=False).decode()
    return _batched((s["moments.npy"], s["cls"]) for s in samples)


def _shuffled(folder: Path, part: int, num_parts: int) -> list[tuple[int, int]]:
    num_shards = len(list((folder / "npy").iterdir()))
    order = np.random.default_rng(0).permutation(num_shards * SHARD_SIZE)[part::num_parts]
    return [divmod(int(i), SHARD_SIZE) for i in order]


def read_npy(folder: Path, part: int, num_parts: int) -> Iterator[torch.Tensor]:
    """Read one file per image, in random order."""
    root = folder / "npy"
    labels = [np.load(path / "labels.npy") for path in sorted(root.iterdir())]
    return _batched(
        (np.load(root / f"{shard:05d}" / f"{i}.npy"), labels[shard][i])
        for shard, i in _shuffled(folder, part, num_parts)
    )


def read_safetensors(folder: Path, part: int, num_parts: int) -> Iterator[torch.Tensor]:
    """Read a file per shard, opened for every sample, in random order."""

    def samples() -> Iterator[tuple[np.ndarray, int]]:
        for shard, i in _shuffled(folder, part, num_parts):
            with safe_open(folder / "safetensors" / f"{shard:05d}.safetensors", "np") as file:
                latent = file.get_slice("latents")[i : i + 1][0]
                yield latent, int(file.get_slice("labels")[i : i + 1][0])

    return _batched(samples())


READERS: dict[str, Reader] = {
    "ours": read_ours,
    "ours, as training consumes it": read_stream,
    "webdataset, np.frombuffer": read_webdataset,
    "webdataset, .decode()": read_decoded,
    "one .npy per image": read_npy,
    "safetensors, opened per sample": read_safetensors,
}


def drop_from_cache(folder: Path) -> None:
    """Drop the files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _consume(
    name: str, folder: Path, part: int, num_parts: int, start: object, counts: object
) -> None:
    torch.set_num_threads(1)
    start.wait()
    batches = READERS[name](folder, part, num_parts)
    next(batches)  # what starting takes is measured apart, by resume_ms
    started = time.perf_counter()
    count = sum(len(batch) for batch in batches)
    counts.put((count, started, time.perf_counter()))


def samples_per_sec(name: str, folder: Path, num_consumers: int) -> float:
    """Read everything once with some processes; return samples per second of all together."""
    context = multiprocessing.get_context("fork")  # nothing but this benchmark runs here
    start, counts = context.Barrier(num_consumers), context.Queue()
    consumers = [
        context.Process(target=_consume, args=(name, folder, part, num_consumers, start, counts))
        for part in range(num_consumers)
    ]
    for consumer in consumers:
        consumer.start()
    found = [counts.get() for _ in consumers]
    for consumer in consumers:
        consumer.join()
    total = sum(count for count, *_ in found)
    return total / (max(end for *_, end in found) - min(begin for _, begin, _ in found))


def resume_ms(large: Path) -> tuple[list[float], list[float]]:
    """Time to open the data, and from there to the first batch in the middle of the 812th epoch.

    Returns:
        milliseconds of six turns each; in the first one the node checks the window's shards.
    """
    opening, times = [], []
    for turn in range(6):
        started = time.perf_counter()
        data = open_data(str(large))
        opening.append(1e3 * (time.perf_counter() - started))
        started = time.perf_counter()
        position = (811 * data.manifest.num_samples + 900_000 + turn) // BATCH * BATCH
        with _large_stream(data, position) as stream:
            next(stream)
            times.append(1e3 * (time.perf_counter() - started))
    return opening, times


def _large_stream(data: object, position: int) -> LatentStream:
    return LatentStream(
        data,
        seed=0,
        window=WINDOW,
        global_batch_size=BATCH,
        micro_batch_size=BATCH,
        rank=0,
        world_size=1,
        start_position=position,
        horizontal_flip=False,
    )


def memory_over(large: Path, num_samples: int) -> tuple[float, float, float]:
    """Return the resident MiB after a tenth of the samples and at the end, and samples/s."""
    early, started = 0.0, time.perf_counter()
    with _large_stream(open_data(str(large)), 0) as stream:
        for i in range(num_samples // BATCH):
            next(stream)
            if i == num_samples // BATCH // 10:
                early = _resident_mib()
    return early, _resident_mib(), num_samples / (time.perf_counter() - started)


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize() / 2**20


def prepare(folder: Path, num_shards: int) -> Path:
    """Make all formats; return the folder of the large set."""
    shards = [make_shard(folder / "tar", i) for i in range(num_shards)]
    describe(folder / "tar", shards)
    make_npy(folder / "npy", num_shards)
    make_safetensors(folder / "safetensors", num_shards)
    first = folder / "tar" / shards[0].name
    make_large(folder / "large", first, shards[0], LARGE_SHARDS)
    os.sync()
    return folder / "large"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=typed_path, help="for 0.9 GiB of latents; default: temporary"
    )
    parser.add_argument("--num-shards", type=int, default=8, help="of 2048 samples")
    parser.add_argument("--repeats", type=int, default=3, help="the best counts")
    parser.add_argument("--memory-samples", type=int, default=1_000_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(describe_machine(torch.device("cpu")))
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        os.environ["SWITCH_DIT_CACHE"] = str(folder / "checked")
        large = prepare(folder, args.num_shards)
        columns = [(is_cold, count) for is_cold in (False, True) for count in (1, 2)]
        best = {(reader, *column): 0.0 for reader in READERS for column in columns}
        for _ in range(args.repeats):
            for is_cold, count in columns:
                for reader in READERS:
                    if is_cold:
                        drop_from_cache(folder)
                    speed = samples_per_sec(reader, folder, count)
                    key = (reader, is_cold, count)
                    best[key] = max(best[key], speed)
        print("samples/s                       warm x1    warm x2    cold x1    cold x2")
        for reader in READERS:
            cells = [f"{best[reader, *column]:>10,.0f}" for column in columns]
            print(f"{reader:<30} {' '.join(cells)}")
        for plain in ("webdataset, np.frombuffer", "webdataset, .decode()"):
            print(f"over {plain}:")
            for reader in list(READERS)[:2]:
                ratios = [f"{best[reader, *c] / best[plain, *c]:>9.1f}x" for c in columns]
                print(f"{reader:<30} {' '.join(ratios)}")
        opening, times = resume_ms(large)
        print(
            f"resume in the middle of 1.28 M samples: {np.median(opening[1:]):.1f} ms to read and "
            f"check dataset.json, then {np.median(times[1:]):.1f} ms to the first batch (medians), "
            f"{max(times[1:]):.1f} ms at worst; {times[0]:.1f} ms on a node that checks these "
            "shards for the first time"
        )
        early, late, speed = memory_over(large, args.memory_samples)
        print(
            f"{args.memory_samples:,} samples at {speed:,.0f} samples/s: resident {early:,.0f} MiB "
            f"after a tenth, {late:,.0f} MiB at the end"
        )


if __name__ == "__main__":
    enter(main)
