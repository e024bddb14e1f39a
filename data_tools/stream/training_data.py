"""Open what --data names: one data set, a union of several, or a mixture with weights.

    datasets/a                    one data set
    datasets/{a,b}  or  a,b       one union: each sample once per epoch of all together
    a=3,http://host/b=1           a mixture: three quarters of a, each in epochs of its own
    datasets/*                    one union of all that match
    pipe:ssh host cat b/{}        the rest of the text is the command

A folder that exists is meant by its name, whatever commas, braces or equals signs are in it.

Classes of several data sets are united by their ids, in the order in which they appear first.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from data_tools.errors import ConfigError, count_of
from data_tools.shards.manifest import (
    MANIFEST_NAME,
    ChannelStatistics,
    ClassEntry,
    DatasetManifest,
    SourceList,
)
from data_tools.storage.cache import ShardCache
from data_tools.storage.fetch import MissingFileError, read_small
from data_tools.storage.locations import Location, parse_location
from data_tools.storage.server_answers import json_message
from data_tools.stream.plan import BLOCK, StreamPlan
from data_tools.stream.shard_store import ShardStore
from data_tools.user_files.place_names import places_of, split_list, split_weight

_FLAG = "--data"
_MAX_MANIFEST_BYTES = 1 << 28  # 300 bytes a shard: enough for a thousand million samples


@dataclass(frozen=True)
class NamedSet:
    """One set of a mixture, or the only one: locations whose samples form one union."""

    locations: tuple[str, ...]
    weight: float


@dataclass(frozen=True)
class DataPart:
    """What one dataset.json describes."""

    manifest: DatasetManifest
    location: Location  # of dataset.json
    shard_location: Location  # of the tars
    class_of_label: np.ndarray  # (labels,) int64: the class in the whole of the data


@dataclass(frozen=True)
class TrainingData:
    """Everything that samples come from."""

    manifest: DatasetManifest  # of all; its hash is of everything that decides what is read
    parts: tuple[DataPart, ...]  # in the order of sample ids
    part_counts: tuple[int, ...]  # how many of the parts each set of the mixture has
    weights: tuple[int, ...]  # of the sets, in thousandths

    @property
    def shard_sizes(self) -> list[int]:
        """Samples in each shard of all parts."""
        return [shard.num_samples for part in self.parts for shard in part.manifest.shards]

    def plan(self, **settings: int) -> StreamPlan:
        """Return the order of this data's samples; `settings` are arguments of StreamPlan."""
        return StreamPlan(self._set_sizes(), weights=self.weights, **settings)

    def check_streams(self, num_streams: int) -> None:
        """Refuse more streams than a set has samples."""
        fewest = min(map(sum, self._set_sizes()))
        if fewest < num_streams:
            raise ConfigError(
                f"--data-streams {num_streams} is more than the {count_of(fewest, 'sample')} of "
                "the smallest data set; use fewer streams."
            )

    def _set_sizes(self) -> list[list[int]]:
        sets, parts = [], iter(self.parts)
        for count in self.part_counts:
            own = [next(parts).manifest.shards for _ in range(count)]
            sets.append([shard.num_samples for shards in own for shard in shards])
        return sets

    def stores(self, check: str, cache: ShardCache | None) -> list[ShardStore]:
        """Return what opens the shards of each part; see ShardStore for the arguments."""
        return [
            ShardStore(
                part.manifest,
                location=part.shard_location,
                index_location=part.location,
                check=check,
                cache=cache,
            )
            for part in self.parts
        ]

    def describe(self) -> str:
        """Return a line per data set: where, how much of what."""
        lines, parts = [], iter(self.parts)
        for count, weight in zip(self.part_counts, self.weights, strict=True):
            share = "" if len(self.weights) == 1 else f"{weight / BLOCK:.1%} of the samples: "
            for part in (next(parts) for _ in range(count)):
                found = part.manifest
                size = sum(shard.bytes for shard in found.shards)
                shape = "x".join(map(str, found.latent.shape))
                flip = " with mirrored images" if found.has_flip else ""
                lines.append(
                    f"{share}{part.location.text}: "
                    f"{count_of(f'{found.num_samples:,}', 'sample')}, "
                    f"{count_of(f'{len(found.shards):,}', 'shard')}, {size / 2**30:,.2f} GiB, "
                    f"{found.latent.kind} {shape} {found.latent.dtype}{flip}, "
                    f"{count_of(found.num_classes, 'class')}"
                )
        return "\n".join(lines)


def parse_data(text: str, flag: str = _FLAG) -> list[NamedSet]:
    """Understand the text of --data."""
    entries = [_parse_entry(entry, flag) for entry in split_list(text, flag)]
    if all(weight is None for _, weight in entries):
        return [NamedSet(tuple(place for places, _ in entries for place in places), 1.0)]
    return [NamedSet(places, 1.0 if weight is None else weight) for places, weight in entries]


def _parse_entry(entry: str, flag: str) -> tuple[tuple[str, ...], float | None]:
    weight, found = None, split_weight(entry)
    if found is not None:
        entry, text = found
        try:
            weight = float(text)
        except ValueError:
            weight = 0.0
        if not 0 < weight < float("inf"):
            raise ConfigError(
                f"{flag} {entry}={text}: is not there, and its weight is no number above 0; "
                "correct the name, write =3, or end a name that holds an equals sign with a slash."
            )
    return tuple(places_of(entry, flag)), weight


def in_thousandths(weights: list[float]) -> tuple[int, ...]:
    """Round weights to thousandths that sum to 1,000: the largest remainders are rounded up."""
    exact = np.array(weights) / sum(weights) * BLOCK
    rounded = np.floor(exact).astype(int)
    for i in np.argsort(rounded - exact, kind="stable")[: BLOCK - rounded.sum()]:
        rounded[i] += 1
    if rounded.min() < 1:
        smallest = weights[int(rounded.argmin())]
        raise ConfigError(
            f"{_FLAG}: the weight {smallest:g} is less than a thousandth of all; leave that data "
            "set out or raise its weight."
        )
    return tuple(rounded.tolist())


def is_absent(text: str) -> bool:
    """Tell whether --data names a folder of this machine that is not there (yet)."""
    named = [place for part in parse_data(text) for place in part.locations]
    folders = [parse_location(place, _FLAG).folder for place in named]
    return any(folder is not None and not folder.exists() for folder in folders)


def open_data(
    text: str,
    data_shards: str | None = None,
    on_failure: Callable[[str], object] = lambda text: None,
) -> TrainingData:
    """Read the descriptions of all that --data names and unite them.

    Args:
        data_shards: of --data-shards: where the tars lie, as many places; None = beside each
            dataset.json.
        on_failure: called with a sentence whenever a server failed and is waited for.

    Raises:
        ConfigError: nothing there, something damaged, or parts that do not agree.
    """
    sets = parse_data(text)
    named = [place for one in sets for place in one.locations]
    elsewhere = [None] * len(named)
    if data_shards is not None:
        places = parse_data(data_shards, "--data-shards")
        elsewhere = [place for one in places for place in one.locations]
        if len(elsewhere) != len(named):
            raise ConfigError(
                f"--data-shards {data_shards} names {count_of(len(elsewhere), 'place')} but --data "
                f"{count_of(len(named), 'data set')}; give one for each, in the same order."
            )
    found = []
    for place, tars in zip(named, elsewhere, strict=True):
        location = parse_location(place, _FLAG)
        if len(named) > 1 and location.folder is not None and not location.folder.exists():
            raise ConfigError(
                f"{_FLAG} {text}: its part {place} does not exist; correct it (a comma, = or brace "
                "belongs to a folder's name where that whole name exists)."
            )
        shard_location = location if tars is None else parse_location(tars, "--data-shards")
        manifest = _load(location, shard_location, on_failure)
        found.append((manifest, location, shard_location))
    manifests = [manifest for manifest, *_ in found]
    for manifest, location, _ in found[1:]:
        _check_agreement(manifests[0], manifest, named[0], location.text)
    weights = in_thousandths([one.weight for one in sets])
    classes = _united_classes(manifests)
    index_of = {entry.id: entry.index for entry in classes}
    parts = []
    for manifest, location, shard_location in found:
        labels = [index_of[entry.id] for entry in manifest.classes] or [0]
        parts.append(DataPart(manifest, location, shard_location, np.array(labels)))
    counts = tuple(len(one.locations) for one in sets)
    return TrainingData(_united(manifests, classes, counts, weights), tuple(parts), counts, weights)


def _load(
    location: Location, shard_location: Location, on_failure: Callable[[str], object]
) -> DatasetManifest:
    if location.folder is not None:
        return DatasetManifest.load(location.folder, check_shards=shard_location is location)
    where = location.describe(MANIFEST_NAME)
    try:
        text = read_small(location, MANIFEST_NAME, _MAX_MANIFEST_BYTES, on_failure=on_failure)
    except MissingFileError as err:
        raise ConfigError(
            f"{_FLAG} {location.text}: there is no {MANIFEST_NAME} ({where}), it is written last; "
            "check the address, or wait until the data set is complete."
        ) from err
    if said := json_message(text):
        raise ConfigError(
            f"{where}: is no {MANIFEST_NAME} but a message of the server ({said!r}); check the "
            "address, and whether it asks for a login."
        )
    return DatasetManifest.parse(text, where)


def _check_agreement(
    first: DatasetManifest, other: DatasetManifest, first_name: str, other_name: str
) -> None:
    """Refuse data sets whose samples one model cannot be trained on."""
    compared = {
        "kind of array": lambda m: m.latent.kind,
        "shape": lambda m: m.latent.shape,
        "dtype": lambda m: m.latent.dtype,
        "mirrored images": lambda m: m.latent.flip,
        "VAE's sha256": lambda m: m.vae.sha256[:12],
        "VAE's scaling and shift": lambda m: m.vae.normalisation,
        "has classes": lambda m: m.num_classes > 0,
    }
    for name, get in compared.items():
        if get(first) != get(other):
            raise ConfigError(
                f"{_FLAG}: {first_name} and {other_name} do not go together, {name}: {get(first)} "
                f"and {get(other)}; train on one of them, or encode them alike."
            )


def _united_classes(manifests: Iterable[DatasetManifest]) -> list[ClassEntry]:
    names: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for manifest in manifests:
        for entry in manifest.classes:
            names.setdefault(entry.id, entry.name)
            counts[entry.id] += entry.count
    return [ClassEntry(i, id_, name, counts[id_]) for i, (id_, name) in enumerate(names.items())]


def _united(
    manifests: list[DatasetManifest],
    classes: list[ClassEntry],
    counts: tuple[int, ...],
    weights: tuple[int, ...],
) -> DatasetManifest:
    """Describe all data sets as one; what is only told to people is that of the first."""
    first = manifests[0]
    if len(manifests) == 1:
        return first
    sources = [manifest.source for manifest in manifests]
    content = json.dumps([[m.hash for m in manifests], counts, weights])
    digest = hashlib.sha256(content.encode()).hexdigest()
    return replace(
        first,
        folder=None,
        hash=digest,
        num_samples=sum(manifest.num_samples for manifest in manifests),
        shards=[shard for manifest in manifests for shard in manifest.shards],
        statistics=_pooled(manifests),
        source=SourceList(
            sum(source.num_files for source in sources),
            sum(source.num_skipped for source in sources),
            digest,
        ),
        classes=classes,
        left_out=[],
    )


def _pooled(manifests: list[DatasetManifest]) -> ChannelStatistics:
    """Return mean and standard deviation over the samples of all data sets."""
    share = np.array([manifest.num_samples for manifest in manifests], float)[:, None]
    share /= share.sum()
    mean = np.array([manifest.statistics.mean for manifest in manifests])
    std = np.array([manifest.statistics.std for manifest in manifests])
    pooled = (share * mean).sum(axis=0)
    variance = (share * (std**2 + (mean - pooled) ** 2)).sum(axis=0)
    return ChannelStatistics(pooled.tolist(), np.sqrt(variance).tolist())
