"""Check every byte of every shard, and compare the whole set with dataset.json."""

import math
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from data_tools.errors import count_of
from data_tools.shards.manifest import MANIFEST_NAME, ChannelStatistics, DatasetManifest, Shard
from data_tools.shards.records import sample_key
from data_tools.shards.shard_check import OTHER_BYTES, ShardContent, read_shard
from data_tools.shards.sidecar import label_counts, statistics_of
from data_tools.verification.findings import Finding, Verification, expects_sidecars, read_sidecar

# dataset.json keeps 6 decimals; the order of additions costs less.
STATISTICS_TOLERANCE = 2e-6
_RELATIVE_TOLERANCE = 1e-6
OTHER_LABELS = "counts other labels than the shard holds"
_SUMS_TOLERANCE = 1e-9  # relative: sidecars keep all digits


def run_full(
    result: Verification,
    manifest: DatasetManifest,
    pool: ThreadPoolExecutor,
    on_bytes: Callable[[int], object],
    known: dict[str, ShardContent],
) -> None:
    """Read every shard, `known` sound ones excepted, then compare the whole set."""
    with_sidecars = expects_sidecars(result, manifest)

    def look(shard: Shard) -> tuple[ShardContent, list[Finding]]:
        content = known.get(shard.name)
        if content is None or content.problems or content.digest != shard.sha256:
            content = read_shard(result.folder, shard, manifest)
        sidecar, why = read_sidecar(result.folder, shard, True) if with_sidecars else (None, "")
        if content.problems == [OTHER_BYTES]:
            content.problems = [_what_changed(content, sidecar, has_flip=manifest.latent.flip)]
        found = []
        if content.problems:
            found.append(Finding("shard", shard.name, "; ".join(content.problems)))
        elif sidecar is not None:
            why = why or _differing_sums(sidecar, content)
        if why:
            found.append(Finding("sidecar", shard.sidecar, why))
        on_bytes(shard.bytes)
        return content, found

    shards = manifest.shards
    for shard, (content, found) in zip(shards, pool.map(look, shards), strict=True):
        result.contents[shard.name] = content
        result.findings += found
    result.count_sound("size, sha256, members, shapes, finite values, labels", with_sidecars)
    if num_bad := len(result.damaged("shard")):
        why = f"{count_of(num_bad, 'shard', 'are')} damaged; verify again after the repair"
        result.skipped.append(("keys, labels and statistics of the whole set", why))
        return
    for compare in (_compare_keys, _compare_counts, _compare_statistics):
        compare(result, manifest)


def _what_changed(content: ShardContent, sidecar: dict[str, Any] | None, has_flip: bool) -> str:
    """Narrow down what differs in a shard that looks sound and has another checksum."""
    if sidecar is None:
        return f"{OTHER_BYTES}, though every header is sound: values or labels were changed"
    if sidecar["shard"]["sha256"] == content.digest:
        return f"{OTHER_BYTES}, but that of its sidecar: the two are from different encodings"
    difference = _differing_sums(sidecar, content)
    changed = f"values{' of mirrored images' if has_flip else ''} or padding"
    if difference:
        changed = "labels" if difference == OTHER_LABELS else "values"
    return f"{OTHER_BYTES}, though every header is sound: {changed} were changed"


def _differing_sums(sidecar: dict[str, Any], content: ShardContent) -> str:
    """Say what a sidecar states and the shard does not hold; "" if they agree."""
    stated, found = sidecar["totals"], content.totals
    if stated["class_counts"] != found.class_counts:
        return OTHER_LABELS
    for key in ("channel_sum", "channel_square_sum"):
        old, new = stated[key], getattr(found, key)
        if len(old) != len(new) or not np.allclose(old, new, _SUMS_TOLERANCE, 0.0):
            return f"its {key} is not that of the shard"
    return ""


def _compare_keys(result: Verification, manifest: DatasetManifest) -> None:
    """Find samples that occur twice in the set; the keys of tars by others may repeat per tar."""
    shards = [shard for shard in manifest.shards if shard.stride]
    keys = [result.contents[shard.name].keys.astype(np.int32) for shard in shards]
    if not keys:
        return
    joined = np.concatenate(keys)
    order = np.argsort(joined, kind="stable")
    again = np.flatnonzero(joined[order][1:] == joined[order][:-1])
    ends = np.cumsum([len(part) for part in keys])
    names: dict[str, list[str]] = {}
    for place in again.tolist():
        first, second = (
            shards[int(np.searchsorted(ends, order[place + step], side="right"))].name
            for step in (0, 1)
        )
        names.setdefault(second, []).append(f"{sample_key(int(joined[order[place]]))} of {first}")
    for name, twice in names.items():
        more = f" and {len(twice) - 1} more" if len(twice) > 1 else ""
        result.add("shard", name, f"repeats sample {twice[0]}{more}")
    result.checked.append(("no sample twice", f"{len(joined) - len(again)} keys"))


def _compare_counts(result: Verification, manifest: DatasetManifest) -> None:
    counts = class_counts(result)
    wrong = [e for e in manifest.classes if e.count != counts[e.index]]
    for entry in wrong:
        what = f"class {entry.name!r} counts {entry.count}, the shards hold {counts[entry.index]}"
        result.add("manifest", MANIFEST_NAME, what)
    good = len(manifest.classes) - len(wrong)
    outcome = f"{good} of {len(manifest.classes)} classes" if manifest.classes else "no classes"
    result.checked.append(("samples per class", outcome))


def class_counts(result: Verification) -> Counter[int]:
    """Count the samples of each label in all shards."""
    return label_counts(content.totals for content in result.contents.values())


def computed_statistics(result: Verification) -> ChannelStatistics:
    """Mean and standard deviation (C,) of the posterior draws of all shards."""
    assert result.manifest is not None
    _, height, width = result.manifest.latent.shape
    contents = result.contents.values()
    num_samples = sum(content.num_samples for content in contents)
    return statistics_of([content.totals for content in contents], num_samples, height * width)


def _compare_statistics(result: Verification, manifest: DatasetManifest) -> None:
    worst, computed = 0.0, computed_statistics(result)
    for name in ("mean", "std"):
        stated, found = getattr(manifest.statistics, name), getattr(computed, name)
        if len(stated) != len(found):
            what = f"statistics.{name} has {len(stated)} channels, the shards {len(found)}"
            result.add("manifest", MANIFEST_NAME, what)
            continue
        for channel, (old, new) in enumerate(zip(stated, found, strict=True)):
            difference = abs(old - new) if math.isfinite(old) else math.inf
            worst = max(worst, difference)
            if difference > STATISTICS_TOLERANCE + _RELATIVE_TOLERANCE * abs(new):
                what = f"statistics.{name}[{channel}] is {old:g}, the shards give {new:g}"
                result.add("manifest", MANIFEST_NAME, what)
    result.checked.append(("mean and std per channel", f"differ by at most {worst:.1e}"))
