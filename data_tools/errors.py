"""ConfigError, which means that the user gave something wrong, and the words of messages."""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from data_tools.exit_codes import CONFIG_ERROR_EXIT_CODE, CRASH_EXIT_CODE

MAX_MESSAGE = 2000  # characters


class ConfigError(Exception):
    """A mistake the user can correct: what is wrong, the values, what to do, in one sentence.

    The message begins with the flag or the file at fault.
    """

    exit_code = CONFIG_ERROR_EXIT_CODE

    def __init__(self, message: str) -> None:
        """Keep the message on one line: names of files may hold line ends and odd bytes."""
        seen = one_line(message)
        if len(seen) > MAX_MESSAGE:  # somebody gave a long value
            seen = f"{seen[: MAX_MESSAGE // 2]} [...] {seen[-MAX_MESSAGE // 4 :]}"
        super().__init__(seen)


def refuse_below_one(given: argparse.Namespace, *names: str) -> None:
    """Refuse the first flag of `names` below 1; None is a flag that was not given."""
    for name in names:
        value = getattr(given, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {value}.")


def one_line(text: str) -> str:
    """Write what cannot be shown, or would end the line, with escapes."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def some(names: Sequence[str], most: int) -> str:
    """Name the first of several things: "a, b, ..."."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def count_of(number: int | str, noun: str, verb: str = "") -> str:
    """Write a number of things, and what they do: "1 shard is", "12 shards are", "2 classes".

    Args:
        number: of things; a text where it is to be written otherwise, as "1,234".
        noun: for one thing.
        verb: for several.
    """
    if str(number) == "1":
        verb = {"are": "is", "were": "was", "have": "has"}.get(verb, verb and f"{verb}s")
    else:
        noun += "es" if noun.endswith("s") else "s"
    return f"{number} {noun} {verb}".rstrip()


def first_line(err: Exception) -> str:
    """Return what an error of a library says, as a part of a sentence."""
    return (str(err).strip() or type(err).__name__).splitlines()[0].rstrip(".")


class OutageError(ConfigError):
    """A server failed for longer than we wait for it: nobody's mistake, but told in one sentence.

    It may come back by itself, so another start is worth trying, a bounded number of times.
    """

    exit_code = CRASH_EXIT_CODE


class ArgumentParser(argparse.ArgumentParser):
    """Reports a wrong command line as a ConfigError: one sentence, without the usage."""

    # Flags that people know from other programs, and what to write for them here.
    instead: Mapping[str, str] = {}

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Refuse other programs' flags by name; then parse."""
        for word in sys.argv[1:] if args is None else args:
            flag = str(word).split("=")[0]
            here = self.instead.get(flag.replace("_", "-"))
            if here and flag not in self._option_string_actions:
                raise ConfigError(f"{flag}: is no flag of {self.prog}; here it is {here}.")
        return super().parse_known_args(args, namespace)

    def add_bare_or_flag(
        self, name: str, flag: str, kind: Callable[[str], Any], metavar: str, help_text: str
    ) -> None:
        """Add a required argument that may be given bare or by a flag; `kind` makes its value."""

        def value(text: str) -> Any:  # argparse converts its mark for "not given", too
            return text if text is argparse.SUPPRESS else kind(text)

        ways = self.add_mutually_exclusive_group(required=True)
        common = {"type": value, "metavar": metavar, "default": argparse.SUPPRESS}
        ways.add_argument(name, nargs="?", help=help_text, **common)
        ways.add_argument(flag, dest=name, help="the same, as a flag", **common)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing; begin with the flag."""
        raise ConfigError(f"{message.removeprefix('argument ')}; see --help.")


@contextmanager
def os_errors_as(problem: str, advice: str) -> Iterator[None]:
    """Turn what the system refuses into a ConfigError: "PROBLEM (No such file); ADVICE."."""
    try:
        yield
    except OSError as err:
        raise ConfigError(f"{problem} ({err.strerror}); {advice}.") from err


@contextmanager
def exit_on_config_error() -> Iterator[None]:
    """Turn a ConfigError into one line on stderr and its exit code."""
    try:
        yield
    except ConfigError as err:
        sys.stderr.write(f"error: {err}\n")
        sys.exit(err.exit_code)
