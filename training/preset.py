"""Presets: YAML files that hold a configuration."""

import re
from pathlib import Path
from typing import Any

import yaml

from data_tools.errors import ConfigError
from data_tools.user_text import TextError, read_text
from training.config import Config, config_from_dict
from training.option import did_you_mean

PRESET_FOLDER = Path(__file__).parent / "presets"


# A key that had another name in an older version, with what its value has become.
_RENAMED = {("optim", "ema_decay"): ("ema_decays", lambda decay: [decay])}


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
    """Read a preset by name (demo, s, b, l, xl) or any YAML file of the same form."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        names = [p.stem for p in sorted(PRESET_FOLDER.glob("*.yaml"))]
        if name_or_path not in names:
            raise ConfigError(
                f"--preset: unknown preset '{name_or_path}'{did_you_mean(name_or_path, names)}"
            )
        path = PRESET_FOLDER / f"{name_or_path}.yaml"
    try:
        values = yaml.load(read_text(path), Loader=_StrictLoader)
    except OSError as err:
        raise ConfigError(f"--preset {name_or_path}: {err.strerror}; give a YAML file.") from err
    except (yaml.YAMLError, TextError) as err:
        reason = " ".join(str(err).split())
        raise ConfigError(f"--preset {name_or_path} is not valid YAML: {reason}.") from err
    _rename(values)
    return config_from_dict(values, name_or_path if path.parent != PRESET_FOLDER else path.name)


def _rename(values: Any) -> None:
    """Give keys of older versions their present names, so that older runs can be used."""
    for (section, old), (new, convert) in _RENAMED.items():
        keys = values.get(section) if isinstance(values, dict) else None
        if isinstance(keys, dict) and old in keys and new not in keys:
            keys[new] = convert(keys.pop(old))
