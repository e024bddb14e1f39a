"""Print what a configuration amounts to: parameters, FLOPs, memory per rank, steps per epoch.

    python -m training.count --preset xl --deepspeed ds_configs/zero2.json --world-size 64 --bf16

Nothing is allocated. Every flag of training/main.py is understood; `training/main.py --dry-run`
prints the same and the resolved configuration.
"""

import argparse
import os
import sys
from pathlib import Path

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data_tools.errors import ArgumentParser, exit_on_config_error, refuse_below_one
from data_tools.process.entry_point import enter
from training.config.command_line import parse_command_line
from training.config.deepspeed_config import merge_deepspeed
from training.config.precision import Hardware, detect_hardware
from training.config.validation import validate
from training.cost.closed_forms import cost_sections, join_sections


def main(argv: list[str] | None = None) -> None:
    """Print what the command line amounts to on a number of ranks."""
    parser = ArgumentParser(
        prog="python -m training.count",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--world-size", type=int, default=1, metavar="N", help="ranks")
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=None,
        help='the ranks\' hardware multiplies bf16, for "auto" precision; default: as this machine',
    )
    # Nothing runs here, so DeepSpeed need not look for accelerators.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with exit_on_config_error():
        own, rest = parser.parse_known_args(argv)
        refuse_below_one(own, "world_size")
        command = parse_command_line(rest)
        hardware = detect_hardware()
        if own.bf16 is not None:
            hardware = Hardware("the ranks' hardware", own.bf16)
        merged = merge_deepspeed(command.deepspeed, command.config, own.world_size, hardware)
        validate(command.config, command.deepspeed, own.world_size)
        print(join_sections(cost_sections(command.config, merged, own.world_size)))


if __name__ == "__main__":
    enter(main, prints_result=True)
