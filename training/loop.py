"""The training loop: when things happen. What they compute is in objective.py and models/."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from data_tools.errors import CONFIG_ERROR_EXIT_CODE, ConfigError
from data_tools.loader import Batch, LatentStream
from training.checkpoint import Checkpointer
from training.checkpoint_manifest import TrainState
from training.config import Config
from training.engine import learning_rate, set_learning_rate
from training.metrics import MetricSums
from training.monitor import Monitor, expert_map
from training.objective import Objective
from training.processes import RANK_FAILED, RunError, StopSignal, agreed_message


class NonFiniteLossError(RunError):
    """The loss of an interval is not a finite number."""


class CheckpointError(RunError):
    """The last checkpoint of a run could not be written."""


class DataError(RunError):
    """A rank cannot read its samples; what was trained until then is saved."""

    exit_code = CONFIG_ERROR_EXIT_CODE


@dataclass
class Training:
    """The parts of one run, put together by main.py."""

    config: Config
    engine: Any
    stream: LatentStream
    objective: Objective
    sums: MetricSums
    monitor: Monitor
    checkpointer: Checkpointer
    draw_samples: Callable[[int], None]  # step -> grid of samples into the run directory
    is_main: bool


@dataclass
class StepData:
    """This rank's part of one step's global batch."""

    batches: list[tuple[Batch, float]] = field(default_factory=list)  # with seconds waited for it
    error: ConfigError | None = None  # why it is incomplete


def train(training: Training, state: TrainState, stop: StopSignal) -> TrainState:
    """Train from `state` to the configured number of steps or until a signal.

    All ranks must call this. The last checkpoint is always written at the step it ends with.

    Returns:
        The state reached.

    Raises:
        NonFiniteLossError: on all ranks, at the end of the interval in which it happened.
        CheckpointError: on all ranks, when the final checkpoint fails; earlier ones are intact.
        DataError: on all ranks, after saving, when one of them cannot read its samples.
    """
    run = training.config.run
    step_data = read_step(training)
    if message := agreed_message(step_data.error):
        raise DataError(message)
    started, first_step = time.monotonic(), state.step
    training.sums.restart_clock()
    saved_step, signal_number = state.step, 0
    while state.step < run.max_steps:
        gate_table = train_step(training, step_data, state.step)
        state = TrainState(
            state.step + 1, state.samples_consumed + training.config.optim.global_batch_size
        )
        # Read ahead of the step, so that all ranks learn of damaged data before they start it.
        step_data = read_step(training) if state.step < run.max_steps else StepData()
        signal_number = stop.agreed(step_data.error is not None)
        is_last = state.step == run.max_steps or signal_number != 0
        is_save_due = state.step % run.save_every == 0 or is_last
        is_sample_due = run.sample_every and (
            state.step % run.sample_every == 0 or state.step == run.max_steps
        )
        # Whatever interrupts training ends an interval first: nothing unchecked is saved, and
        # saving and sampling do not count as training time.
        if state.step % run.log_every == 0 or is_save_due or is_sample_due:
            metrics = log_interval(training, state)
            if training.is_main:
                speed = (state.step - first_step) / (time.monotonic() - started)
                print_progress(metrics, state.step, run.max_steps, speed)
        if is_save_due:
            save(training, state, is_last)
            saved_step = state.step
        if is_sample_due and not signal_number:  # a launcher that stops the job waits seconds only
            if training.is_main:
                picture = expert_map(gate_table, training.engine.module.top_k)
                training.monitor.image(state.step, "moe/timestep_to_expert", picture)
            training.draw_samples(state.step)
        if is_save_due or is_sample_due:
            training.sums.restart_clock()
        if signal_number:
            break
    assert saved_step == state.step, "the state reached is always saved"
    if signal_number == RANK_FAILED:
        raise DataError(agreed_message(step_data.error))
    return state


def read_step(training: Training) -> StepData:
    """Read this rank's micro-batches of one step."""
    data, stream = StepData(), training.stream
    try:
        for _ in range(training.engine.gradient_accumulation_steps()):
            waited = stream.wait_sec
            data.batches.append((next(stream), stream.wait_sec - waited))
    except ConfigError as err:
        data.error = err
    return data


def train_step(training: Training, data: StepData, step: int) -> torch.Tensor:
    """Run one optimizer step: every micro-step's forward and backward, then the update.

    Returns:
        The gate table of the last micro-step, (L, S, E), detached.
    """
    engine, objective = training.engine, training.objective
    set_learning_rate(engine, learning_rate(training.config.optim, step))
    for batch, wait_sec in data.batches:
        micro_batch = objective.micro_batch(batch)
        output = engine(micro_batch.x_t, micro_batch.t, micro_batch.y, micro_batch.group_t)
        terms, mse = objective.loss(output, micro_batch, step)
        engine.backward(terms.total)
        engine.step()
        training.sums.add(terms, mse, micro_batch.t, output.plan, wait_sec)
    return output.gate_table.detach()


def log_interval(training: Training, state: TrainState) -> dict[str, float]:
    """Reduce, check and record the metrics since the last call. All ranks must call this."""
    metrics = training.sums.reduce()
    if not math.isfinite(metrics["loss/total"]):  # reduced, so all ranks agree
        raise NonFiniteLossError(
            f"loss is {metrics['loss/total']} at step {state.step}; the checkpoints before it are "
            "intact. Lower --lr, raise --warmup-steps or set --gradient-clipping."
        )
    metrics["optim/lr"] = learning_rate(training.config.optim, state.step - 1)
    # ZeRO 1 to 3 leave out an update whose gradient is not finite; the norm is then not finite.
    metrics["optim/skipped_steps"] = float(training.engine.skipped_steps)
    norm = training.engine.get_global_grad_norm()
    if norm is not None and math.isfinite(norm):  # ZeRO 0 without clipping computes none
        metrics["optim/grad_norm"] = float(norm)
    training.monitor.scalars(state.step, metrics)
    return metrics


def save(training: Training, state: TrainState, is_last: bool) -> None:
    """Write a checkpoint; a failure ends the run only where there is no later chance."""
    problem = training.checkpointer.save(state)
    if problem is None:
        return
    message = f"checkpoint of step {state.step} could not be written: {problem}"
    if is_last:
        raise CheckpointError(
            f"{message}; free some space or choose another --run-dir, and run the same command "
            "again: it continues from the checkpoint before."
        )
    if training.is_main:
        sys.stderr.write(f"warning: {message}; training goes on, the one before it is intact.\n")


def print_progress(metrics: dict[str, float], step: int, max_steps: int, speed: float) -> None:
    """Print one line for the person who watches.

    Args:
        metrics: of the interval.
        step: steps done.
        max_steps: steps wanted.
        speed: steps per second since this process started.
    """
    left = round((max_steps - step) / speed)
    clock = f"{left // 3600}:{left % 3600 // 60:02d}:{left % 60:02d}"
    sys.stdout.write(
        f"step {step}/{max_steps}  loss {metrics['loss/total']:.4f} (mse {metrics['loss/mse']:.4f}"
        f" vlb {metrics['loss/vlb']:.4f} prior {metrics['loss/prior']:.4f})"
        f"  lr {metrics['optim/lr']:.2e}  {metrics['speed/samples_per_sec']:.1f} samples/s"
        f"  left {clock}\n"
    )
    sys.stdout.flush()
