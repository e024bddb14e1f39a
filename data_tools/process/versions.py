"""Say if this runs on a Python or a torch that nobody has tried (tests/versions.sh tries them)."""

import sys
from importlib.metadata import PackageNotFoundError, version

Release = tuple[int, int]

PYTHON: tuple[Release, Release] = (3, 11), (3, 13)  # first and last
TORCH: tuple[Release, Release] = (2, 11), (2, 13)


def untried(python: Release | None = None, torch: str | None = None) -> str:
    """Return a sentence on the first of them that is not among those tried, or an empty text.

    Args:
        python: release; None = the one that runs.
        torch: version, such as "2.13.0+cpu"; None = the one that is installed.
    """
    python = sys.version_info[:2] if python is None else python
    try:
        torch = version("torch") if torch is None else torch
    except PackageNotFoundError:  # said by whoever imports it
        return ""
    major, minor, *_ = torch.split(".")
    for name, found, (first, last) in (
        ("Python", python, PYTHON),
        ("torch", (int(major), int(minor)), TORCH),
    ):
        if not first <= found <= last:
            return (
                f"{name} {_shown(found)} is untried: this program was tested on {_shown(first)} to "
                f"{_shown(last)}; install one of these if something fails."
            )
    return ""


def _shown(release: Release) -> str:
    return ".".join(map(str, release))
