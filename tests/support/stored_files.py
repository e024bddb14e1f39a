"""What earlier versions of this program wrote (tests/formats), unpacked for a test to read."""

import shutil
import tarfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "formats"
VERSIONS = sorted(path.name for path in FOLDER.iterdir() if (path / "large.tar.xz").is_file())


def unpack(version, folder):
    """Copy what a version wrote into a folder, which is made, and return it."""
    shutil.copytree(FOLDER / version, folder)
    with tarfile.open(folder / "large.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder
