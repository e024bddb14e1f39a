"""Train a Switch-DiT with DeepSpeed. Running the same command again continues the run.

    deepspeed training/main.py --deepspeed ds_configs/zero2.json

Everything the user can get wrong is checked first, on every rank alike, before a process group
exists and before anything is written.
"""

import contextlib
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from data_tools.process.signals import end_early_on_signals

    end_early_on_signals()

# The report on a lost rank must not drown in what every rank's libraries say of their connections.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch

from data_tools.errors import count_of, exit_on_config_error
from data_tools.exit_codes import CONFIG_ERROR_EXIT_CODE, CRASH_EXIT_CODE, SAVED_EXIT_CODE
from data_tools.process.entry_point import enter
from data_tools.process.launcher import is_started_again
from data_tools.stream.training_data import is_absent
from models.switch_dit import MODEL_NAMES
from training.checked_job import (
    Job,
    check,
    check_without_data,
    is_demo_missing,
    prepare_demo_if_missing,
)
from training.checkpoints.manifest import TrainState
from training.checkpoints.publishing import name_latest
from training.checkpoints.resume_point import ResumePoint, choose_together
from training.config.command_line import CommandLine, parse_command_line
from training.config.deepspeed_config import load_deepspeed_json, stage_of
from training.config.precision import explain_precision
from training.config.tree import Config, differences
from training.config.validation import check_compiler
from training.cost.closed_forms import describe
from training.engine.compiling import explain_compiling
from training.monitoring.progress import Progress
from training.ranks import process_group
from training.ranks.agreement import RunError, agreed_message, check_agreement, from_main
from training.ranks.heartbeat import LEAVING
from training.ranks.process_group import Ranks
from training.ranks.stop_signal import StopSignal
from training.ranks.watchdog import Watchdog, limit_all_groups
from training.run.checkpoint_notes import DAMAGED, CheckpointNote
from training.run.console_log import log_to
from training.run.directory import CONFIG_FILE, create_run_directory, load_config
from training.run.lock import WAIT_SEC, hold_run_directory
from training.run.program import count_hosts, read_starts, record_start
from training.run.starts import describe_crash_loop


class CrashLoopError(RunError):
    """Starting again and again leads nowhere."""

    exit_code = CONFIG_ERROR_EXIT_CODE


class RunDirectoryInUseError(RunError):
    """Another job writes to the run directory, or, worth another try, this one's earlier ranks."""

    exit_code = CRASH_EXIT_CODE if is_started_again() else CONFIG_ERROR_EXIT_CODE


def dry_run(command: CommandLine, ranks: Ranks) -> str:
    """Return what --dry-run prints; write nothing. The data set need not exist yet."""
    config, manifest = command.config, None
    found = None
    if not is_absent(config.data.data) and not is_demo_missing(config):
        job = check(command, ranks)
        merged, manifest, warm_start = job.deepspeed_config, job.manifest, job.warm_start
        found = job.data.describe()
    else:
        _, _, merged, warm_start = check_without_data(command, ranks)
    text = describe(config, merged, ranks.world_size, manifest, found)
    return text if warm_start is None else f"{text}\n\n# initial weights\n{warm_start.report()}"


def train_job(
    job: Job,
    ranks: Ranks,
    device: torch.device,
    watchdog: Watchdog | None = None,
    is_quiet: bool = False,
) -> TrainState:
    """Train a checked job in an existing process group. All ranks must call this.

    Raises:
        RunError: on all ranks, with what ended the run.
    """
    from training.loop import train
    from training.run_parts import open_training  # DeepSpeed reads its environment on import

    watchdog = watchdog or Watchdog(ranks, device)
    check_agreement(
        {
            "the configuration": job.config.to_dict(),
            "the DeepSpeed configuration": job.deepspeed_config,
            "the data set's hash": job.manifest.hash,
            "the layout": job.layout,
            "the initial weights' sha256": job.warm_start and job.warm_start.sha256,
        }
    )
    run_dir = Path(job.config.run.run_dir)
    # The others wait meanwhile, so no longer than they are allowed to.
    patience = process_group.collective_timeout() / 2
    wait_sec = patience.total_seconds() if is_started_again() else WAIT_SEC
    lock = hold_run_directory(run_dir, wait_sec) if ranks.is_main else contextlib.nullcontext()
    with lock as access:
        staging, problem = from_main(access)
        if problem is not None:
            raise RunDirectoryInUseError(problem)
        # Again: the job before may have published one since this job was checked.
        point, damaged = choose_together(run_dir, job.check_resumable)
        state = TrainState() if point is None else point.manifest.state
        _check_crash_loop(run_dir, state, job.config.run.max_steps, ranks)
        hosts = count_hosts()
        if ranks.is_main:
            problem = _write_start(job, state, point, hosts)
        if problem := agreed_message(problem):
            raise RunError(problem)
        stop = StopSignal(device)
        started = time.monotonic()
        terminal = sys.stderr
        log = log_to(run_dir, is_quiet) if ranks.is_main else contextlib.nullcontext()
        # What fails must not wait for the threads that are taken apart afterwards.
        with (
            log as note,
            Progress(job.config.run.max_steps, note, is_quiet, terminal) as progress,
            open_training(
                job, ranks, device, state, staging, watchdog.heartbeat, progress
            ) as training,
            watchdog.reporting(),
        ):
            limit_all_groups()
            if point is not None:
                if ranks.is_main:  # the name may be missing, or that of a damaged one
                    with contextlib.suppress(OSError):  # else the next start finds out again
                        name_latest(point.folder, staging)
                for reason in damaged:
                    event = f"{reason}; continuing from {point.folder.name} instead"
                    training.report(state.step, event)
                    training.reporter.note_checkpoint(CheckpointNote(state.step, DAMAGED, reason))
                loaded = training.checkpointer.load(*point)
                assert loaded == state, f"{point.folder} holds {loaded}, not {state}"
            training.placement.establish()
            if ranks.is_main:
                print(_start_text(job, ranks, state, point), flush=True)
                progress.begin(state.step, len(read_starts(run_dir)))
            first_step = state.step
            state = train(training, state, stop)
            if ranks.is_main:
                elapsed_sec = time.monotonic() - started
                print(_end_line(job.config, first_step, state, elapsed_sec), flush=True)
        stop.restore()
    return state


def _check_crash_loop(run_dir: Path, state: TrainState, max_steps: int, ranks: Ranks) -> None:
    """Warn of starts that lead nowhere; end on all ranks if a launcher goes on making them."""
    problem = None
    if ranks.is_main and state.step < max_steps:
        text, is_over = describe_crash_loop(run_dir, state.step)
        if text and not is_over:
            sys.stderr.write(f"warning: {text}\n")
        problem = text if is_over else None
    if problem := agreed_message(problem):
        raise CrashLoopError(problem)


def _write_start(
    job: Job, state: TrainState, point: ResumePoint | None, hosts: dict[str, int]
) -> str | None:
    """Write into the run directory what this start is made of; return why that is impossible."""
    run_dir = Path(job.config.run.run_dir)
    is_new = not (run_dir / CONFIG_FILE).exists()
    changes = [] if is_new else differences(load_config(run_dir), job.config, of_any_kind=True)
    initial = None if job.warm_start is None else asdict(job.warm_start)
    try:
        create_run_directory(run_dir, job.config, job.deepspeed_config, job.manifest, initial)
        record_start(
            run_dir,
            step=state.step,
            checkpoint="" if point is None else point.folder.name,
            layout=str(job.layout),
            hosts=hosts,
            data_hash=job.manifest.hash,
            config_changes=changes,
        )
    except OSError as err:
        return f"--run-dir {run_dir}: cannot write ({err.strerror}); choose another."
    return None


def _start_text(job: Job, ranks: Ranks, state: TrainState, point: ResumePoint | None) -> str:
    model, run = job.config.model, job.config.run
    lines = []
    if job.warm_start is not None:
        lines.append(job.warm_start.report())
    elif run.init_from is not None:
        lines.append(f"continuing {run.run_dir}; --init-from was applied when it started")
    begin = f"resuming {point.folder} at" if point else "starting at"
    lines.append(
        f"{begin} step {state.step} of {run.max_steps}: {MODEL_NAMES[model.routing]} "
        f"{model.size}/{model.patch_size}, {ranks.world_size} rank(s), "
        f"ZeRO {job.layout.zero_stage}, {job.layout.precision}, {job.manifest.num_samples} samples"
    )
    if point is not None and str(point.manifest.layout) != str(job.layout):
        lines.append(f"its layout changes from {point.manifest.layout} to {job.layout}")
    return "\n".join(lines)


def _end_line(config: Config, first_step: int, state: TrainState, elapsed_sec: float) -> str:
    run_dir, max_steps = config.run.run_dir, config.run.max_steps
    if first_step >= max_steps:
        return (
            f"done: nothing was trained, {run_dir} is already at step {first_step} and --max-steps "
            f"is {max_steps}; raise it to go on"
        )
    if state.step < max_steps:
        return (
            f"stopped by a signal after step {state.step}; the checkpoint is saved and the same "
            "command continues from it"
        )
    return (
        f"done: {count_of(state.step, 'step')}, {elapsed_sec:.0f} s in this process; "
        f"results in {run_dir}"
    )


def main(argv: list[str] | None = None) -> None:
    """Check the command line, then train (or only describe, with --dry-run)."""
    with exit_on_config_error():
        ranks = process_group.enter_job("--dry-run" in (sys.argv if argv is None else argv))
        device = process_group.select_accelerator(ranks)
        process_group.collective_timeout()
    with process_group.one_sentence(ranks):
        command = parse_command_line(argv)
        check_compiler(command.config, device)
        if command.dry_run:
            text = dry_run(command, ranks)
        else:
            prepare_demo_if_missing(command, ranks)
            job = check(command, ranks)
            if ranks.is_main:
                for note in job.notes:
                    sys.stderr.write(f"warning: {note}\n")
            text = explain_precision(
                command.deepspeed, load_deepspeed_json(command.deepspeed), job.deepspeed_config
            )
            if said := explain_compiling(command.config, stage_of(job.deepspeed_config)):
                text += f"\n{said}"
    if ranks.is_main and (command.dry_run or not command.quiet):
        print(text, flush=True)
    if not command.dry_run:
        with process_group.one_sentence(ranks):
            process_group.start_process_group(ranks, device)
        exit_code = 0
        with Watchdog(ranks, device) as watchdog:
            try:
                state = train_job(job, ranks, device, watchdog, command.quiet)
                if state.step < job.config.run.max_steps:
                    exit_code = SAVED_EXIT_CODE
            except RunError as err:
                if ranks.is_main:
                    sys.stderr.write(f"error: {err}\n")
                exit_code = err.exit_code
            watchdog.heartbeat.enter(LEAVING, 0)
            process_group.meet_to_leave()  # while somebody watches
        process_group.stop_process_group()
        if exit_code:
            sys.exit(exit_code)


if __name__ == "__main__":
    enter(main)
