"""Measure how long training stands still for a checkpoint of XL/2, the first and a later one."""

import dataclasses
import shutil
import time
from pathlib import Path

from benchmarks.gpu_parts.engines import Trainer
from benchmarks.gpu_parts.record import Record, Setting
from benchmarks.measure import synchronise
from training.checkpoints.checkpointer import Checkpointer
from training.checkpoints.manifest import Layout, TrainState, tag_of
from training.config.deepspeed_config import stage_of
from training.config.precision import precision_of
from training.cost.closed_forms import checkpoint_bytes
from training.engine.expert_placement import ExpertPlacement
from training.run.lock import take_over

GIB = 2**30


def measure_saving(setting: Setting, record: Record) -> None:
    """XL/2, ZeRO 2, one GPU: the pause for a checkpoint, and when it is written."""
    trainer, run_dir = Trainer(setting, setting.preset("xl"), "zero2", 2), setting.work / "saved"
    needed, free = checkpoint_bytes(trainer.config), shutil.disk_usage(setting.work).free
    record.number("checkpoint, GiB", needed / GIB)
    record.check(free > needed, f"{setting.work} has room: {free / GIB:.0f} GiB")
    if free > needed:
        trainer.step(0)
        checkpointer = _checkpointer(trainer, run_dir)
        for name, step in (("first", 1), ("second", 2)):
            synchronise(setting.device)
            started = time.perf_counter()
            checkpointer.begin(TrainState(step, step))
            pause_sec = time.perf_counter() - started
            outcome = checkpointer.finish()
            problem = f" ({outcome.problem})" if outcome.problem else ""
            record.check(not outcome.problem, f"the {name} checkpoint is written{problem}")
            record.number(f"{name} checkpoint: training stands still, s", pause_sec)
            record.number(f"{name} checkpoint: written after, s", outcome.write_sec)
            shutil.rmtree(checkpointer.staging.parent / tag_of(step), ignore_errors=True)
    trainer.close()


def _checkpointer(trainer: Trainer, run_dir: Path) -> Checkpointer:
    merged, config = trainer.merged, trainer.config
    return Checkpointer(
        trainer.engine,
        dataclasses.replace(config.run, keep_last=1),
        Layout(1, 1, stage_of(merged), precision_of(merged)),
        data_hash="0" * 64,
        objective=trainer.objective,
        placement=ExpertPlacement(config, trainer.engine, trainer.objective),
        staging=take_over(run_dir),
    )
