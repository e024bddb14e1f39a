"""Check every byte of a data set: sizes, checksums, and that the samples lie where they should.

python data_tools/verify_shards.py --data latents/imagenet256
"""

import hashlib
import sys
from pathlib import Path

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np  # noqa: E402 -- after sys.path is set
from tqdm import tqdm  # noqa: E402

from data_tools.errors import ArgumentParser, ConfigError, exit_on_config_error  # noqa: E402
from data_tools.manifest import DatasetManifest, Shard
from data_tools.records import DamagedRecordError, RecordLayout  # noqa: E402

_CHUNK_BYTES = 1 << 22


def shard_problem(path: Path, shard: Shard, layout: RecordLayout) -> str | None:
    """Say what is wrong with a shard; None if nothing is."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
            if digest.hexdigest() != shard.sha256:
                return "its sha256 is not that of dataset.json"
            for row in range(shard.num_samples):
                _check_sample(file.fileno(), row, layout)
    except OSError as err:
        return f"cannot be read ({err.strerror})"
    except DamagedRecordError as err:
        return str(err)
    return None


def _check_sample(descriptor: int, row: int, layout: RecordLayout) -> None:
    head = np.empty((1, layout.head_bytes), np.uint8)
    array = np.empty(layout.array_bytes, np.uint8)
    for use_flip in (False, True) if layout.has_flip else (False,):
        flips = np.array([use_flip])
        layout.read_rows(descriptor, [row], [use_flip], [memoryview(head[0])], [memoryview(array)])
        layout.check(head, flips)
        if not np.isfinite(array.view(np.float16)).all():
            raise DamagedRecordError(f"holds a value that is no number in sample {row}")


def verify(manifest: DatasetManifest, is_quiet: bool = False) -> list[str]:
    """Return the damaged shards, each with what is wrong."""
    layout, problems = manifest.layout, []
    for shard in tqdm(manifest.shards, unit="shard", disable=is_quiet or not sys.stderr.isatty()):
        problem = shard_problem(manifest.folder / shard.name, shard, layout)
        if problem:
            problems.append(f"{shard.name} {problem}")
    return problems


def main(argv: list[str]) -> None:
    """Verify and report."""
    parser = ArgumentParser(description="Check every shard of a data set.")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    folder = parser.parse_args(argv).data
    manifest = DatasetManifest.load(folder)
    if problems := verify(manifest):
        raise ConfigError(
            f"--data {folder}: {len(problems)} of {len(manifest.shards)} shards are damaged: "
            f"{'; '.join(problems)}; copy them again, or delete them and dataset.json and run "
            "encode_latents.py with the same flags again."
        )
    sys.stdout.write(
        f"{folder}: {manifest.num_samples} samples in {len(manifest.shards)} shards are intact\n"
    )


if __name__ == "__main__":
    with exit_on_config_error():
        main(sys.argv[1:])
