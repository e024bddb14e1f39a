"""What TensorBoard reads in a run."""

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.monitoring.event_files import TENSORBOARD_DIR


def scalars_in_tensorboard(run_dir):
    events = EventAccumulator(str(run_dir / TENSORBOARD_DIR))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
