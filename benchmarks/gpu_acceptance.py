"""Check on a GPU what only a GPU can tell, the most valuable first, in eight minutes.

    python benchmarks/gpu_acceptance.py
    python benchmarks/gpu_acceptance.py ceilings step --output gpu-results
    python benchmarks/gpu_acceptance.py --tiny --device cpu

Parts are chosen by name and run in this order: {parts}.
Each writes PART.json into the folder of --output as soon as it ends; acceptance.json holds all. The
exit code is 1 if a check failed, or a part did not end. docs/gpu.md says what each number decides.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.gpu_parts.catalogue import PARTS
from benchmarks.gpu_parts.engines import release
from benchmarks.gpu_parts.record import (
    BROKEN,
    DONE,
    LEFT_OUT,
    RUNNING,
    STOPPED,
    Record,
    Setting,
    forget_records,
    own_environment,
    read_record,
)
from benchmarks.measure import describe_machine
from data_tools.errors import ArgumentParser, ConfigError, exit_on_config_error, refuse_below_one
from data_tools.files import write_text
from data_tools.process.entry_point import enter
from data_tools.user_files.paths import typed_path

POLL_SEC = 0.2
CPU_PATIENCE = 10  # times a part's limit; a rehearsal may share the CPU
SUMMARY = "acceptance.json"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, and check it."""
    parser = ArgumentParser(
        description=__doc__.format(parts=", ".join(PARTS)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all")
    parser.add_argument(
        "--output",
        type=typed_path,
        default=Path("gpu-acceptance"),
        metavar="FOLDER",
        help="for the results; default: %(default)s",
    )
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal")
    parser.add_argument(
        "--tiny", action="store_true", help="the smallest sizes, to rehearse; numbers mean nothing"
    )
    parser.add_argument(
        "--minutes", type=int, default=8, help="for all parts; default: %(default)s"
    )
    parser.add_argument("--work", type=typed_path, help=argparse.SUPPRESS)  # set for the worker
    args = parser.parse_args(argv)
    for name in args.parts:
        if name not in PARTS:
            raise ConfigError(f"{name} is no part of the acceptance; use {', '.join(PARTS)}.")
    args.parts = [name for name in PARTS if name in args.parts or not args.parts]
    refuse_below_one(args, "minutes")
    if args.device not in ("cpu", "cuda"):
        raise ConfigError(f"--device {args.device}: unknown device; use cuda or cpu.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda: torch finds no CUDA device; use --tiny --device cpu for a rehearsal."
        )
    if args.device == "cpu" and not args.tiny:
        raise ConfigError("--device cpu: takes hours at the real sizes; add --tiny.")
    return args


def work_through(args: argparse.Namespace) -> None:
    """Run parts one after another in this process, and store what each finds."""
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    setting = Setting(device, args.tiny, args.output, args.work)
    for name in args.parts:
        print(f"== {name}: {PARTS[name].title}", flush=True)
        record, started = Record(name), time.monotonic()
        record.write(args.output)
        PARTS[name].run(setting, record)
        record.state, record.seconds = DONE, time.monotonic() - started
        record.write(args.output)
        release(device)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def supervise(args: argparse.Namespace) -> list[Record]:
    """Have a process work through the parts, and start another one where it breaks or is too slow.

    An error in a kernel leaves a process without its GPU, and a hang ends by no exception: so each
    part that fails costs a new process, and the parts behind it are run all the same.
    """
    deadline = time.monotonic() + 60 * args.minutes
    forget_records(args.output, list(PARTS))
    left = list(args.parts)
    with tempfile.TemporaryDirectory(prefix="gpu-acceptance-") as work:
        while left and time.monotonic() < deadline:
            with _worker(args, left, Path(work)) as worker:
                reason = _watch(worker, args, left, deadline)
            left = [name for name in left if not _has_ended(args.output, name)]
            if reason and left:  # the one that it was at
                record = read_record(args.output, left[0]) or Record(left[0])
                record.state, record.seconds = reason, time.time() - record.began
                record.write(args.output)
                print(f"  FAIL {record.part}: {reason}", flush=True)
                del left[0]
    for name in left:
        Record(name, LEFT_OUT).write(args.output)
    return [read_record(args.output, name) for name in args.parts]


@contextlib.contextmanager
def _worker(args: argparse.Namespace, parts: list[str], work: Path) -> Iterator[subprocess.Popen]:
    """Start a process that works through parts; nothing of it stays behind."""
    flags = ("--output", str(args.output), "--device", args.device, "--work", str(work))
    setting = Setting(torch.device(args.device), args.tiny, args.output, work)
    worker = subprocess.Popen(
        [sys.executable, __file__, *parts, *flags, *(["--tiny"] if args.tiny else [])],
        env=own_environment(setting),
        start_new_session=True,
    )
    try:
        yield worker
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


def _watch(
    worker: subprocess.Popen, args: argparse.Namespace, parts: list[str], deadline: float
) -> str:
    """Wait until a worker ends or is too slow; return why it did not end well."""
    patience = CPU_PATIENCE if args.device == "cpu" else 1
    while worker.poll() is None:
        time.sleep(POLL_SEC)
        begun = [r for name in parts if (r := read_record(args.output, name)) is not None]
        is_late = any(
            r.state == RUNNING and time.time() - r.began > patience * PARTS[r.part].limit_sec
            for r in begun
        )
        if is_late or time.monotonic() > deadline:
            return STOPPED
    return BROKEN if worker.returncode else ""


def _has_ended(folder: Path, name: str) -> bool:
    record = read_record(folder, name)
    return record is not None and record.state == DONE


def summarise(records: list[Record], folder: Path) -> str:
    """Return the table, and store everything in one file."""
    content = {"machine": _machine(), "parts": {r.part: asdict(r) for r in records}}
    write_text(folder / SUMMARY, json.dumps(content, indent=1) + "\n")
    lines = ["", f"{'part':<10} {'state':<9} {'s':>6} {'checks':>7} {'failed':>7}"]
    for r in records:
        failed = sum(not check.has_passed for check in r.checks)
        lines.append(
            f"{r.part:<10} {r.state:<9} {r.seconds:>6.0f} {len(r.checks):>7} {failed or '':>7}"
        )
    failures = [failure for r in records for failure in r.failures]
    lines += [f"{len(failures)} failed", *(f"  - {text}" for text in failures)]
    return "\n".join(lines)


def _machine() -> str:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = f", CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return f"{describe_machine(device)}{cuda}, Python {sys.version.split()[0]}"


def main(argv: list[str] | None = None) -> None:
    """Accept, or say what is wrong; leave with exit code 1 if something is."""
    with exit_on_config_error():
        args = parse(argv)
    if args.work is not None:
        work_through(args)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    print(_machine(), flush=True)
    records = supervise(args)
    print(summarise(records, args.output), flush=True)
    if any(record.failures for record in records):
        sys.exit(1)


if __name__ == "__main__":
    enter(main)
