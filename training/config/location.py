"""Find the file of a preset and the folder of a run. Imports nothing that takes time."""

from pathlib import Path

from data_tools.user_files.paths import expand

REPOSITORY = Path(__file__).resolve().parents[2]
PRESET_FOLDER = REPOSITORY / "training" / "presets"
CONFIG_FILE, DEEPSPEED_FILE = "config.yaml", "deepspeed.json"  # of a run directory


def preset_file(name_or_path: str) -> Path:
    """Return the file that --preset means: a preset's name, a YAML file, or a run directory.

    A name is a preset's even where a folder has the same name; ./NAME means the folder.
    """
    named = PRESET_FOLDER / f"{name_or_path}.yaml"
    if "/" not in name_or_path and named.is_file():
        return named
    path = Path(expand(name_or_path, "--preset"))
    if path.suffix in (".yaml", ".yml"):
        return path
    if (path / CONFIG_FILE).is_file():
        return path / CONFIG_FILE
    return named


def run_dir_of(preset: Path, said: str) -> str:
    """Return the run directory that a preset means.

    A run's own config.yaml means the run that it lies in, wherever that was moved or copied to;
    another file the run_dir that is said in it.
    """
    is_of_run = preset.name == CONFIG_FILE and (preset.parent / DEEPSPEED_FILE).is_file()
    if not is_of_run or Path(said).resolve() == preset.parent.resolve():
        return said
    return str(preset.parent)


def in_repository(path: Path) -> Path:
    """Return a path as it is, or the one in the repository if only that exists."""
    own = REPOSITORY / path
    return own if not path.exists() and own.exists() else path
