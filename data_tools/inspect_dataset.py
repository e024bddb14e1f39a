"""Describe an encoded data set: samples, sizes, VAE, statistics and classes; draw a preview.

    python data_tools/inspect_dataset.py latents/imagenet256
    python data_tools/inspect_dataset.py latents/imagenet256 --preview preview.png

Only dataset.json is read, so the answer takes a moment however large the set is;
verify_shards.py says whether the shards are what it describes.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data_tools.errors import ArgumentParser, count_of, some
from data_tools.process.entry_point import enter
from data_tools.shards.manifest import ClassEntry, DatasetManifest
from data_tools.sources.left_out import sentence
from data_tools.user_files.paths import typed_path, typed_text
from data_tools.verification.report import readable_bytes, table

BATCH_SIZE = 256  # of the paper and of every preset; steps per epoch refer to it
ALL_CLASSES = 24  # as many are listed in full, of more the most and least frequent ones
_EXTREMES = 5
_SKIPPED_SHOWN = 5
_NAME_WIDTH = 40


def gini(counts: Sequence[int]) -> float:
    """Return how unevenly counts are spread: 0 = all equal, near 1 = all in one class."""
    ordered, total = sorted(counts), sum(counts)
    if not total:
        return 0.0
    weighted = sum(rank * count for rank, count in enumerate(ordered, start=1))
    return 2 * weighted / (len(ordered) * total) - (len(ordered) + 1) / len(ordered)


def describe(manifest: DatasetManifest) -> dict[str, Any]:
    """Collect what a data set is, as values that JSON can hold."""
    sizes = [shard.num_samples for shard in manifest.shards]
    num_bytes = sum(shard.bytes for shard in manifest.shards)
    counts = [entry.count for entry in manifest.classes]
    return {
        "folder": str(manifest.folder),
        "hash": manifest.hash,
        "num_samples": manifest.num_samples,
        "num_shards": len(sizes),
        "samples_per_shard": {"min": min(sizes), "max": max(sizes)},
        "bytes": num_bytes,
        "bytes_per_sample": num_bytes / manifest.num_samples,
        "steps_per_epoch": {str(BATCH_SIZE): manifest.num_samples / BATCH_SIZE},
        "latent": vars(manifest.latent),
        "vae": vars(manifest.vae),
        "image": vars(manifest.image),
        "statistics": vars(manifest.statistics),
        "has_own_layout": manifest.has_own_layout,
        "source": vars(manifest.source),
        "skipped": [name for shard in manifest.shards for name in shard.skipped],
        "left_out": [vars(entry) for entry in manifest.left_out],
        "classes": [vars(entry) for entry in manifest.classes],
        "class_balance": {"min": min(counts), "max": max(counts), "gini": gini(counts)}
        if counts
        else None,
        "versions": manifest.versions,
    }


def page(manifest: DatasetManifest) -> str:
    """Write the description for people."""
    facts = describe(manifest)
    latent, vae, image = manifest.latent, manifest.vae, manifest.image
    least, most = facts["samples_per_shard"].values()
    shards = count_of(len(manifest.shards), "shard")
    num_bytes, shape = readable_bytes(facts["bytes"]), "x".join(map(str, latent.shape))
    mirrored = "with" if latent.flip else "without"
    steps = facts["steps_per_epoch"][str(BATCH_SIZE)]
    shift = f", shift {vae.shift_factor:g}" if vae.shift_factor else ""
    shift += ", latents_mean and latents_std" if vae.latents_mean else ""
    spread = f"{most}" if least == most else f"{least} to {most}"
    skipped, num_files = facts["skipped"], manifest.source.num_files
    names = f": {some(skipped, _SKIPPED_SHOWN)}" if skipped else ""
    rows = [
        ("samples", f"{manifest.num_samples} in {shards} of {spread}"),
        ("size", f"{num_bytes}, {facts['bytes_per_sample']:.0f} bytes per sample"),
        ("epoch", f"{steps:.1f} steps at batch {BATCH_SIZE}"),
        ("latents", f"{latent.kind} {shape} {latent.dtype}, {mirrored} those of mirrored images"),
        ("images", f"{image.size}x{image.size} pixels, crop {image.crop}"),
        ("VAE", f"{vae.id}, weights {vae.sha256[:12]}, scale {vae.scaling_factor:g}{shift}"),
        ("encoded in", latent.precision),
        ("mean", f"{_numbers(manifest.statistics.mean)}  per channel, unscaled"),
        ("std", f"{_numbers(manifest.statistics.std)}  per channel, unscaled"),
        ("scaled std", f"{_numbers(manifest.scaled_std)}  what the model sees, 1 is usual"),
        ("skipped", f"{len(skipped) or 'none'} of {num_files} files{names}"),
        ("left out", sentence(manifest.left_out) or "nothing that was noted"),
        ("made with", ", ".join(f"{k} {v}" for k, v in sorted(manifest.versions.items())) or "?"),
        ("hash", manifest.hash[:12]),
    ]
    if not facts["has_own_layout"]:
        rows.append(("layout", "tars written by others, read through an index"))
    lines = [str(manifest.folder), *table(rows), "", *_class_lines(manifest.classes)]
    return "\n".join(lines) + "\n"


def _numbers(values: list[float]) -> str:
    return "  ".join(f"{value:7.4f}" for value in values)


def _class_lines(classes: list[ClassEntry]) -> list[str]:
    if not classes:
        return ["no classes: the data set is unconditional"]
    counts = [entry.count for entry in classes]
    total, mean = max(1, sum(counts)), sum(counts) / len(counts)
    title = (
        f"{count_of(len(classes), 'class')} of {min(counts)} to {max(counts)} samples, mean "
        f"{mean:.1f}, Gini {gini(counts):.3f}"
    )
    if empty := counts.count(0):
        title += f", {empty} without any"
    if len(classes) <= ALL_CLASSES:
        return [title, *table(_class_row(entry, total, max(counts)) for entry in classes)]
    by_count = sorted(classes, key=lambda entry: (-entry.count, entry.index))
    extremes = by_count[:_EXTREMES] + by_count[-_EXTREMES:]
    aligned = table(_class_row(entry, total, max(counts)) for entry in extremes)
    hidden = f"  ... {len(classes) - 2 * _EXTREMES} classes in between, --json lists all"
    return [title, *aligned[:_EXTREMES], hidden, *aligned[_EXTREMES:]]


def _class_row(entry: ClassEntry, total: int, largest: int) -> tuple[str, ...]:
    bar = "#" * math.ceil(20 * entry.count / max(1, largest))
    is_told = entry.name == entry.id.replace("_", " ")  # the name is all there is to the folder's
    names = (_clipped(entry.name), "" if is_told else _clipped(entry.id))
    return (f"{entry.index:>5}", *names, f"{entry.count:>9}", f"{entry.count / total:6.2%}", bar)


def _clipped(text: str) -> str:
    return text if len(text) <= _NAME_WIDTH else text[: _NAME_WIDTH - 3] + "..."


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Define the flags."""
    parser = ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    parser.add_bare_or_flag("data", "--data", typed_path, "FOLDER", "the data set")
    add("--preview", type=typed_path, metavar="FILE", help="write a PNG of some decoded samples")
    add(
        "--vae",
        type=typed_text,
        metavar="VAE",
        help="where the data set's VAE is, if not where dataset.json says",
    )
    add("--device", metavar="DEVICE", help="of the VAE: cpu, cuda or cuda:N (default: a GPU)")
    add("--json", action="store_true", help="print everything as JSON, all classes included")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Describe, and draw if asked to."""
    args = parse_arguments(argv)
    manifest = DatasetManifest.load(args.data, check_shards=False)
    print(json.dumps(describe(manifest), indent=1) if args.json else page(manifest).rstrip())
    if args.preview:
        # Imported here: it loads the VAE's library, which a description does not need.
        from data_tools.verification.preview import write_preview

        number = write_preview(args.preview, manifest, vae=args.vae, device=args.device)
        print(f"{args.preview}: {count_of(number, 'sample')}", file=sys.stderr)


if __name__ == "__main__":
    enter(main, prints_result=True)
