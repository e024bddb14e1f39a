"""Draw the demo image set: ten classes of emoji, one folder per class.

python data_tools/make_demo_images.py --output datasets/demo_images --size 64 --per-class 120
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data_tools.errors import ArgumentParser, ConfigError, refuse_below_one
from data_tools.process.entry_point import enter
from data_tools.sources.emoji import (
    DEMO_IMAGES,
    DEMO_PER_CLASS,
    DEMO_SIZE,
    emoji_classes,
    make_demo_images,
)
from data_tools.user_files.paths import typed_path

MIN_SIZE = 8


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Define the flags and check their values."""
    parser = ArgumentParser(
        description="Draw the demo image set: ten classes of emoji (OpenMoji, CC BY-SA 4.0)."
    )
    add, shown = parser.add_argument, "default: %(default)s"
    add("--output", type=typed_path, default=DEMO_IMAGES, metavar="FOLDER", help=shown)
    add("--size", type=int, default=DEMO_SIZE, metavar="PIXELS", help=shown)
    most = f"pictures per class at most ({shown})"
    add("--per-class", type=int, default=DEMO_PER_CLASS, metavar="N", help=most)
    args = parser.parse_args(argv)
    if args.size < MIN_SIZE:
        raise ConfigError(f"--size {args.size}: must be at least {MIN_SIZE} pixels.")
    refuse_below_one(args, "per_class")
    if args.output.exists() and not args.output.is_dir():
        raise ConfigError(f"--output {args.output}: is a file; give a folder.")
    return args


def main(argv: list[str] | None = None) -> None:
    """Draw the set and say where it is."""
    args = parse_arguments(argv)
    count = make_demo_images(args.output, args.size, args.per_class)
    print(f"{args.output}: {count} pictures in {len(emoji_classes())} classes")


if __name__ == "__main__":
    enter(main)
