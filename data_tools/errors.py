"""The one exception that means "the user gave something wrong", and how entry points report it."""

import argparse
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

CONFIG_ERROR_EXIT_CODE = 2
MAX_MESSAGE = 2000  # characters


class ConfigError(Exception):
    """A mistake the user can correct: what is wrong, the values, what to do, in one sentence.

    The message begins with the flag or the file at fault. What cannot be seen in it, such as a line
    break in a file's name, is written as an escape, so that it stays one line.
    """

    exit_code = CONFIG_ERROR_EXIT_CODE

    def __init__(self, message: str) -> None:
        seen = "".join(map(_visible, message))
        if len(seen) > MAX_MESSAGE:  # somebody gave a long value
            seen = f"{seen[: MAX_MESSAGE // 2]} [...] {seen[-MAX_MESSAGE // 4 :]}"
        super().__init__(seen)


def _visible(character: str) -> str:
    """Return a character, or how Python writes it if it controls a terminal."""
    controls = unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp")
    return repr(character)[1:-1] if controls else character


class OutageError(ConfigError):
    """Nobody's mistake, though said like one: a server failed for longer than we wait for it.

    It may come back by itself, so another start is worth trying, a bounded number of times.
    """

    exit_code = 1


class ArgumentParser(argparse.ArgumentParser):
    """Reports a wrong command line as a ConfigError: one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing; begin with the flag."""
        raise ConfigError(f"{message.removeprefix('argument ')}; see --help.")


@contextmanager
def exit_on_config_error(is_reporter: bool = True) -> Iterator[None]:
    """Turn a ConfigError into one line on stderr and its exit code.

    Args:
        is_reporter: False on ranks that stay silent, so that N processes print one sentence.
    """
    try:
        yield
    except ConfigError as err:
        if is_reporter:
            sys.stderr.write(f"error: {err}\n")
        sys.exit(err.exit_code)
