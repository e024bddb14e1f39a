"""Read presets: YAML files that hold a configuration."""

import re
import sys
from functools import cache
from typing import Any

import yaml

from data_tools.errors import ConfigError
from data_tools.files import MalformedError
from data_tools.user_files.user_text import read_text
from training.config.location import PRESET_FOLDER, preset_file
from training.config.tree import CONFIG, Config, config_from_dict
from training.config.wording import did_you_mean

# A key that had another name in an older version, with what its value has become.
_RENAMED = {("optim", "ema_decay"): ("ema_decays", lambda decay: [decay])}
# A key that older versions had, with what became of it: a sentence without its full stop.
_REMOVED: dict[tuple[str, str], str] = {}


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a repeated key and reads 1e-4 as a number, as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key, (key_node, _) in zip(keys, node.value, strict=True):
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key}' is given twice", key_node.start_mark
                )
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def load_preset(name_or_path: str) -> Config:
    """Read a preset by name (demo, s, b, l, xl), a YAML file of the same form, or a run's own."""
    path = preset_file(name_or_path)
    names = [p.stem for p in sorted(PRESET_FOLDER.glob("*.yaml"))]
    if path.parent == PRESET_FOLDER and path.stem not in names:
        raise ConfigError(
            f"--preset: unknown preset '{name_or_path}'{did_you_mean(name_or_path, names)}"
        )
    try:
        values = yaml.load(read_text(path), Loader=_StrictLoader)
    except OSError as err:
        raise ConfigError(f"--preset {name_or_path}: {err.strerror}; give a YAML file.") from err
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as err:
        reason = " ".join(str(err).split()).rstrip(".")
        raise ConfigError(f"--preset {name_or_path} is not valid YAML: {reason}.") from err
    try:
        values = CONFIG.parse(values, f"--preset {name_or_path}")
    except MalformedError as err:
        raise ConfigError(f"--preset {name_or_path}: {err}; give a whole number.") from err
    source = name_or_path if path.parent != PRESET_FOLDER else path.name
    _bring_up_to_date(values, source)
    return config_from_dict(values, source)


def _bring_up_to_date(values: Any, source: str) -> None:
    """Give keys of older versions their present names; drop those without one, and say so."""
    sections = values.items() if isinstance(values, dict) else ()
    parts = {section: keys for section, keys in sections if isinstance(keys, dict)}
    for (section, old), (new, convert) in _RENAMED.items():
        keys = parts.get(section, {})
        if old in keys and new not in keys:
            keys[new] = convert(keys.pop(old))
    for (section, key), why in _REMOVED.items():
        if key in parts.get(section, {}):
            _say_once(f"{source}: {section}.{key} ({parts[section].pop(key)}) is left out: {why}")


@cache
def _say_once(text: str) -> None:
    sys.stderr.write(f"warning: {text}.\n")
