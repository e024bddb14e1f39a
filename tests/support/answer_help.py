"""Run scripts with --help, each in a process of its own, and print what they print as JSON.

Started from any folder: answer_help.py SCRIPT... Every script runs as `python SCRIPT --help`
does, with its own folder first on sys.path and nothing of this repository imported. Torch
and diffusers, which take seconds, are imported once and inherited by fork.
"""

import contextlib
import io
import json
import os
import runpy
import sys
import traceback
from pathlib import Path

import torch  # noqa: F401 -- inherited by the scripts
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler  # noqa: F401 -- inherited


def answer(script):
    """The script's exit status and what it printed."""
    sys.argv = [script, "--help"]
    sys.path[0] = str(Path(script).parent)
    output, status = io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            status = end.code
        except Exception:  # noqa: BLE001 -- told by the caller
            status = traceback.format_exc()
    return status, output.getvalue()


def answer_in_a_fork(script):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with os.fdopen(writer, "w") as file:
            json.dump(answer(script), file)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    os.waitpid(child, 0)
    return json.loads(text)


if __name__ == "__main__":
    print(json.dumps({script: answer_in_a_fork(script) for script in sys.argv[1:]}))
