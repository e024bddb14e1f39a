"""Report a run while it trains: numbers of each logging interval, pictures, warnings."""

import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from models.flops import training_flops
from models.loss_weights import cluster_log_variances
from training.checkpoints.manifest import TrainState
from training.config.learning_rate import learning_rate
from training.config.network import network_options
from training.config.tree import Config
from training.cost.gpu_peaks import peak_tflops
from training.engine.interface import Engine
from training.monitoring.dashboard import dashboard
from training.monitoring.event_files import Monitor
from training.monitoring.expert_load import DEAD_INTERVALS, GateDrift, LoadHistory
from training.monitoring.expert_pictures import affinity_map, expert_map, load_history, load_map
from training.monitoring.interval_sums import MetricSums
from training.monitoring.loss_spikes import SpikeDetector
from training.monitoring.progress import Progress
from training.monitoring.run_history import RunHistory
from training.ranks.heartbeat import AGREEING, LOGGING, Heartbeat
from training.run.checkpoint_notes import CheckpointNote, append_note
from training.run.program import Start

TERA = 1e12


class StepTables(NamedTuple):
    """What the model says about all timesteps, detached; None where it says nothing."""

    gates: torch.Tensor | None  # (L, S, E)
    loss_log_variance: torch.Tensor | None  # (S,)


class Reporter:
    """Reduces, records and prints what a run does.

    Args:
        config: of the run.
        engine: the DeepSpeed engine.
        sums: of the interval.
        loads: of all intervals.
        history: of the run.
        monitor: where records go.
        progress: what a person watches.
        device: of the training.
        heartbeat: of this process.
        is_main: whether this rank talks to a person.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        sums: MetricSums,
        loads: LoadHistory,
        history: RunHistory,
        monitor: Monitor,
        progress: Progress,
        device: torch.device,
        heartbeat: Heartbeat,
        is_main: bool,
    ) -> None:
        self.config, self.engine, self.sums, self.loads = config, engine, sums, loads
        self.history, self.monitor, self.progress = history, monitor, progress
        self.heartbeat, self.is_main = heartbeat, is_main
        self._spikes, self._drift = SpikeDetector(config.optim.spike_threshold), GateDrift()
        # The gates of all timesteps are computed once per pass, whatever its number of samples.
        N = engine.train_micro_batch_size_per_gpu()
        self._tflop_of_sample = training_flops(network_options(config), N) / N / TERA
        self._peak_tflops = peak_tflops(device)

    def begin(self, starts: list[Start]) -> None:
        """Record what the run is, once per start. Of the main rank only."""
        start, config = starts[-1], self.config
        depth, num_experts = len(self.engine.module.blocks), self.engine.module.num_experts
        num_ranks = torch.distributed.get_world_size()
        has_peak = self._peak_tflops is not None
        self.monitor.layout(dashboard(config, depth, num_experts, num_ranks, has_peak))
        plain = {key: value for part in config.to_dict().values() for key, value in part.items()}
        self.monitor.hyperparameters(plain)
        self.monitor.text("configuration", config.to_yaml())
        self.monitor.text("start", json.dumps(vars(start), indent=1), start.step)
        self.monitor.extra(start.step, "run/starts", float(len(starts)))

    def warn(self, step: int, event: str) -> None:
        """Tell the person who watches, and TensorBoard, of an event. Of the main rank only."""
        if self.is_main:
            sys.stderr.write(f"warning: {event}\n")
            self.monitor.event(step, event)

    def note_checkpoint(self, note: CheckpointNote) -> None:
        """Record what became of a checkpoint, and draw the run's history. Of the main rank only."""
        if not self.is_main:
            return
        self.history.notes.append(note)
        with self.monitor.surviving_disk_errors():
            append_note(Path(self.config.run.run_dir), note)
        if (picture := self.history.picture()) is not None:
            self.monitor.image(note.step, "run/history", picture)

    def end_interval(self, state: TrainState, tables: StepTables, speed: float) -> None:
        """Reduce and record the metrics since the last call. All ranks must call this.

        Args:
            state: reached.
            tables: of the last step.
            speed: steps per second since this process started.
        """
        # Until here the host may wait for a collective of the step; then for disks.
        self.heartbeat.enter(AGREEING, state.step)
        metrics, step_losses, expert_count = self.sums.reduce()
        self.heartbeat.enter(LOGGING, state.step)
        of_experts, newly_dead = self.loads.add(state.step, expert_count)
        metrics |= of_experts
        if newly_dead:
            text = f"experts without a sample in {DEAD_INTERVALS} logging intervals: {newly_dead}"
            self.monitor.event(state.step, text)
        metrics["loss/spikes"] = float(self._report_spikes(step_losses))
        metrics["optim/lr"] = learning_rate(self.config, state.step - 1)
        metrics["optim/skipped_steps"] = float(self.engine.skipped_steps)
        norm = self.engine.get_global_grad_norm()
        if norm is not None and math.isfinite(norm):  # ZeRO 0 without clipping computes none
            metrics["optim/grad_norm"] = float(norm)
        if tables.loss_log_variance is not None:
            clusters = cluster_log_variances(tables.loss_log_variance).tolist()
            metrics |= {f"uncertainty/cluster_{i}": value for i, value in enumerate(clusters)}
        metrics |= self._compute_metrics(metrics["speed/samples_per_sec"])
        self.monitor.scalars(state.step, metrics)
        if self.is_main:
            self.history.add_interval(state.step, metrics)
            # Also between starts: of a few points TensorBoard hides some as outliers.
            self.monitor.extra(state.step, "run/starts", float(len(self.history.starts)))
            if tables.gates is not None and (drift := self._drift.add(tables.gates)) is not None:
                # Not among the records: a resumed run has none for its first interval.
                self.monitor.extra(state.step, "moe/gate_drift", drift)
            self.progress.show(metrics, state.step, speed)

    def _report_spikes(self, step_losses: dict[int, float]) -> int:
        count = 0
        for step, loss in step_losses.items():
            if math.isfinite(loss) and (spike := self._spikes.add(step + 1, loss)):
                self.warn(spike.step, str(spike))
                count += 1
        return count

    def _compute_metrics(self, samples_per_sec: float) -> dict[str, float]:
        per_rank = samples_per_sec / torch.distributed.get_world_size()
        metrics = {"speed/tflops_per_rank": per_rank * self._tflop_of_sample}
        if self._peak_tflops is not None:
            share = metrics["speed/tflops_per_rank"] / self._peak_tflops
            metrics["speed/mfu_pct"] = 100.0 * share
        return metrics

    def draw_experts(self, step: int, gates: torch.Tensor | None) -> None:
        """Show what the gates (L, S, E) choose for the timesteps, and whom the experts served."""
        if not self.is_main or gates is None:
            return
        top_k = self.config.model.top_k
        self.monitor.image(step, "moe/timestep_to_expert", expert_map(gates, top_k))
        self.monitor.image(step, "moe/timesteps_that_share_experts", affinity_map(gates, top_k))
        if (counts := self.loads.take_counts()) is not None:
            self.monitor.image(step, "moe/load_by_timestep", load_map(counts, len(gates[0])))
        steps, loads = self.loads.over_time()
        if len(steps) > 1:
            self.monitor.image(step, "moe/load_over_time", load_history(loads.numpy(), steps))
