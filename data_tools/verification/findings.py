"""The result of a verification: its findings; and the check of the sidecars."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.errors import count_of
from data_tools.files import MalformedError, from_json, parse_json
from data_tools.formats import stored_values
from data_tools.shards.manifest import DatasetManifest, Shard
from data_tools.shards.shard_check import ShardContent
from data_tools.shards.sidecar import SIDECAR, ShardTotals
from data_tools.shards.undescribed import SETTINGS_NAME


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be."""

    part: str  # "shard", "sidecar", "manifest", or "note": worth knowing, and no damage
    name: str  # of the file
    what: str  # is wrong with it, a clause that follows the name


@dataclass
class Verification:
    """What was looked at and what was found."""

    folder: Path
    is_quick: bool  # only sizes, names and first and last samples were looked at
    manifest: DatasetManifest | None = None  # None if it is missing or malformed
    findings: list[Finding] = field(default_factory=list)  # in the order of the shards
    contents: dict[str, ShardContent] = field(default_factory=dict)  # full checks only
    checked: list[tuple[str, str]] = field(default_factory=list)  # what, and with what outcome
    skipped: list[tuple[str, str]] = field(default_factory=list)  # what, and why

    def damaged(self, *parts: str) -> list[str]:
        """Name the files with findings of these parts, all but notes if none is given."""
        wanted = parts or ("shard", "sidecar", "manifest")
        return list(dict.fromkeys(f.name for f in self.findings if f.part in wanted))

    def add(self, part: str, name: str, what: str) -> None:
        """Add a finding."""
        self.findings.append(Finding(part, name, what))

    def count_sound(self, what: str, with_sidecars: bool) -> None:
        """Note in how many shards, and sidecars, nothing was found when `what` was compared."""
        assert self.manifest is not None
        number = len(self.manifest.shards)
        num_bad, num_odd = len(self.damaged("shard")), len(self.damaged("sidecar"))
        self.checked.append((what, f"{number - num_bad} of {count_of(number, 'shard')}"))
        if with_sidecars:
            self.checked.append(("sidecars", f"{number - num_odd} of {number}"))


def expects_sidecars(result: Verification, manifest: DatasetManifest) -> bool:
    """Whether sidecars are to be expected: a copy for training only may come without."""
    if not manifest.has_own_layout:
        return False
    if (result.folder / SETTINGS_NAME).exists():
        return True
    result.add("note", SETTINGS_NAME, "is missing: training does not need it, --repair does")
    return any((result.folder / s.sidecar).exists() for s in manifest.shards[:1])


def read_sidecar(
    folder: Path, shard: Shard, with_totals: bool
) -> tuple[dict[str, Any] | None, str]:
    """Read the sidecar of a shard, and check its totals if they will be used.

    Returns:
        its content, None if it cannot be used at all; and what is wrong with it, "" if it agrees
        with dataset.json.

    Raises:
        NewerFormatError: a later version wrote it, so it is not to be written anew.
    """
    path = folder / shard.sidecar
    try:
        content = parse_json(path.read_bytes())
        SIDECAR.check(content, str(path))
        if with_totals:
            from_json(ShardTotals, content["totals"])
        found = content["shard"]
        differs = [name for name, value in stored_values(shard).items() if found[name] != value]
    except FileNotFoundError:
        return None, "is missing"
    except OSError as err:
        return None, f"cannot be read ({err.strerror})"
    except (ValueError, KeyError, TypeError, MalformedError):
        return None, "is no sidecar"
    return content, f"disagrees with dataset.json on {', '.join(differs)}" if differs else ""
