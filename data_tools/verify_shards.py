"""Check a data set against its dataset.json, report in one page, and repair what is broken.

    python data_tools/verify_shards.py --data latents/imagenet256 --quick
    python data_tools/verify_shards.py --data latents/imagenet256 --report report.txt
    python data_tools/verify_shards.py --data latents/imagenet256 --repair --input imagenet/train

The exit code is 0 if the data set is intact and 2 if not.
"""

import argparse
import sys
import threading
import time
from functools import partial
from pathlib import Path

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm import tqdm

from data_tools.errors import ArgumentParser, ConfigError, count_of, os_errors_as, refuse_below_one
from data_tools.process.entry_point import enter
from data_tools.user_files.paths import typed_path, typed_text
from data_tools.verification.findings import Verification
from data_tools.verification.report import readable_bytes, report, sentence
from data_tools.verification.verify import default_workers, verify

PLAIN_PROGRESS_SEC = 10.0  # between lines where the output is no terminal


class _CheckedBytes:
    """Counts checked bytes on a terminal's bar, or in plain lines (a batch job's log)."""

    def __init__(self) -> None:
        self.is_plain = not sys.stderr.isatty()
        self.bar = tqdm(unit="B", unit_scale=True, unit_divisor=1024, disable=self.is_plain)
        self.done, self.started = 0, time.monotonic()
        self.next_line = self.started + PLAIN_PROGRESS_SEC
        self.lock = threading.Lock()

    def add(self, count: int) -> None:
        """Add bytes that were just checked; from any thread."""
        with self.lock:
            self.done += count
            self.bar.update(count)
            now = time.monotonic()
            if self.is_plain and now >= self.next_line:
                self.next_line = now + PLAIN_PROGRESS_SEC
                speed = self.done / (now - self.started)
                print(f"{readable_bytes(self.done)} checked, {readable_bytes(speed)}/s", flush=True)


def check(args: argparse.Namespace, known: Verification | None = None) -> Verification:
    """Verify as the flags say; take over from `known` the shards that were sound."""
    progress = _CheckedBytes()
    result = verify(
        args.data,
        is_quick=args.quick,
        num_workers=args.workers,
        on_bytes=progress.add,
        known={} if known is None else known.contents,
    )
    progress.bar.close()
    return result


def repair(result: Verification, args: argparse.Namespace) -> tuple[Verification, list[str]]:
    """Repair what `result` found; return the check after it, and what was done."""
    # Imported here: it loads the VAE's library, which a check does not need.
    from data_tools.verification.repair import repair_shards, repair_small_files

    source = (args.input, args.vae, args.device, args.accept_new_bytes)
    done: list[str] = []
    # dataset.json first, then the shards that it shows to be damaged, then what follows from them.
    for _ in range(2):
        if done_now := repair_shards(result, partial(print, flush=True), *source):
            done += done_now
            result = check(args, known=result)
    if not result.damaged("shard") and (done_now := repair_small_files(result)):
        done += done_now
        result = check(args, known=result)
    return result, done


def write_preview_picture(result: Verification, args: argparse.Namespace) -> None:
    """Write --preview, of the shards that are sound."""
    # Imported here: it loads the VAE's library, which a check does not need.
    from data_tools.verification.preview import write_preview

    if result.manifest is None:
        print(f"--preview {args.preview}: not made, it needs dataset.json", flush=True)
        return
    given, without = {"vae": args.vae, "device": args.device}, result.damaged("shard")
    number = write_preview(args.preview, result.manifest, **given, without=without)
    print(f"{args.preview}: {count_of(number, 'sample')}", flush=True)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Define the flags and check their values."""
    parser = ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="The exit code is 0 if the data set is intact and 2 if not.",
    )
    add = parser.add_argument
    parser.add_bare_or_flag("data", "--data", typed_path, "FOLDER", "the data set")
    add("--quick", action="store_true", help="sizes, first and last samples only: seconds")
    add(
        "--report",
        type=typed_path,
        metavar="FILE",
        help="write the report there too, with all findings",
    )
    add("--preview", type=typed_path, metavar="FILE", help="write a PNG of some decoded samples")
    add("--repair", action="store_true", help="make what is broken again, and only that")
    add(
        "--input",
        nargs="+",
        type=typed_text,
        metavar="IMAGES",
        help="for --repair: what the data set was encoded from",
    )
    add(
        "--vae",
        type=typed_text,
        metavar="VAE",
        help="where the data set's VAE is, if not where dataset.json says",
    )
    add("--device", metavar="DEVICE", help="of the VAE: cpu, cuda or cuda:N (default: a GPU)")
    add(
        "--accept-new-bytes",
        action="store_true",
        help="for --repair: take shards that come out with other bytes; no run can resume on them",
    )
    add(
        "--workers",
        type=int,
        default=default_workers(),
        metavar="N",
        help="threads (default: one per core, at most 16)",
    )
    args = parser.parse_args(argv)
    refuse_below_one(args, "workers")
    if args.repair and args.quick:
        raise ConfigError("--repair: needs to read every byte first; leave --quick out.")
    for name in ("input", "accept_new_bytes"):
        if getattr(args, name) and not args.repair:
            raise ConfigError(f"--{name.replace('_', '-')}: serves --repair only; add --repair.")
    return args


def main(argv: list[str] | None = None) -> None:
    """Verify, repair if asked to, and report."""
    args = parse_arguments(argv)
    started, done = time.monotonic(), []
    result = check(args)
    if args.repair and result.damaged():
        print(report(result, time.monotonic() - started), flush=True)
        result, done = repair(result, args)
    seconds = time.monotonic() - started
    print(report(result, seconds, done), end="", flush=True)
    if args.report:
        text = report(result, seconds, done, max_findings=None)
        with os_errors_as(f"--report {args.report}: cannot be written", "name another file"):
            args.report.write_text(text, "utf-8", "backslashreplace")
    if args.preview:
        write_preview_picture(result, args)
    if result.damaged():
        raise ConfigError(sentence(result, args.report))


if __name__ == "__main__":
    enter(main)
