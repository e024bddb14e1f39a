"""Train a Switch-DiT with DeepSpeed. Running the same command again continues the run.

    deepspeed training/main.py --deepspeed ds_configs/zero2.json

Everything the user can get wrong is checked first, on every rank alike, before a process group
exists and before anything is written.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from data_tools.encode_latents import DEMO_LATENTS, prepare_demo
from data_tools.errors import exit_on_config_error
from data_tools.shards import MANIFEST_NAME, DatasetManifest
from data_tools.vae import Vae, load_decoder
from training import processes
from training.checkpoint_manifest import (
    CheckpointManifest,
    Layout,
    TrainState,
    check_resumable,
    latest_checkpoint,
    read_manifest,
    verify_together,
)
from training.command_line import CommandLine, parse_command_line
from training.config import Config
from training.count import checkpoint_bytes, describe
from training.deepspeed_config import load_deepspeed_json, merge_deepspeed, stage_of
from training.precision import explain_precision, precision_of
from training.processes import Ranks
from training.run_directory import check_free_space, check_run_directory, create_run_directory
from training.validation import validate


@dataclass(frozen=True)
class Job:
    """A checked command: what training needs, from plain values and files."""

    config: Config
    deepspeed_config: dict[str, Any]
    manifest: DatasetManifest
    layout: Layout
    resume_from: Path | None
    resume_manifest: CheckpointManifest | None
    vae: Vae | None  # on rank 0, if grids of samples are wanted


def check(command: CommandLine, ranks: Ranks) -> Job:
    """Check everything that can be checked before a process group exists; write nothing.

    Raises:
        ConfigError: for the first mistake found.
    """
    config = command.config
    run_dir = Path(config.run.run_dir)
    deepspeed_config = merge_deepspeed(command.deepspeed, config, ranks.world_size)
    manifest = DatasetManifest.load(config.data.data)
    validate(config, command.deepspeed, ranks.world_size, manifest)
    check_run_directory(run_dir, config)
    layout = Layout(
        ranks.world_size,
        config.run.expert_parallel_size,
        stage_of(deepspeed_config),
        precision_of(deepspeed_config),
    )
    folder = latest_checkpoint(run_dir)
    resume_manifest = None
    if folder is not None:
        resume_manifest = read_manifest(folder)
        check_resumable(resume_manifest, layout, manifest.hash)
    check_free_space(run_dir, checkpoint_bytes(config))
    vae = None
    if config.run.sample_every and ranks.is_main and not command.dry_run:
        vae = load_decoder(config.run.vae, manifest.vae)
    return Job(config, deepspeed_config, manifest, layout, folder, resume_manifest, vae)


def is_demo_missing(config: Config) -> bool:
    """Tell whether the configuration wants the demo data set and nobody has made it yet."""
    is_demo = Path(config.data.data).resolve() == DEMO_LATENTS.resolve()
    return is_demo and not (DEMO_LATENTS / MANIFEST_NAME).exists()


def prepare_demo_if_missing(command: CommandLine, ranks: Ranks) -> None:
    """Make the demo data set if this command needs it and would otherwise be right."""
    if not is_demo_missing(command.config):
        return
    validate(command.config, command.deepspeed, ranks.world_size)
    check_run_directory(Path(command.config.run.run_dir), command.config)
    if ranks.is_main:
        print(f"{command.config.data.data} is missing: preparing the demo data set.", flush=True)
    prepare_demo(quiet=not ranks.is_main)


def dry_run(command: CommandLine, ranks: Ranks) -> str:
    """Return what --dry-run prints; write nothing. The data set need not exist yet."""
    if Path(command.config.data.data).exists() and not is_demo_missing(command.config):
        job = check(command, ranks)
        return describe(job.config, job.deepspeed_config, ranks.world_size, job.manifest)
    merged = merge_deepspeed(command.deepspeed, command.config, ranks.world_size)
    validate(command.config, command.deepspeed, ranks.world_size)
    return describe(command.config, merged, ranks.world_size)


def train_job(job: Job, ranks: Ranks, device: torch.device) -> TrainState:
    """Train a checked job in an existing process group. All ranks must call this.

    Raises:
        RunError: on all ranks, with what ended the run.
    """
    from training.assemble import assemble  # DeepSpeed reads its environment when imported
    from training.loop import train

    run_dir = Path(job.config.run.run_dir)
    state = TrainState() if job.resume_manifest is None else job.resume_manifest.state
    processes.check_agreement(
        {
            "the configuration": job.config.to_dict(),
            "the DeepSpeed configuration": job.deepspeed_config,
            "the data set's hash": job.manifest.hash,
            "the layout": job.layout,
            "the checkpoint": str(job.resume_from),
            "the state": state,
        }
    )
    if job.resume_from is not None:
        verify_together(job.resume_manifest, job.resume_from)
    problem = None
    if ranks.is_main:
        problem = create_run_directory(run_dir, job.config, job.deepspeed_config, job.manifest)
    if problem := processes.agreed_message(problem):
        raise processes.RunError(problem)
    stop = processes.StopSignal(device)
    started = time.monotonic()
    with assemble(job, ranks, device, state) as training:
        if job.resume_from is not None:
            loaded = training.checkpointer.load(job.resume_from)
            assert loaded == state, f"{job.resume_from} holds {loaded}, its manifest says {state}"
        if ranks.is_main:
            print(_start_line(job, ranks, state), flush=True)
        state = train(training, state, stop)
    stop.restore()
    if ranks.is_main:
        print(_end_line(job.config, state, time.monotonic() - started), flush=True)
    return state


def _start_line(job: Job, ranks: Ranks, state: TrainState) -> str:
    begin = f"resuming {job.resume_from} at" if job.resume_from else "starting at"
    return (
        f"{begin} step {state.step} of {job.config.run.max_steps}: Switch-DiT "
        f"{job.config.model.size}/{job.config.model.patch_size}, {ranks.world_size} rank(s), "
        f"ZeRO {job.layout.zero_stage}, {job.layout.precision}, {job.manifest.num_samples} samples"
    )


def _end_line(config: Config, state: TrainState, elapsed_sec: float) -> str:
    run_dir = config.run.run_dir
    if state.step < config.run.max_steps:
        return (
            f"stopped by a signal after step {state.step}; the checkpoint is saved and the same "
            "command continues from it"
        )
    return f"done: {state.step} steps, {elapsed_sec:.0f} s in this process; results in {run_dir}"


def main(argv: list[str] | None = None) -> None:
    """Check the command line, then train (or only describe, with --dry-run)."""
    with exit_on_config_error():
        ranks = processes.discover_ranks()
        device = processes.select_accelerator(ranks)
    with processes.one_sentence(ranks):
        command = parse_command_line(argv)
        if command.dry_run:
            text = dry_run(command, ranks)
        else:
            prepare_demo_if_missing(command, ranks)
            job = check(command, ranks)
            text = explain_precision(
                command.deepspeed, load_deepspeed_json(command.deepspeed), job.deepspeed_config
            )
    if ranks.is_main:
        print(text, flush=True)
    if not command.dry_run:
        processes.start_process_group(ranks, device)
        try:
            train_job(job, ranks, device)
        except processes.RunError as err:
            if ranks.is_main:
                sys.stderr.write(f"error: {err}\n")
            processes.stop_process_group()
            sys.exit(err.exit_code)
        processes.stop_process_group()


if __name__ == "__main__":
    main()
