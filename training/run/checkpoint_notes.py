"""The journal of a run's checkpoints, checkpoints.jsonl: a line for each that was saved, failed to
be saved, or was found damaged at a start.
"""

from dataclasses import dataclass, field
from pathlib import Path

from data_tools.files import FIRST
from data_tools.formats import Format

CHECKPOINTS_FILE = "checkpoints.jsonl"
SAVED, FAILED, DAMAGED = "saved", "failed", "damaged"


@dataclass(frozen=True)
class CheckpointNote:
    """What became of a checkpoint."""

    step: int  # of the checkpoint; of a damaged one, the step that the run went on from instead
    outcome: str  # SAVED, FAILED or DAMAGED
    reason: str = field(default="", metadata=FIRST)  # of a failure or of damage


NOTE = Format(newest=1, kind=CheckpointNote)


def append_note(run_dir: Path, note: CheckpointNote) -> None:
    """Add a line to checkpoints.jsonl. Only rank 0 calls this.

    Raises:
        OSError: it cannot be written.
    """
    NOTE.append(run_dir / CHECKPOINTS_FILE, note)


def read_notes(run_dir: Path) -> list[CheckpointNote]:
    """Return what became of a run's checkpoints, oldest first."""
    return NOTE.read_journal(run_dir / CHECKPOINTS_FILE)


def last_saved_step(run_dir: Path) -> int | None:
    """Return the step of the checkpoint that a run saved last; None if it has saved none."""
    steps = [note.step for note in read_notes(run_dir) if note.outcome == SAVED]
    return steps[-1] if steps else None
