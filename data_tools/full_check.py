"""Every byte of every shard, and what they hold together against dataset.json."""

import math
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data_tools.findings import Finding, Verification, expects_sidecars, read_sidecar
from data_tools.manifest import MANIFEST_NAME, DatasetManifest, Shard
from data_tools.records import sample_key
from data_tools.shard_check import ShardContent, read_shard

# dataset.json keeps 6 decimals; the order of additions costs less.
STATISTICS_TOLERANCE = 2e-6
_RELATIVE_TOLERANCE = 1e-6
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
        found = [Finding("shard", shard.name, "; ".join(content.problems))]
        found = found if content.problems else []
        if with_sidecars:
            found += _sidecar_findings(result.folder, shard, content)
        on_bytes(shard.bytes)
        return content, found

    for shard, (content, found) in zip(
        manifest.shards, pool.map(look, manifest.shards), strict=True
    ):
        result.contents[shard.name] = content
        result.findings += found
    num_shards, num_bad = len(manifest.shards), len(result.damaged("shard"))
    result.num_bytes = sum(shard.bytes for shard in manifest.shards)
    good = f"{num_shards - num_bad} of {num_shards} shards"
    result.checked.append(("size, sha256, members, shapes, finite values, labels", good))
    if with_sidecars:
        num_odd = len(result.damaged("sidecar"))
        result.checked.append(("sidecars", f"{num_shards - num_odd} of {num_shards}"))
    if num_bad:
        why = f"{num_bad} shards are damaged; verify again after the repair"
        result.skipped.append(("keys, labels and statistics of the whole set", why))
        return
    for compare in (_compare_keys, _compare_counts, _compare_statistics):
        compare(result, manifest)


def _sidecar_findings(folder: Path, shard: Shard, content: ShardContent) -> list[Finding]:
    name = shard.name.replace(".tar", ".json")
    sidecar, why = read_sidecar(folder, shard)
    if sidecar is None:
        return [Finding("sidecar", name, why)]
    if content.problems:
        return []
    totals = sidecar["totals"]
    counts = {str(label): count for label, count in content.class_counts.items()}
    if totals["class_counts"] != counts:
        return [Finding("sidecar", name, "counts other labels than the shard holds")]
    for key in ("channel_sum", "channel_square_sum"):
        computed = getattr(content, key) if content.num_samples else np.zeros(0)
        if not _are_close(totals[key], computed, _SUMS_TOLERANCE, 0.0):
            return [Finding("sidecar", name, f"its {key} is not that of the shard")]
    return []


def _are_close(stated: list[float], computed: np.ndarray, relative: float, absolute: float) -> bool:
    return len(stated) == len(computed) and np.allclose(stated, computed, relative, absolute)


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
        result.findings.append(Finding("shard", name, f"repeats sample {twice[0]}{more}"))
    result.checked.append(("no sample twice", f"{len(joined) - len(again)} keys"))


def _compare_counts(result: Verification, manifest: DatasetManifest) -> None:
    counts: Counter[int] = Counter()
    for content in result.contents.values():
        counts.update(content.class_counts)
    wrong = [e for e in manifest.classes if e.count != counts[e.index]]
    for entry in wrong:
        what = f"class {entry.name!r} counts {entry.count}, the shards hold {counts[entry.index]}"
        result.findings.append(Finding("manifest", MANIFEST_NAME, what))
    good = len(manifest.classes) - len(wrong)
    outcome = f"{good} of {len(manifest.classes)} classes" if manifest.classes else "no classes"
    result.checked.append(("samples per class", outcome))


def computed_statistics(result: Verification) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (C,) of the posterior draws of all shards."""
    assert result.manifest is not None
    _, height, width = result.manifest.latent.shape
    contents = result.contents.values()
    count = max(1, sum(content.num_samples for content in contents)) * height * width
    mean = np.sum([content.channel_sum for content in contents], axis=0) / count
    square = np.sum([content.channel_square_sum for content in contents], axis=0) / count
    return mean, np.sqrt(np.maximum(square - mean**2, 0.0))


def _compare_statistics(result: Verification, manifest: DatasetManifest) -> None:
    worst = 0.0
    for name, computed in zip(("mean", "std"), computed_statistics(result), strict=True):
        stated = getattr(manifest.statistics, name)
        if len(stated) != len(computed):
            what = f"statistics.{name} has {len(stated)} channels, the shards {len(computed)}"
            result.findings.append(Finding("manifest", MANIFEST_NAME, what))
            continue
        for channel, (old, new) in enumerate(zip(stated, computed.tolist(), strict=True)):
            worst = max(worst, abs(old - new)) if math.isfinite(old) else math.inf
            tolerance = STATISTICS_TOLERANCE + _RELATIVE_TOLERANCE * abs(new)
            if not abs(old - new) <= tolerance:
                what = f"statistics.{name}[{channel}] is {old:g}, the shards give {new:.6f}"
                result.findings.append(Finding("manifest", MANIFEST_NAME, what))
    result.checked.append(("mean and std per channel", f"differ by at most {worst:.1e}"))
