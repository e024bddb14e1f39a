"""The settings that decide the bytes of a data set's shards, kept as encoding.json beside them."""

import argparse
import dataclasses
import errno
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from data_tools.encoding.claims import Claims
from data_tools.errors import ConfigError
from data_tools.files import SINCE, MalformedError, write_text_once
from data_tools.formats import Format
from data_tools.shards.manifest import (
    DATASET,
    MANIFEST_NAME,
    ImageFormat,
    LatentFormat,
    VaeReference,
)
from data_tools.shards.records import KEY_DIGITS
from data_tools.shards.undescribed import SETTINGS_NAME
from data_tools.sources.class_names import number_difference
from data_tools.sources.reading import Reading
from data_tools.sources.source import ImageSource
from data_tools.storage.checksums import DISK_FULL
from data_tools.vae.autoencoder import Vae

CROP = "adm-center"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_STATISTICS = ("vae.latents_mean", "vae.latents_std")
POLL_SEC = 0.5  # between looks at what other processes do
# A disk that is full, over quota, read-only or not ours: the user's to solve, not a bug.
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


@dataclass(frozen=True, kw_only=True)
class EncodingSettings:
    """Everything that decides the bytes of the shards; kept in the output as encoding.json."""

    vae: VaeReference
    latent: LatentFormat
    image: ImageFormat
    source: str  # sha256 of the images' names and labels
    # Of some images, in bytes; none where an early version began: then they are not compared.
    sizes: list[int] = field(default_factory=list, metadata={SINCE: 2})
    num_files: int
    seed: int
    shard_size: int
    batch_size: int
    # Flags that say how the input is read, for a repair; what they lead to is in `source`.
    reading: Reading = field(default_factory=Reading, metadata={SINCE: 3})

    @property
    def num_shards(self) -> int:
        """How many shards the images fill."""
        return math.ceil(self.num_files / self.shard_size)

    def files_in(self, index: int) -> int:
        """How many images a shard has, damaged ones included."""
        return min(self.shard_size, self.num_files - index * self.shard_size)


# As of dataset.json, which its parts are in, too.
SETTINGS = Format(newest=3, base=2, oldest=2, kind=EncodingSettings)


@contextmanager
def disk_errors_as_config_errors(output: Path) -> Iterator[None]:
    """Report a full or read-only disk in one sentence."""
    try:
        yield
    except OSError as err:
        if err.errno not in (*DISK_FULL, *_REFUSED):
            raise
        raise ConfigError(
            f"--output {output}: cannot write {err.filename or 'a shard'} ({err.strerror}); free "
            "space or choose another folder and run the same command again, finished shards stay."
        ) from err


def make_settings(source: ImageSource, vae: Vae, args: argparse.Namespace) -> EncodingSettings:
    """Collect what decides the bytes of a data set; a batch size that is still open becomes 0.

    Raises:
        ConfigError: the VAE cannot reduce images of this size, or there are more of them than a
            shard's keys can number.
    """
    if args.size % vae.downsample:
        raise ConfigError(
            f"--size {args.size}: is not divisible by {vae.downsample}, the factor by which "
            f"--vae {args.vae} reduces images; use a multiple of {vae.downsample}."
        )
    if len(source) > 10**KEY_DIGITS:
        raise ConfigError(
            f"--input {source.text}: {len(source):,} images; one data set holds "
            f"{10**KEY_DIGITS:,}, make several."
        )
    side = args.size // vae.downsample
    return EncodingSettings(
        vae=vae.reference,
        latent=LatentFormat(
            kind="moments",
            shape=[2 * vae.latent_channels, side, side],
            dtype="float16",
            layout="mean | log-variance on axis 0, unscaled",
            flip=not args.no_flip,
            precision=args.precision,
        ),
        image=ImageFormat(size=args.size, crop=CROP),
        source=source.fingerprint(),
        sizes=source.sizes(),
        num_files=len(source),
        seed=args.seed,
        shard_size=args.shard_size,
        batch_size=args.batch_size or 0,
        reading=args.reading,
    )


def load_settings(output: Path) -> EncodingSettings | None:
    """Read the settings of a folder that was begun; None if there are none."""
    path = output / SETTINGS_NAME
    try:
        return SETTINGS.loads(path.read_bytes(), str(path))
    except FileNotFoundError:
        return None
    except (MalformedError, ValueError) as err:
        raise ConfigError(
            f"{path}: {err}; restore it from a copy, or give a new --output."
        ) from err


def begun_settings(
    output: Path, settings: EncodingSettings, source: ImageSource
) -> EncodingSettings | None:
    """Return the settings of a folder that these may continue; None if it is new.

    Args:
        output: may not exist yet.
        settings: of this command; without a batch size, that of the folder is taken over.
    """
    DATASET.refuse_newer(output / MANIFEST_NAME)  # before hours of work that would replace it
    found = load_settings(output)
    if found is None:
        if any(output.glob("*.tar")) or (output / MANIFEST_NAME).exists():
            raise ConfigError(
                f"--output {output}: holds shards but no {SETTINGS_NAME}, so how they were made is "
                "unknown; give a new folder."
            )
        return None
    if not settings.batch_size:
        settings = dataclasses.replace(settings, batch_size=found.batch_size)
    old, new = _leaves(asdict(found)), _leaves(asdict(settings))
    told = {name: f"{name} ({old[name]} -> {new[name]})" for name in new}
    told["source"] = "other names or classes of images"  # two sums of them tell nobody anything
    different = [
        told[name]
        for name in new
        # What was begun before a VAE's statistics were used is finished without them.
        if old[name] != new[name] and not (name in _STATISTICS and not old[name])
    ]
    if different:
        is_read_otherwise = old["source"] != new["source"] and found.num_files == len(source)
        rules = " (see the rules for inputs in data_tools/README.md)" if is_read_otherwise else ""
        raise ConfigError(
            f"--output {output}: was begun with other settings: {', '.join(different)}{rules}; "
            "repeat the old flags and input, or give a new folder."
        )
    num_other = len(source.edited(found.sizes, settings.sizes))
    # Some may have been mended since, as --strict asks for; most of them are another set.
    if 2 * num_other > len(found.sizes):
        raise ConfigError(
            f"--output {output}: was begun with other images of the same names ({num_other} of "
            f"{len(found.sizes)} have other sizes); repeat the old input, or give a new folder."
        )
    return found


def as_begun(output: Path, source: ImageSource) -> ImageSource:
    """Return the source with its classes numbered as in a folder that an earlier version began."""
    found = load_settings(output) if source.former is not None else None
    if found is None or source.fingerprint() == found.source:
        return source
    former = source.with_former_labels()
    if former.fingerprint() != found.source:
        return source
    former.notes = [
        "goes on with the classes as they were numbered when the encoding began, in the order of "
        f"text: {number_difference(former.classes)}"
    ]
    return former


def settle(
    output: Path,
    settings: EncodingSettings,
    source: ImageSource,
    complete: Callable[[EncodingSettings], EncodingSettings],
    claims: Claims,
) -> EncodingSettings:
    """Return the settings of the folder; the first of several processes notes them in it.

    Args:
        settings, source: as of begun_settings.
        complete: chooses what is free, in the first process only.
    """
    while (found := begun_settings(output, settings, source)) is None:
        if not claims.take(SETTINGS_NAME):
            time.sleep(POLL_SEC)
            continue
        if not (output / SETTINGS_NAME).exists():
            text = SETTINGS.dumps(complete(settings))
            write_text_once(output / SETTINGS_NAME, f"{text}\n")
        claims.release(SETTINGS_NAME)
    return found


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to {"image.size": 64, ...}."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and name != "reading":
            leaves |= _leaves(value, f"{prefix}{name}.")
        # Of the VAE the weights count, not where they were found; sizes are compared apart.
        elif prefix + name not in ("reading", "vae.id", "sizes"):
            leaves[prefix + name] = value
    return leaves
