"""Have the real parsers read command lines of the documentation, and print what they refused.

Standard input: a JSON list of lists, a Python file or `-m` and a module, then arguments. Standard
output: a JSON list of strings, empty where every argument was understood. Each program runs as the
command would start it, in a process of its own, until its arguments are read. What all programs
import is imported once and inherited by fork.
"""

import argparse
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.support.run_commands import run_program

UNDERSTOOD = 77
TRAINING = "training/main.py"
_parse_known_args = argparse.ArgumentParser.parse_known_args


def parse_and_leave(parser, args=None, namespace=None):
    """Parse; where nothing is left over, the program has read its arguments."""
    known, unknown = _parse_known_args(parser, args, namespace)
    if unknown:  # an error, or for another parser of the same program
        return known, unknown
    os._exit(UNDERSTOOD)


def run_until_parsed(program, arguments):
    if program == TRAINING:  # its parser leaves values to what reads them
        from training.config.command_line import parse_command_line

        parse_command_line(arguments)
        os._exit(UNDERSTOOD)
    argparse.ArgumentParser.parse_known_args = parse_and_leave
    run_program(program, arguments)


def refusal(program, *arguments):
    """What a program says instead of understanding its arguments."""
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            try:
                run_until_parsed(program, list(arguments))
            except BaseException as err:  # noqa: BLE001 -- told by the caller
                os.write(2, f"{type(err).__name__}: {err}".encode())
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        return "" if status == UNDERSTOOD else f"exit code {status}: {said.read()}"


if __name__ == "__main__":
    commands = json.load(sys.stdin)
    for name in {command[0] for command in commands if command[0] != "-m"}:
        importlib.import_module(name.removesuffix(".py").replace("/", "."))
    print(json.dumps([refusal(*command) for command in commands]))
