"""Write the result of a verification as one page of text."""

from collections.abc import Iterable
from pathlib import Path

from data_tools.errors import count_of
from data_tools.shards.manifest import MANIFEST_NAME
from data_tools.shards.undescribed import SETTINGS_NAME
from data_tools.sources import left_out
from data_tools.verification.findings import Verification

MAX_FINDINGS = 30  # one page; --report holds all
_MAX_NAMES = 12  # in the closing sentence
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def readable_bytes(count: float) -> str:
    """Write a number of bytes with a unit, "12.4 MiB"."""
    for unit in _UNITS[:-1]:
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {_UNITS[-1]}"


def table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Align the columns of some rows, indented."""
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = (map(str.ljust, row, widths) for row in rows)
    return [f"  {'  '.join(cells)}".rstrip() for cells in padded]


def report(
    result: Verification,
    seconds: float,
    repaired: list[str] | None = None,
    max_findings: int | None = MAX_FINDINGS,
) -> str:
    """Write what was checked, what was found, and what to do.

    Args:
        result: of the last check, which took `seconds`.
        repaired: what was repaired before it, one clause per file.
        max_findings: rows of the table; None = all.
    """
    kind = "quick" if result.is_quick else "full"
    lines = [f"{result.folder}: {kind} check, {seconds:.1f} s"]
    if result.manifest is not None:
        num_bytes = sum(shard.bytes for shard in result.manifest.shards)
        lines.append(
            f"{count_of(result.manifest.num_samples, 'sample')} in "
            f"{count_of(len(result.manifest.shards), 'shard')}, "
            f"{readable_bytes(num_bytes)}, data set {result.manifest.hash[:12]}"
        )
        if result.manifest.left_out:
            lines.append(f"left out of it: {left_out.sentence(result.manifest.left_out)}")
    if repaired:
        lines += ["", "repaired", *(f"  {line}" for line in repaired)]
    if result.checked:
        lines += ["", "checked", *table(result.checked)]
    if result.skipped:
        lines += ["", "not checked", *table(result.skipped)]
    found = [(finding.name, finding.what) for finding in result.findings]
    if found:
        lines += ["", "found", *table(found[:max_findings])]
        if max_findings is not None and len(found) > max_findings:
            lines.append(f"  ... and {len(found) - max_findings} more; --report FILE holds all")
    if result.damaged():
        lines += ["", "what to do", *(f"  {line}" for line in _advice(result))]
    else:
        lines += ["", "intact" + (" as far as a quick check tells" if result.is_quick else "")]
    return "\n".join(lines) + "\n"


def _advice(result: Verification) -> list[str]:
    command = f"python data_tools/verify_shards.py --data {result.folder} --repair"
    is_foreign = result.manifest is not None and not result.manifest.has_own_layout
    lines = []
    if result.manifest is None:
        lines.append(f"{MANIFEST_NAME}: copy it again, or write it anew from the sidecars:")
        lines.append(f"  {command} --input IMAGES")
    if result.damaged("shard"):
        if is_foreign:
            lines.append("shards: fetch them again, or index the set again if they were replaced")
        elif (result.folder / SETTINGS_NAME).exists():
            lines.append("shards: copy them again, or encode only these again from the images:")
            lines.append(f"  {command} --input IMAGES")
        else:
            why = f"without {SETTINGS_NAME} they cannot be repaired"
            lines.append(f"shards: copy them again; {why}")
    elif result.damaged("sidecar", "manifest") and result.manifest is not None:
        if is_foreign:
            lines.append(f"{MANIFEST_NAME}: index the set again")
        else:
            lines.append(f"{', '.join(_shown(result.damaged()))}: write anew from the shards:")
            lines.append(f"  {command}{' (the full check first)' if result.is_quick else ''}")
    return lines


def _shown(names: list[str]) -> list[str]:
    more = [f"{len(names) - _MAX_NAMES} more"] if len(names) > _MAX_NAMES else []
    return names[:_MAX_NAMES] + more


def sentence(result: Verification, report_path: Path | None) -> str:
    """Say in one sentence what is damaged, for stderr."""
    shards, others = result.damaged("shard"), result.damaged("sidecar", "manifest")
    parts = []
    if shards:
        number = len(result.manifest.shards) if result.manifest else "?"
        verb = "is" if len(shards) == 1 else "are"
        whole = count_of(number, "shard")
        parts.append(f"{len(shards)} of {whole} {verb} damaged: {', '.join(_shown(shards))}")
    if others:
        verb = "is" if len(others) == 1 else "are"
        parts.append(f"{', '.join(_shown(others))} {verb} wrong or missing")
    where = f"the report {report_path}" if report_path else "the report above"
    return f"--data {result.folder}: {' and '.join(parts)}; do what {where} says."
