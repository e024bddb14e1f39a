"""Build the parts of one run, and close them at its end."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from data_tools.process.leaving import flushed_when_leaving
from data_tools.stream.loader import LatentStream
from models.latents import scale_and_shift
from training.checked_job import Job
from training.checkpoints.average_snapshots import save_snapshots
from training.checkpoints.checkpointer import Checkpointer
from training.checkpoints.manifest import TrainState
from training.checkpoints.warm_start import initial_values
from training.config.tree import Config
from training.engine.build import build_engine
from training.engine.expert_placement import ExpertPlacement
from training.engine.interface import Engine
from training.engine.objective import Objective
from training.monitoring.communication import CommunicationWatch
from training.monitoring.event_files import Monitor, read_metrics
from training.monitoring.expert_load import LoadHistory, exchange_shape
from training.monitoring.interval_sums import MetricSums
from training.monitoring.progress import Progress
from training.monitoring.reporter import Reporter
from training.monitoring.run_history import RunHistory
from training.monitoring.sample_grid import SampleGrid
from training.ranks.heartbeat import LOGGING, READING, SAVING, Heartbeat
from training.ranks.process_group import Ranks
from training.run.checkpoint_notes import read_notes
from training.run.program import read_starts


@dataclass
class Training:
    """The parts of one run.

    What draws a grid of samples and what stores the averages take the step, and write into the run
    directory.
    """

    config: Config
    engine: Engine
    stream: LatentStream
    objective: Objective
    sums: MetricSums
    monitor: Monitor
    reporter: Reporter
    checkpointer: Checkpointer
    placement: ExpertPlacement
    save_snapshots: Callable[[int], str | None]
    draw_samples: Callable[[int], None]
    is_main: bool
    heartbeat: Heartbeat
    communication: CommunicationWatch
    skipped_in_a_row: int = 0  # steps left out since the last one that was not
    pause_sec: float = 0.0  # for which the last save interrupted training

    def report(self, step: int, event: str) -> None:
        """Tell the person who watches, and TensorBoard, of an event; only rank 0 does."""
        self.heartbeat.enter(LOGGING, step)
        self.reporter.warn(step, event)


@contextmanager
def open_training(
    job: Job,
    ranks: Ranks,
    device: torch.device,
    state: TrainState,
    staging: Path,
    heartbeat: Heartbeat,
    progress: Progress,
) -> Iterator[Training]:
    """Build a run's parts at stream position `state.samples_consumed`. All ranks must call this.

    Yields:
        The parts; the stream and the event files are closed afterwards.
    """
    config, manifest, data = job.config, job.manifest, job.config.data
    run_dir = Path(config.run.run_dir)
    initial = job.warm_start and partial(initial_values, job.warm_start, rank=ranks.rank)
    engine = build_engine(config, job.deepspeed_config, initial)
    objective = Objective(
        config,
        ranks.rank,
        *scale_and_shift(*manifest.vae.normalisation, device),
        device,
        world_size=ranks.world_size,
        is_frozen=manifest.is_frozen,
    )
    objective.gate_stream.watch(engine.module.gate)
    placement = ExpertPlacement(config, engine, objective)
    stream = LatentStream(
        job.data,
        seed=config.run.seed_of("data"),
        window=data.shuffle_window,
        num_streams=data.data_streams,
        check=data.check_shards,
        cache=job.cache,
        global_batch_size=config.optim.global_batch_size,
        micro_batch_size=engine.train_micro_batch_size_per_gpu(),
        rank=ranks.rank,
        world_size=ranks.world_size,
        start_position=state.samples_consumed,
        horizontal_flip=data.horizontal_flip,
    )
    monitor = Monitor(run_dir if ranks.is_main else None, resume_step=state.step)
    depth, num_experts = len(engine.module.blocks), engine.module.num_experts
    checkpointer = Checkpointer(
        engine,
        config.run,
        job.layout,
        data_hash=manifest.hash,
        objective=objective,
        placement=placement,
        staging=staging,
    )
    heartbeat.explain(READING, stream.awaits)
    heartbeat.explain(SAVING, checkpointer.awaits)
    group_size = config.run.expert_parallel_size
    exchange = exchange_shape(engine.module, ranks.rank, group_size, job.layout.precision)
    sums = MetricSums(depth, num_experts, config.diffusion.num_timesteps, device, exchange)
    # Only the main rank reports it, and only that one's records are complete.
    records = read_metrics(run_dir) if ranks.is_main else []
    loads = LoadHistory(depth, num_experts, records)
    starts = read_starts(run_dir) if ranks.is_main else []
    history = RunHistory(starts, read_notes(run_dir) if ranks.is_main else [], records)
    del records  # hundreds of MB late in a long run, and this frame lives as long as the run
    reporter = Reporter(
        config,
        engine,
        sums=sums,
        loads=loads,
        history=history,
        monitor=monitor,
        progress=progress,
        device=device,
        heartbeat=heartbeat,
        is_main=ranks.is_main,
    )
    if ranks.is_main:
        reporter.begin(starts)
    grid = SampleGrid(config, engine, objective.diffusion, ranks, device, monitor, job.vae)
    with closing(monitor), closing(stream), flushed_when_leaving(monitor.flush):
        yield Training(
            config=config,
            engine=engine,
            stream=stream,
            objective=objective,
            sums=sums,
            monitor=monitor,
            checkpointer=checkpointer,
            placement=placement,
            save_snapshots=partial(save_snapshots, engine, run_dir),
            draw_samples=grid.draw,
            is_main=ranks.is_main,
            reporter=reporter,
            heartbeat=heartbeat,
            communication=CommunicationWatch(
                monitor, device, config.run.save_every, ranks.is_main and ranks.world_size > 1
            ),
        )
