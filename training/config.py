"""Configuration: what is trained, on which data, how long and at which rate.

One tree of frozen dataclasses. Every leaf is a key of a YAML preset and, under the same name, a
flag; type, one-line help, allowed values and default are stated here once. Memory and precision
belong to ds_configs/*.json, machines to slurm/*.sh.
"""

import dataclasses
import difflib
import math
import operator
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from data_tools.errors import ConfigError
from models.switch_dit import MODEL_SIZES

PRESET_FOLDER = Path(__file__).parent / "presets"
EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


def option(
    help_text: str,
    default: Any = MISSING,
    *,
    choices: tuple[str, ...] = (),
    bounds: str = "",
    may_change: bool = False,
) -> Any:
    """Declare one key.

    Args:
        help_text: one line: meaning, unit, what null or 0 means.
        default: without one, every preset must state the key.
        choices: the allowed texts, where there are few.
        bounds: comparisons that the value must satisfy, such as ">=0 <1".
        may_change: a run directory may be continued with another value.
    """
    metadata = {"help": help_text, "choices": choices, "bounds": bounds, "may_change": may_change}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network."""

    size: str = option("depth and width, as in the paper", choices=tuple(MODEL_SIZES))
    patch_size: int = option("side of a patch, in latent pixels", bounds=">=1")
    latent_channels: int = option("channels of the VAE's latents", bounds=">=1")
    latent_size: int = option("height and width of the latents, in latent pixels", bounds=">=1")
    num_classes: int = option("number of classes; 0 = unconditional", bounds=">=0")
    num_experts: int = option("experts per block (E)", 3, bounds=">=1")
    top_k: int = option("experts that serve one timestep (k)", 2, bounds=">=1")
    activation_checkpointing: bool = option(
        "recompute block activations in backward: less memory, about a third more time",
        False,
        may_change=True,
    )


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The diffusion process and the prior on routing."""

    noise_schedule: str = option("noise schedule", "cosine", choices=("cosine", "linear"))
    num_timesteps: int = option("diffusion timesteps", 1000, bounds=">=2")
    prior_loss_weight: float = option("weight of the diffusion prior's loss", 1.0, bounds=">=0")
    prior_alpha: float = option("exponent of the prior's window over timesteps", 4.0, bounds=">0")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The encoded images and what is drawn at random from them."""

    data: str = option("folder of encoded latents (with dataset.json)", may_change=True)
    shuffle_window: int = option("shards that samples are shuffled across", 16, bounds=">=1")
    horizontal_flip: bool = option("mirror half of the samples", True)
    class_dropout_prob: float = option(
        "chance that a label becomes the null class, for guidance", 0.1, bounds=">=0 <=1"
    )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, the average of the weights, and the batch."""

    lr: float = option("learning rate", bounds=">0")
    beta1: float = option("Adam's decay of the first moment", 0.9, bounds=">=0 <1")
    beta2: float = option("Adam's decay of the second moment", 0.999, bounds=">=0 <1")
    weight_decay: float = option("AdamW's weight decay", 0.0, bounds=">=0")
    warmup_steps: int = option("steps over which the learning rate rises", bounds=">=0")
    gradient_clipping: float = option("largest global gradient norm; 0 = off", bounds=">=0")
    ema_decay: float = option("decay of the weights' average, per step", 0.9999, bounds=">=0 <1")
    ema_warmup: bool = option("limit the decay to (1 + step) / (10 + step) in early steps")
    global_batch_size: int = option("samples per step, over all ranks", bounds=">=1")
    micro_batch_size: int | None = option(
        "samples per rank and forward pass; null = no accumulation",
        None,
        bounds=">=1",
        may_change=True,
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run directory and what is written to it when."""

    run_dir: str = option("folder of the run; starting again continues it", may_change=True)
    seed: int = option("seed of everything random", bounds=">=0")
    max_steps: int = option("steps to train", bounds=">=1", may_change=True)
    expert_parallel_size: int = option(
        "ranks that share one set of experts", 1, bounds=">=1", may_change=True
    )
    log_every: int = option("steps between log lines", bounds=">=1", may_change=True)
    save_every: int = option("steps between checkpoints", bounds=">=1", may_change=True)
    keep_last: int = option("newest checkpoints kept", bounds=">=1", may_change=True)
    sample_every: int = option("steps between sample grids; 0 = off", bounds=">=0", may_change=True)
    sample_count: int = option("images in a sample grid", bounds=">=1", may_change=True)
    sample_steps: int = option("sampling steps of the grid", bounds=">=1", may_change=True)
    sample_cfg_scale: float = option(
        "classifier-free guidance of the grid; 1 = none", bounds=">=0", may_change=True
    )
    vae: str | None = option(
        "VAE that decodes the grid: folder, file or hub id; null = the one that encoded the data",
        None,
        may_change=True,
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that defines a run; the sections of a preset."""

    model: ModelConfig
    diffusion: DiffusionConfig
    data: DataConfig
    optim: OptimConfig
    run: RunConfig

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return plain nested dicts: section, key, value."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """Return a text that `load_preset` reads back to an equal Config."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


class Option(NamedTuple):
    """One leaf of the tree."""

    section: str
    name: str
    kind: type  # int, float, bool or str
    is_nullable: bool
    field: dataclasses.Field

    @property
    def flag(self) -> str:
        """The leaf's command-line spelling."""
        return "--" + self.name.replace("_", "-")


SECTIONS: dict[str, type] = {f.name: f.type for f in dataclasses.fields(Config)}


def options() -> Iterator[Option]:
    """List every leaf in the order of the presets."""
    for section, cls in SECTIONS.items():
        hints = typing.get_type_hints(cls)
        for leaf in dataclasses.fields(cls):
            kinds = typing.get_args(hints[leaf.name]) or (hints[leaf.name],)
            kind = next(k for k in kinds if k is not types.NoneType)
            yield Option(section, leaf.name, kind, types.NoneType in kinds, leaf)


def did_you_mean(wrong: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """Return "; did you mean 'x'?" for the closest known word.

    Args:
        wrong: what was given.
        known: the words to choose from.
        otherwise: returned when no word is close; None = a list of all words.
    """
    known = list(known)
    lower = {word.lower(): word for word in known}
    close = difflib.get_close_matches(wrong.lower(), lower, n=1)
    if close:
        return f"; did you mean '{lower[close[0]]}'?"
    return f"; choose one of: {', '.join(known)}." if otherwise is None else otherwise


def check_value(leaf: Option, value: Any, where: str) -> Any:
    """Return `value` if it has the leaf's type and is allowed, else raise ConfigError.

    Args:
        leaf: the key.
        value: from YAML or a parsed flag.
        where: the key as the user knows it: "file.yaml: optim.lr" or "--lr".
    """
    if value is None and leaf.is_nullable:
        return None
    if leaf.kind is float and type(value) is int:
        value = float(value)
    if type(value) is not leaf.kind:
        null = " or null" if leaf.is_nullable else ""
        raise ConfigError(f"{where} must be {EXPECTED[leaf.kind]}{null}, not {value!r}.")
    if value == "":
        raise ConfigError(f"{where} is empty; give a text.")
    choices = leaf.field.metadata["choices"]
    if choices and value not in choices:
        raise ConfigError(f"{where}: unknown value '{value}'{did_you_mean(value, choices)}")
    bounds = leaf.field.metadata["bounds"]
    for sign, limit in re.findall(r"([<>]=?)([\d.]+)", bounds):
        if not (_COMPARE[sign](value, float(limit)) and math.isfinite(value)):
            raise ConfigError(f"{where} must be {bounds.replace(' ', ' and ')}, not {value}.")
    return value


def config_from_dict(values: Any, source: str) -> Config:
    """Build a Config from nested dicts; refuse unknown, missing and ill-typed keys.

    Args:
        values: section, key, value, as YAML gives them.
        source: file named in error messages.
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
            raise ConfigError(f"{source}: section '{section}' must hold keys, not {keys!r}.")
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
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as err:
        raise ConfigError(f"--preset {name_or_path}: {err.strerror}; give a YAML file.") from err
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        reason = " ".join(str(err).split())
        raise ConfigError(f"--preset {name_or_path} is not valid YAML: {reason}.") from err
    return config_from_dict(values, name_or_path if path.parent != PRESET_FOLDER else path.name)


def differences(old: Config, new: Config) -> list[str]:
    """List what would make `new` another run than `old`: "lr (0.0001 -> 0.0002)" per key."""
    before, after = old.to_dict(), new.to_dict()
    return [
        f"{leaf.name} ({before[leaf.section][leaf.name]} -> {after[leaf.section][leaf.name]})"
        for leaf in options()
        if not leaf.field.metadata["may_change"]
        and before[leaf.section][leaf.name] != after[leaf.section][leaf.name]
    ]
