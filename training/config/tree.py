"""The configuration of a run: what is trained, on which data, how long and at which rate.

A `Config` is a tree of two levels, sections and keys. It is read from plain dictionaries and
written as YAML. training/config/sections.py declares the keys.
"""

import dataclasses
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from typing import Any

import yaml

from data_tools.errors import ConfigError
from data_tools.formats import Format
from training.config.option import Option, check_value
from training.config.sections import (
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)
from training.config.wording import did_you_mean, shown


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that defines a run; the sections of a preset."""

    model: ModelConfig
    diffusion: DiffusionConfig
    data: DataConfig
    optim: OptimConfig
    run: RunConfig

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return plain nested dicts: section, key, value; as YAML and JSON know them."""
        return {
            section: {k: list(v) if isinstance(v, tuple) else v for k, v in keys.items()}
            for section, keys in dataclasses.asdict(self).items()
        }

    def to_yaml(self) -> str:
        """Return a text that `load_preset` reads back to an equal Config."""
        return yaml.safe_dump({CONFIG.key: CONFIG.newest} | self.to_dict(), sort_keys=False)


CONFIG = Format(newest=2)  # of config.yaml; a preset may leave the number out
SECTIONS: dict[str, type] = {f.name: f.type for f in dataclasses.fields(Config)}


def options() -> Iterator[Option]:
    """List every leaf in the order of the presets."""
    for section, cls in SECTIONS.items():
        hints = typing.get_type_hints(cls)
        for leaf in dataclasses.fields(cls):
            kinds = typing.get_args(hints[leaf.name]) or (hints[leaf.name],)
            kind = next(k for k in kinds if k is not types.NoneType)
            is_list = typing.get_origin(hints[leaf.name]) is tuple
            yield Option(section, leaf.name, kind, types.NoneType in kinds, is_list, leaf)


def option_named(name: str) -> Option:
    """Return one leaf; names are unique."""
    return next(leaf for leaf in options() if leaf.name == name)


def config_from_dict(values: Any, source: str) -> Config:
    """Build a Config from nested dicts; refuse unknown, missing and ill-typed keys.

    `source` is the file that messages name.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source} must hold the sections {', '.join(SECTIONS)}.")
    known = {(leaf.section, leaf.name): leaf for leaf in options()}
    for section, keys in values.items():
        if section not in SECTIONS:
            raise ConfigError(
                f"{source}: unknown section '{section}'{did_you_mean(str(section), SECTIONS)}"
            )
        if not isinstance(keys, Mapping):
            raise ConfigError(f"{source}: section '{section}' must hold keys, not {shown(keys)}.")
        for key in keys:
            if (section, key) not in known:
                hint = _hint_for_key(section, str(key), known)
                raise ConfigError(f"{source}: unknown key '{key}' in section '{section}'{hint}")
    parts: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for leaf in known.values():
        where = f"{source}: {leaf.section}.{leaf.name}"
        given = values.get(leaf.section, {})
        if leaf.name in given:
            parts[leaf.section][leaf.name] = check_value(leaf, given[leaf.name], where)
        elif leaf.field.default is MISSING:
            raise ConfigError(f"{where} is missing: {leaf.field.metadata['help']}.")
    return Config(**{section: SECTIONS[section](**keys) for section, keys in parts.items()})


def _hint_for_key(section: str, key: str, known: Iterable[tuple[str, str]]) -> str:
    homes = [home for home, name in known if name == key]
    if homes:
        return f"; it belongs in section '{homes[0]}'."
    return did_you_mean(key, [name for home, name in known if home == section])


def differences(old: Config, new: Config, of_any_kind: bool = False) -> list[str]:
    """List what would make `new` another run than `old`: "lr (0.0001 -> 0.0002)" per key.

    With of_any_kind, also what a run may change.
    """
    before, after = old.to_dict(), new.to_dict()
    return [
        f"{leaf.name} ({before[leaf.section][leaf.name]} -> {after[leaf.section][leaf.name]})"
        for leaf in options()
        if (of_any_kind or not leaf.field.metadata["may_change"])
        and before[leaf.section][leaf.name] != after[leaf.section][leaf.name]
    ]
