"""Index tars of latents that other programs wrote, so that training reads them in place.

    python data_tools/index_shards.py --input 'tars/{000..099}.tar' --array latent.npy --label cls \
        --vae stabilityai/sd-vae-ft-ema

Each tar is read once, from a folder, http(s)://, s3:// or gs://. Beside dataset.json lies an index
for each tar; where that is not beside the tars, training needs --data-shards. Running the same
command again continues it.
"""

import argparse
import importlib.metadata
import sys
from contextlib import suppress
from pathlib import Path

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm import tqdm

from data_tools.encoding.input_summary import class_lines
from data_tools.errors import ArgumentParser, ConfigError, count_of, os_errors_as
from data_tools.files import MalformedError, replace_file
from data_tools.process.entry_point import enter
from data_tools.shards.foreign_arrays import channels_last, doubts
from data_tools.shards.foreign_index import NOTES, ScannedShard, WantedMembers, scan
from data_tools.shards.manifest import (
    DATASET,
    MANIFEST_NAME,
    ClassEntry,
    DatasetManifest,
    ImageFormat,
    LatentFormat,
    Manifest,
    Members,
    Shard,
    SourceList,
)
from data_tools.shards.sidecar import label_counts, statistics_of
from data_tools.shards.undescribed import SETTINGS_NAME
from data_tools.sources.left_out import Tally, sentence
from data_tools.storage.locations import Location, parse_location
from data_tools.user_files.file_kinds import refuse_lfs_pointer
from data_tools.user_files.paths import typed_path, typed_text
from data_tools.user_files.place_names import PIPE, is_address, places_of
from data_tools.user_files.user_text import TextError, read_text
from data_tools.vae.autoencoder import Vae, load_vae


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--input",
        type=typed_text,
        required=True,
        nargs="+",
        metavar="TARS",
        help="their folder, or several with braces or * or by name",
    )
    add("--output", type=typed_path, help="folder of dataset.json; default: the tars'")
    add("--array", required=True, metavar="SUFFIX", help="after KEY and a dot")
    add("--flip", default="", metavar="SUFFIX", help="of the mirrored image")
    add("--label", default="cls", metavar="SUFFIX", help="a whole number; json:FIELD; or none")
    add(
        "--kind",
        choices=("moments", "latents"),
        default="moments",
        help="mean | log-variance, or draws of the posterior; unscaled",
    )
    made_by = "that made the latents: folder, file, hub id"
    add("--vae", type=typed_text, required=True, help=made_by)
    add("--size", type=int, metavar="PIXELS", help="of the images; for people")
    add("--class-names", type=typed_path, metavar="FILE", help="a line for each label")
    return parser.parse_args(argv)


def split_input(words: list[str]) -> tuple[Location, list[str]]:
    """Return where the tars lie, which must be one place, and what they are called."""
    text = " ".join(words)
    if any(word.startswith(PIPE) or (is_address(word) and "?" in word) for word in words):
        raise ConfigError(
            f"--input {text}: a command or an address with a query cannot be cut into folder and "
            "name; copy the tars, or give a plain address."
        )
    paths = [path for word in words for path in places_of(word, "--input")]
    if len(paths) == 1 and Path(paths[0]).is_dir():
        paths = sorted(map(str, Path(paths[0]).glob("*.tar")))
    if not paths:
        raise ConfigError(f"--input {text}: is a folder without NAME.tar; give one with tars.")
    folders = {path.rpartition("/")[0] if "/" in path else "." for path in paths}
    names = [path.rpartition("/")[2] for path in paths]
    if len(folders) > 1 or len(set(names)) < len(names):
        raise ConfigError(
            f"--input {text}: the tars of a data set lie in one folder under different names; "
            "index each folder and give training --data a,b."
        )
    if wrong := next((name for name in names if not name.endswith(".tar")), None):
        raise ConfigError(f"--input {text}: {wrong!r} is not called NAME.tar; rename it.")
    return parse_location(folders.pop() or "/", "--input"), names


def scan_shard(
    location: Location, name: str, wanted: WantedMembers, output: Path, vae: Vae
) -> ScannedShard:
    """Index a tar, unless that was done before; nothing is written of a tar that is refused."""
    stem = name.removesuffix(".tar")
    index, notes = output / f"{stem}.index.npy", output / f"{stem}.index.json"
    known = _known(notes)
    if known is not None and known.wanted == wanted and index.is_file():
        tar = None if location.folder is None else location.folder / name
        if tar is None or (tar.is_file() and _is_that(tar, known, notes)):
            check_latents(name, known, vae)
            return known
    found, content = scan(location, name, wanted)
    check_latents(name, found, vae)
    output.mkdir(parents=True, exist_ok=True)
    replace_file(index, lambda file: file.write(content))
    NOTES.write(notes, found)
    return found


def _is_that(tar: Path, known: ScannedShard, notes: Path) -> bool:
    status = tar.stat()
    return status.st_size == known.bytes and status.st_mtime_ns <= notes.stat().st_mtime_ns


def _known(notes: Path) -> ScannedShard | None:
    with suppress(OSError, ValueError, MalformedError):
        return NOTES.loads(notes.read_bytes(), str(notes))
    return None


def check_latents(name: str, shard: ScannedShard, vae: Vae) -> None:
    """Refuse latents of another VAE, and standard deviations in the place of log-variances."""
    shape, kind = shard.shape, shard.wanted.kind
    channels = shape[0] // (2 if kind == "moments" else 1)
    if channels != vae.latent_channels:
        raise ConfigError(
            f"--vae {vae.id}: has {vae.latent_channels} latent channels, {name} {channels} "
            f"in its {kind} of shape {tuple(shape)}; give the VAE that made them, or see --kind"
            f"{channels_last(shape)}."
        )
    if shard.log_variance_min >= 0:
        raise ConfigError(
            f"--kind moments: the second half of every array in {name} is positive, so it seems to "
            "hold standard deviations and no log-variances; write 2 * log(std) in their place, or "
            "the first half alone with --kind latents."
        )


def describe(
    names: list[str], found: list[ScannedShard], vae: Vae, size: int | None, class_names: list[str]
) -> Manifest:
    """Make the description of all tars together."""
    first, wanted = found[0], found[0].wanted
    for name, shard in zip(names, found, strict=True):
        if (shard.shape, shard.dtype) != (first.shape, first.dtype):
            raise ConfigError(
                f"--input {name}: holds arrays {shard.dtype} {shard.shape}, {names[0]} holds "
                f"{first.dtype} {first.shape}; index them apart."
            )
    left_out = Tally()
    for name, shard in zip(names, found, strict=True):
        for entry in shard.left_out:
            left_out.add_all(entry, f"{name}/")
    totals = [shard.totals for shard in found]
    counts = label_counts(totals)
    num_classes = max(counts) + 1 if wanted.label else 0
    if class_names and len(class_names) < num_classes:
        raise ConfigError(
            f"--class-names: has {len(class_names)} lines, but there is a label {num_classes - 1}; "
            "give a line for each label from 0 on."
        )
    ids = class_names or [str(label) for label in range(num_classes)]
    if len(set(ids)) < len(ids):
        raise ConfigError("--class-names: names a class twice; give each line another name.")
    num_samples = sum(shard.num_samples for shard in found)
    return Manifest(
        num_samples=num_samples,
        shards=[
            Shard(
                name=name,
                num_samples=shard.num_samples,
                bytes=shard.bytes,
                sha256=shard.sha256,
                stride=0,
                index_sha256=shard.index_sha256,
                first_key=shard.first_key,
                skipped=[],
            )
            for name, shard in zip(names, found, strict=True)
        ],
        latent=LatentFormat(
            kind=wanted.kind,
            shape=first.shape,
            dtype=first.dtype,
            layout="mean | log-variance" if wanted.kind == "moments" else "one draw",
            flip=bool(wanted.flip),
            precision="unknown",
        ),
        members=Members(wanted.array, wanted.flip, wanted.label),
        vae=vae.reference,
        statistics=statistics_of(totals, num_samples, first.shape[1] * first.shape[2]),
        image=ImageFormat(size or first.shape[1] * vae.downsample, "unknown"),
        source=SourceList(num_samples, 0, ""),
        order_seed=0,
        classes=[
            ClassEntry(label, name, name.replace("_", " "), counts[label])
            for label, name in enumerate(ids)
        ],
        versions={"numpy": importlib.metadata.version("numpy")},
        left_out=left_out.entries(),
    )


def main(argv: list[str] | None = None) -> None:
    """Index the tars and write dataset.json."""
    args = parse_arguments(argv)
    location, names = split_input(args.input)
    output = args.output or location.folder
    if output is None:
        raise ConfigError("--output: say in which folder dataset.json and the indexes go.")
    if (output / SETTINGS_NAME).exists():
        raise ConfigError(
            f"--output {output}: encode_latents.py made it, and its {MANIFEST_NAME} would be "
            "replaced; train on the folder as it is, or give another --output."
        )
    class_names = []
    if args.class_names is not None:
        try:
            text = read_text(args.class_names)
        except (OSError, TextError) as err:
            raise ConfigError(
                f"--class-names {args.class_names}: is no text that can be read; give a file with "
                "a line for each label."
            ) from err
        class_names = [line.strip() for line in text.rstrip().split("\n")]
        if "" in class_names:
            raise ConfigError(
                f"--class-names {args.class_names}: line {class_names.index('') + 1} is empty; "
                "give a line for each label from 0 on."
            )
    for name in names if location.folder is not None else ():
        refuse_lfs_pointer("--input", location.folder / name)
    vae = load_vae(args.vae)
    DATASET.refuse_newer(output / MANIFEST_NAME)
    label = "" if args.label == "none" else args.label
    wanted = WantedMembers(args.array, args.flip, label, args.kind)
    advice = "choose another folder or make room, and run the same command again (it continues)"
    with os_errors_as(f"--output {output}: cannot be written", advice):
        found = [
            scan_shard(location, name, wanted, output, vae)
            for name in tqdm(names, unit="tar", disable=not sys.stderr.isatty())
        ]
        DATASET.write(output / MANIFEST_NAME, describe(names, found, vae, args.size, class_names))
    manifest = DatasetManifest.load(output, check_shards=output == location.folder)
    shape = "x".join(map(str, manifest.latent.shape))
    shown = "  ".join(f"{std:.3f}" for std in manifest.scaled_std)
    lines = [
        f"{output}: {count_of(manifest.num_samples, 'sample')} in {count_of(len(names), 'tar')}, "
        f"{manifest.latent.kind} {shape} {manifest.latent.dtype}, "
        f"{count_of(manifest.num_classes, 'class')}",
        f"scaled std {shown}  per channel, what the model sees, 1 is usual",
    ]
    if doubt := doubts(manifest.scaled_std, manifest.vae.scaling_factor):
        lines.append(f"warning: {output}: {doubt}.")
    lines += class_lines(manifest.classes)
    lines += [f"left out: {sentence(manifest.left_out)}"] if manifest.left_out else []
    sys.stdout.write("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    enter(main, when_stopped="the same command goes on")
