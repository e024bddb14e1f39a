"""Run command lines of the documentation, one after another, in the folder that this starts in.

Standard input: a JSON list of lists, a Python file or `-m` and a module, then arguments. Standard
output: for every command a line of JSON, its exit code and what it said. Each runs whole, in a
process of its own; what all programs import is imported once and inherited by fork.
"""

import importlib
import json
import os
import runpy
import signal
import sys
import tempfile
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parents[2])
LIMIT_SEC = 240


def run_program(program, arguments):
    """Be a fresh interpreter with this command line."""
    if program == "-m":
        sys.argv = ["", *arguments[1:]]
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [program, *arguments]
        sys.path[0] = str(Path(program).parent)
        runpy.run_path(program, run_name="__main__")


def exit_code_of(program, arguments):
    """Run a command in this process; return what an interpreter would."""
    try:
        run_program(program, arguments)
    except SystemExit as err:
        if isinstance(err.code, str):
            print(err.code, file=sys.stderr)
            return 1
        return err.code or 0
    return 0


def outcome(program, *arguments):
    """Run a command in a process of its own; return its exit code and output."""
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            os.setsid()
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            signal.alarm(LIMIT_SEC)
            code = 1
            try:
                code = exit_code_of(program, list(arguments))
            finally:
                if sys.exc_info()[0]:
                    sys.excepthook(*sys.exc_info())
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        return code, said.read()


if __name__ == "__main__":
    from training.engine.deepspeed_internals import import_muon_uncompiled

    torch.set_num_threads(1)
    import_muon_uncompiled()
    commands = json.load(sys.stdin)
    for name in {command[0] for command in commands if command[0] != "-m"}:
        importlib.import_module(name.removesuffix(".py").replace("/", "."))
    for command in commands:
        print(json.dumps(outcome(*command)), flush=True)
