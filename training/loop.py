"""Run the training loop: decide when things happen. engine/ and models/ compute them."""

import sys
import time
from dataclasses import dataclass, field

from data_tools.errors import ConfigError, OutageError
from data_tools.exit_codes import CONFIG_ERROR_EXIT_CODE
from data_tools.stream.loader import Batch
from training.checkpoints.background_write import Outcome
from training.checkpoints.manifest import TrainState
from training.config.learning_rate import learning_rate
from training.engine.build import set_learning_rate
from training.engine.deepspeed_internals import drop_skipped_gradients
from training.engine.non_finite import MicroStepRecord, describe_non_finite, poison_non_finite
from training.monitoring.reporter import StepTables
from training.ranks.agreement import RunError, agreed_message
from training.ranks.heartbeat import (
    AGREEING,
    BACKWARD,
    FORWARD,
    LOGGING,
    READING,
    SAMPLING,
    SAVING,
    UPDATING,
)
from training.ranks.stop_signal import RANK_FAILED, StopSignal
from training.run.checkpoint_notes import FAILED, SAVED, CheckpointNote
from training.run_parts import Training


class NonFiniteLossError(RunError):
    """Too many steps in a row had a loss or a gradient that is not finite.

    A resumed run repeats them exactly, so it is a person's turn.
    """

    exit_code = CONFIG_ERROR_EXIT_CODE


class DataError(RunError):
    """A rank cannot read its samples; what was trained until then is saved."""

    exit_code = CONFIG_ERROR_EXIT_CODE


class DataOutageError(DataError):
    """No rank has damaged data; a server failed for too long, and may be there for the next try."""

    exit_code = OutageError.exit_code


@dataclass
class StepData:
    """This rank's part of one step's global batch."""

    batches: list[tuple[Batch, float]] = field(default_factory=list)  # with seconds waited for it
    error: ConfigError | None = None  # why it is incomplete


def train(training: Training, state: TrainState, stop: StopSignal) -> TrainState:
    """Train to the configured number of steps or until a signal; return the state reached.

    All ranks must call this. The last checkpoint is always written at the step it ends with.

    Raises:
        NonFiniteLossError: on all ranks, when too many steps in a row were left out.
        CheckpointError: on all ranks, when the final checkpoint fails; earlier ones are intact.
        DataError: on all ranks, after saving, when one of them cannot read its samples.
    """
    run, snapshot_every = training.config.run, training.config.optim.ema_snapshot_every
    first_step = saved_step = logged_step = state.step
    # Read and posted one step ahead: all ranks know of damaged data, and of a signal, before they
    # start a step, and none waits for the device to learn it.
    training.heartbeat.begin(state.step + 1)
    following = read_step(training, state.step)
    stop.post(following.error is not None)
    saver = training.checkpointer
    started = time.monotonic()
    training.sums.restart_clock()
    while state.step < run.max_steps:
        training.heartbeat.enter(AGREEING, state.step + 1)
        signal_number = stop.read()
        # A signal during the start still gets a step, so that there is something to save.
        if signal_number == RANK_FAILED or (signal_number and state.step > first_step):
            break
        # What was posted before the last save is out of date.
        is_clock_due = stop.is_save_due() and saved_step != state.step
        step_data, following = following, StepData()
        with training.communication.step(state.step + 1):
            if state.step + 1 < run.max_steps:
                following = read_step(training, state.step)
            has_failed = following.error is not None or saver.is_taken_over
            stop.post(has_failed, saver.is_due_by_clock())
            tables = train_step(training, step_data, state.step)
        state = TrainState(
            state.step + 1, state.samples_consumed + training.config.optim.global_batch_size
        )
        training.reporter.progress.advance()
        report_write(training, state.step, saver.poll())
        is_last = state.step == run.max_steps
        is_save_due = is_last or is_clock_due or state.step % run.save_every == 0
        is_sample_due = run.sample_every and (is_last or state.step % run.sample_every == 0)
        is_snapshot_due = snapshot_every and (is_last or state.step % snapshot_every == 0)
        is_interrupted = is_save_due or is_sample_due or is_snapshot_due
        # Whatever interrupts training ends an interval first: saving and sampling do not count as
        # training time.
        if state.step % run.log_every == 0 or is_interrupted:
            speed = (state.step - first_step) / (time.monotonic() - started)
            training.reporter.end_interval(state, tables, speed)
            logged_step = state.step
        if is_save_due:
            training.heartbeat.enter(SAVING, state.step)
            rebalance(training, state.step)
            save(training, state, stop, is_last)
            saved_step = state.step
        if is_snapshot_due:
            training.heartbeat.enter(SAVING, state.step)
            save_snapshots(training, state.step)
        # A launcher that stops the job waits for seconds only.
        if is_sample_due and not stop.read():
            training.heartbeat.enter(SAMPLING, state.step)
            training.reporter.draw_experts(state.step, tables.gates)
            training.draw_samples(state.step)
        if is_interrupted:
            training.sums.restart_clock()
    if logged_step != state.step:
        speed = (state.step - first_step) / (time.monotonic() - started)
        training.reporter.end_interval(state, tables, speed)
    training.heartbeat.enter(SAVING, state.step)
    if saved_step != state.step:
        save(training, state, stop, is_last=True)
    report_write(training, state.step, saver.finish(), is_last=True)
    raise_data_error(following.error)
    return state


def raise_data_error(error: ConfigError | None) -> None:
    """End the run if a rank could not read its samples. All ranks must call this.

    What a person must correct is said before an outage, which the next start may not meet.

    Raises:
        DataError: on all ranks alike, with the first such error among them.
    """
    if message := agreed_message(None if isinstance(error, OutageError) else error):
        raise DataError(message)
    if message := agreed_message(error):
        raise DataOutageError(message)


def read_step(training: Training, step: int) -> StepData:
    """Read this rank's micro-batches of one more step, while `step` steps are done."""
    training.heartbeat.enter(READING, step + 1)
    data, stream = StepData(), training.stream
    try:
        for _ in range(training.engine.gradient_accumulation_steps()):
            waited = stream.wait_sec
            data.batches.append((next(stream), stream.wait_sec - waited))
    except ConfigError as err:
        data.error = err
    training.heartbeat.enter(AGREEING, step + 1)
    return data


def train_step(training: Training, data: StepData, step: int) -> StepTables:
    """Run one optimizer step: every micro-step's forward and backward, then the update.

    Raises:
        NonFiniteLossError: on all ranks, when this step and too many before it were left out.
    """
    engine, objective, heartbeat = training.engine, training.objective, training.heartbeat
    set_learning_rate(engine, learning_rate(training.config, step))
    skipped_before, records = engine.skipped_steps, []
    for batch, wait_sec in data.batches:
        heartbeat.enter(FORWARD, step + 1)
        micro_batch = objective.micro_batch(batch)
        output = engine(micro_batch.x_t, micro_batch.t, micro_batch.y, micro_batch.group_t)
        terms, samples = objective.loss(output, micro_batch, step)
        heartbeat.enter(BACKWARD, step + 1)
        engine.backward(poison_non_finite(terms.total))
        heartbeat.enter(UPDATING, step + 1)
        engine.step()
        records.append(MicroStepRecord(terms, samples, micro_batch.t))
        training.sums.add(
            step,
            terms,
            mse=samples.mse,
            t=micro_batch.t,
            plan=output.plan,
            wait_sec=wait_sec,
            num_micro_steps=len(data.batches),
        )
    if engine.skipped_steps > skipped_before:  # the gradient's norm is reduced, so all ranks agree
        training.skipped_in_a_row += 1
        drop_skipped_gradients(engine)
        handle_skipped_step(training, step, describe_non_finite(records))
    else:
        training.skipped_in_a_row = 0
    heartbeat.enter(AGREEING, step + 1)
    tables = (output.gate_table, output.loss_log_variance)
    return StepTables(*(None if table is None else table.detach() for table in tables))


def handle_skipped_step(training: Training, step: int, cause: str) -> None:
    """Report a step that changed nothing; end the run after too many in a row."""
    event = f"step {step + 1} left out: {cause}"
    training.report(step + 1, event)
    count, limit = training.skipped_in_a_row, training.config.optim.max_skipped_steps
    if count > limit:
        report_write(training, step, training.checkpointer.finish())
        raise NonFiniteLossError(
            f"{event}; {count} step(s) in a row were left out and --max-skipped-steps is {limit}. "
            "The checkpoints before it are intact: lower --lr, raise --warmup-steps, set "
            "--gradient-clipping or --qk-norm, or look at the data of these steps."
        )


def rebalance(training: Training, step: int) -> None:
    """Place the experts anew, if it is time to. All ranks must call this before they save.

    Before the checkpoint, so that a resumed run has the placement of an uninterrupted one.
    """
    run = training.config.run
    is_due = run.rebalance_every and step % run.rebalance_every == 0
    if is_due and run.expert_parallel_size > 1:
        report = training.placement.rebalance()
        if training.is_main:
            sys.stdout.write(f"step {step}: {report}\n")


def save(training: Training, state: TrainState, stop: StopSignal, is_last: bool) -> None:
    """Begin a checkpoint, after the one before is done; wait for it only if it is the last.

    A signal does not wait for the one before: that is given up for this one.
    """
    saver, started = training.checkpointer, time.monotonic()
    report_write(training, state.step, saver.finish(stop.is_received))
    training.heartbeat.enter(SAVING, state.step)
    saver.begin(state)
    training.pause_sec = time.monotonic() - started
    training.monitor.extra(state.step, "checkpoint/pause_sec", training.pause_sec)
    if is_last:
        report_write(training, state.step, saver.finish(), is_last=True)


def report_write(
    training: Training, step: int, outcome: Outcome | None, is_last: bool = False
) -> None:
    """Say how writing a checkpoint ended; a failure ends the run only if no checkpoint follows."""
    if outcome is None:
        return
    training.heartbeat.enter(LOGGING, step)
    if not outcome.is_taken_over:  # else the directory is another job's by now
        what = SAVED if outcome.problem is None else FAILED
        note = CheckpointNote(outcome.state.step, what, outcome.problem or "")
        training.reporter.note_checkpoint(note)
    if outcome.problem is None:
        training.monitor.extra(outcome.state.step, "checkpoint/write_sec", outcome.write_sec)
        if training.is_main:
            sys.stdout.write(
                f"checkpoint of step {outcome.state.step}: training stood still for "
                f"{training.pause_sec:.2f} s, written after {outcome.write_sec:.2f} s\n"
            )
        return
    if is_last:
        raise outcome.error()
    if not outcome.is_taken_over:  # else the run ends soon, on all ranks at the same step
        training.report(step, outcome.warning())


def save_snapshots(training: Training, step: int) -> None:
    """Store the power-function averages; a failure costs this snapshot only."""
    if problem := training.save_snapshots(step):
        training.report(step, f"snapshot of step {step} could not be written: {problem}")
