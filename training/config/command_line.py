"""Read the command line of training/main.py: a preset, and one flag per configuration key."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.encoding.output import DEMO_LATENTS
from data_tools.errors import ArgumentParser, ConfigError
from data_tools.user_files.paths import typed_path
from training.config.location import (
    PRESET_FOLDER,
    REPOSITORY,
    in_repository,
    preset_file,
    run_dir_of,
)
from training.config.old_flags import OF_TRAINING
from training.config.option import EXPECTED, Option, check_value
from training.config.preset import load_preset
from training.config.tree import SECTIONS, Config, config_from_dict, options
from training.config.wording import did_you_mean

DEFAULT_PRESET = "demo"
DEFAULT_DEEPSPEED = Path("ds_configs/zero2.json")
_STATES = {"on": True, "off": False, "auto": None}  # of a switch that may be left open
_PLACES = ("data", "data_shards")  # a shell makes several words of a wildcard


@dataclass(frozen=True)
class CommandLine:
    """What the user asked for."""

    config: Config  # the preset, changed by the flags
    deepspeed: Path  # the DeepSpeed JSON file
    dry_run: bool  # print everything resolved and stop
    reschedule: bool  # let a continued run's rate follow another schedule than so far
    quiet: bool = False  # print warnings and errors only; log.txt has the rest
    notes: tuple[str, ...] = ()  # warnings about how the command was understood


def _build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="training/main.py",
        description="Train a Switch-DiT. Running the same command again continues the run.",
        epilog="Every key of a preset is also a flag; without a flag the preset's value holds.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--preset",
        default=DEFAULT_PRESET,
        metavar="NAME|FILE",
        help="training/presets/NAME.yaml, a YAML file or a run, whose own is in it (default: "
        f"{DEFAULT_PRESET})",
    )
    parser.add_argument(
        "--deepspeed",
        type=typed_path,
        default=DEFAULT_DEEPSPEED,
        metavar="JSON",
        help=f"memory and precision (default: {DEFAULT_DEEPSPEED})",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help="set by older launchers")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved configuration, sizes and memory, and write nothing",
    )
    parser.add_argument(
        "--reschedule",
        action="store_true",
        help="continue a run by a learning-rate schedule that its past has not followed",
    )
    parser.add_argument(
        "--quiet",
        action="store_true",
        help="print warnings and errors only; what is left out is in the run's log.txt",
    )
    groups = {
        section: parser.add_argument_group(section, cls.__doc__)
        for section, cls in SECTIONS.items()
    }
    for leaf in options():
        _add_flag(groups[leaf.section], leaf)
    return parser


def _add_flag(group: Any, leaf: Option) -> None:
    meta = leaf.field.metadata
    common = {"dest": leaf.name, "default": argparse.SUPPRESS, "help": meta["help"]}
    if leaf.kind is bool and leaf.is_nullable:
        group.add_argument(leaf.flag, nargs="?", const="on", metavar="|".join(_STATES), **common)
        common["help"] = f"{leaf.flag} off"
        no_flag = leaf.flag.replace("--", "--no-", 1)
        group.add_argument(no_flag, action="store_const", const="off", **common)
    elif leaf.kind is bool:
        group.add_argument(leaf.flag, action=argparse.BooleanOptionalAction, **common)
    else:
        if leaf.name in _PLACES:
            common["nargs"] = "+"
        metavar = "|".join(meta["choices"]) or {int: "N", float: "X", str: "TEXT"}[leaf.kind]
        metavar += ",..." if leaf.is_list else ""
        group.add_argument(leaf.flag, metavar=metavar, **common)


def _value_of_flag(leaf: Option, text: str | bool | list[str]) -> Any:
    """Turn a flag's text into the leaf's type; "none" is null, or the empty list."""
    value: Any = text
    if isinstance(text, list):
        value = text = ",".join(text)
    if isinstance(text, str):
        is_none = text.lower() in ("null", "none")
        if leaf.is_list:
            parts = [] if is_none else text.split(",")
            value = [_value_of_text(leaf, part.strip()) for part in parts]
        elif leaf.is_nullable and is_none:
            return None
        else:
            value = _value_of_text(leaf, text)
    return check_value(leaf, value, leaf.flag)


def _value_of_text(leaf: Option, text: str) -> Any:
    if leaf.kind is str:
        return text
    if leaf.kind is bool:
        if text not in _STATES:
            raise ConfigError(f"{leaf.flag} must be {', '.join(_STATES)}, not '{text}'.")
        return _STATES[text]
    try:
        return leaf.kind(text)
    except ValueError:
        raise ConfigError(f"{leaf.flag} must be {EXPECTED[leaf.kind]}, not '{text}'.") from None


def parse_command_line(argv: list[str] | None = None) -> CommandLine:
    """Read the preset and lay the flags over it."""
    parser = _build_parser()
    parser.instead = OF_TRAINING
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        known = [name for action in parser._actions for name in action.option_strings]
        if Path(flag).exists():
            raise ConfigError(f"{flag}: is no flag; write --preset {flag} to train by this file.")
        raise ConfigError(f"{flag}: unknown flag{did_you_mean(flag, known, '; see --help.')}")
    values = load_preset(given.preset).to_dict()
    notes = _place_preset(values, given)
    for leaf in options():
        where = f"{given.preset}: {leaf.section}.{leaf.name}"
        keys = values[leaf.section]
        if hasattr(given, leaf.name):
            keys[leaf.name] = _value_of_flag(leaf, getattr(given, leaf.name))
            where = leaf.flag
        expand = leaf.field.metadata["expands"]
        if expand is not None and keys[leaf.name] is not None:
            keys[leaf.name] = expand(keys[leaf.name], where)
    return CommandLine(
        config=config_from_dict(values, given.preset),
        deepspeed=in_repository(given.deepspeed),
        dry_run=given.dry_run,
        reschedule=given.reschedule,
        quiet=given.quiet,
        notes=notes,
    )


def _place_preset(values: dict[str, dict[str, Any]], given: argparse.Namespace) -> tuple[str, ...]:
    """Point a preset's folders to where the preset is; return warnings about that."""
    path = preset_file(given.preset)
    if path.parent == PRESET_FOLDER:  # its paths are the repository's
        data = Path(values["data"]["data"])
        is_demo = (REPOSITORY / data).resolve() == DEMO_LATENTS.resolve()
        # In the repository the path stays as written: the run's configuration must not change
        # once the demo's data have been made.
        if is_demo and not data.exists() and data.resolve() != DEMO_LATENTS.resolve():
            values["data"]["data"] = str(DEMO_LATENTS)
        return ()
    said = values["run"]["run_dir"]
    values["run"]["run_dir"] = found = run_dir_of(path, said)
    if found == said or hasattr(given, "run_dir"):
        return ()
    return (
        f"--preset {given.preset}: says run_dir {said}, and lies in the run directory {found}, "
        "which is continued; give --run-dir for another.",
    )
