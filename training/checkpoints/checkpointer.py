"""Save the checkpoints of a run while it trains; load one on the same layout or another.

A checkpoint is DeepSpeed's own files plus consolidated weights. Saving stops training only for a
copy to host memory (checkpoints/host_copy.py); a thread writes it
(checkpoints/background_write.py). One copy exists at a time: a save that is due earlier waits for
the one before. So beside training a rank needs host memory for its own part of a checkpoint, and
rank 0 for one average of all weights.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data_tools.stream.order import ORDER_VERSION
from training.checkpoints.background_write import BackgroundWrite, Outcome, WritePlan
from training.checkpoints.host_copy import load_verified, take_snapshot
from training.checkpoints.manifest import CheckpointManifest, Layout, TrainState, tag_of
from training.checkpoints.other_layout import StoredPartitions, load_resharded
from training.checkpoints.publishing import TakenOverError
from training.config.tree import RunConfig
from training.engine.deepspeed_internals import base_optimizer
from training.engine.expert_placement import ExpertPlacement
from training.engine.interface import Engine
from training.engine.objective import Objective
from training.engine.zero_fragments import whole_shapes


@dataclass(eq=False)
class Checkpointer:
    """Save and load the checkpoints of one run.

    With the engine, the state of the objective is saved, which is small and equal on all ranks, and
    that of the placement.
    """

    engine: Engine
    run: RunConfig
    layout: Layout
    data_hash: str
    objective: Objective
    placement: ExpertPlacement
    staging: Path  # this job's folder beside the checkpoints (run/lock.py)

    def __post_init__(self) -> None:
        self.is_main = torch.distributed.get_rank() == 0
        self._write: BackgroundWrite | None = None
        self._taken_over: str | None = None
        self._saved_at = time.monotonic()

    def is_due_by_clock(self) -> bool:
        """Tell whether `save_every_minutes` have passed; ranks' clocks differ."""
        minutes = (time.monotonic() - self._saved_at) / 60.0
        return 0 < self.run.save_every_minutes <= minutes

    @property
    def is_taken_over(self) -> bool:
        """Tell whether this rank knows already that another job has the run directory."""
        return self._taken_over is not None

    def begin(self, state: TrainState) -> None:
        """Copy what a checkpoint needs and start to write it. All ranks must call this.

        The write before must have been asked for its outcome.

        Raises:
            TakenOverError: on all ranks, when that one could not be published for this reason.
        """
        assert self._write is None, "the outcome of the write before was not asked for"
        if self._taken_over is not None:
            raise TakenOverError(self._taken_over)
        tag = tag_of(state.step)
        error = self._prepare(self.staging / tag)
        placement = self.placement.state()
        states = {"objective": self.objective.state(), "placement": placement}
        client_state = asdict(state) | states
        # DeepSpeed ends it with a barrier: nobody writes before rank 0 has made the folder.
        files = take_snapshot(self.engine, tag, client_state)
        plan = WritePlan(
            staging=self.staging,
            final=self.staging.parent / tag,
            state=state,
            averages=list(base_optimizer(self.engine).profiles),
            shapes=whole_shapes(self.engine),
            slot_of_expert=self.placement.slots_of(placement),
            manifest_of=partial(
                CheckpointManifest, tag, state, self.layout, self.data_hash, ORDER_VERSION
            ),
            keep_last=self.run.keep_last,
            keep_every=self.run.keep_every,
        )
        self._write = BackgroundWrite(plan, files, error)
        self._saved_at = time.monotonic()

    def poll(self) -> Outcome | None:
        """Return the outcome of a write that has ended, once; ranks see it at different times."""
        return self.finish() if self._write is not None and self._write.is_done() else None

    def awaits(self) -> str:
        """Say what the write in progress is doing; any thread may ask."""
        write = self._write
        return "" if write is None else write.doing

    def finish(self, is_urgent: Callable[[], bool] = lambda: False) -> Outcome | None:
        """Wait for the write that was begun; None if its outcome is known already.

        Args:
            is_urgent: asked again and again; when it is true on any rank, the write is given up.
        """
        if self._write is None:
            return None
        outcome, self._write = self._write.outcome(is_urgent), None
        if outcome.is_taken_over:
            self._taken_over = outcome.problem
        return outcome

    def _prepare(self, temporary: Path) -> OSError | None:
        if not self.is_main:
            return None
        try:
            for left in self.staging.iterdir():  # by a write that failed
                shutil.rmtree(left, ignore_errors=True)
            temporary.mkdir()
        except OSError as err:
            return err
        return None

    def load(self, folder: Path, manifest: CheckpointManifest) -> TrainState:
        """Load a checkpoint whose files match its manifest. All ranks must call this."""
        if manifest.layout == self.layout:
            client_state = load_verified(self.engine, folder, manifest)
            # The placement first: it makes the objective forget how timesteps are dealt.
            self.placement.load_state(client_state["placement"])
        else:
            client_state = self._load_other_layout(folder, manifest)
        self.objective.load_state(client_state["objective"])
        fields = TrainState.__dataclass_fields__
        return TrainState(**{name: client_state[name] for name in fields if name in client_state})

    def _load_other_layout(self, folder: Path, manifest: CheckpointManifest) -> dict[str, Any]:
        stored = StoredPartitions(folder, list(manifest.files))
        client_state = stored.client_state
        source = target = self.placement.slots_of(client_state["placement"])
        if manifest.layout.expert_parallel_size == self.layout.expert_parallel_size:
            self.placement.load_state(client_state["placement"])
        else:
            # A place among other ranks means nothing here: experts start as in a new engine, and
            # timesteps are dealt anew.
            target = self.placement.slots_of({})
            client_state["objective"].pop("served_at_home", None)
        load_resharded(self.engine, stored, source, target)
        return client_state
