"""Write metrics and pictures to TensorBoard and metrics.jsonl, from rank 0; read metrics.jsonl."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from data_tools.errors import ConfigError
from data_tools.files import MalformedError, append_whole, is_json, replace_file
from data_tools.formats import Format
from training.monitoring.expert_load import by_block
from training.run.directory import METRICS_FILE

METRICS = Format(newest=1)  # a line of the first format says no number
TENSORBOARD_DIR = "tensorboard"
HPARAMS_METRICS = ("loss/total", "loss/mse", "speed/samples_per_sec")
MAX_EVENTS_BYTES = 64 << 20  # of one of TensorBoard's files; then the next one is begun
MAX_LOAD_TAGS = 512  # TensorBoard gets slow with thousands; beyond, it has a histogram per block


class Monitor:
    """Write metrics under the same names to TensorBoard and to metrics.jsonl.

    Args:
        run_dir: None on ranks that write nothing; every method is then a no-op.
        resume_step: steps already done; records of later steps, left by a run that died after its
            last checkpoint, are dropped from both places. Lines that are not understood stay.
    """

    def __init__(self, run_dir: Path | None, resume_step: int = 0) -> None:
        self._writer, self._lines, self._has_warned = None, None, False
        if run_dir is None:
            return
        path = run_dir / METRICS_FILE
        _drop_later_records(path, resume_step)
        self._lines = path.open("ab", buffering=0)
        self._folder = run_dir / TENSORBOARD_DIR
        self._writer = SummaryWriter(str(self._folder), purge_step=resume_step + 1)

    def scalars(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of one logging interval that ended with `step`."""
        if self._writer is None:
            return
        with self.surviving_disk_errors():
            append_whole(self._lines, json.dumps({"step": step} | metrics))
        with self.surviving_disk_errors():
            loads = by_block(metrics)
            if sum(map(len, loads.values())) <= MAX_LOAD_TAGS:
                loads = {}
            for name, values in loads.items():
                self._writer.add_histogram(name, np.array(values), step)
            # All in one event: add_scalar for each takes ten times as long.
            values = (
                Summary.Value(tag=name, simple_value=value)
                for name, value in metrics.items()
                if name.rpartition("/")[0] not in loads
            )
            self._writer.file_writer.add_summary(Summary(value=values), step)
            self._writer.flush()
            files = [path.stat() for path in self._folder.iterdir() if path.is_file()]
            if max(files, key=lambda file: file.st_mtime_ns).st_size > MAX_EVENTS_BYTES:
                self._writer.close()
                self._writer = SummaryWriter(str(self._folder))

    def extra(self, step: int, name: str, value: float) -> None:
        """Record what another start of the same run would not repeat: TensorBoard only."""
        self._write(lambda writer: writer.add_scalar(name, value, step))

    def layout(self, layout: dict[str, dict[str, list[Any]]]) -> None:
        """Set the charts of TensorBoard's page "custom scalars"."""
        self._write(lambda writer: writer.add_custom_scalars(layout))

    def hyperparameters(self, values: dict[str, Any]) -> None:
        """Record what TensorBoard's page "hparams" compares runs by."""
        # SummaryWriter.add_hparams would make another run for them.
        plain = {k: v if isinstance(v, bool | int | float) else str(v) for k, v in values.items()}
        experiment, start, _ = hparams(plain, dict.fromkeys(HPARAMS_METRICS, 0.0))
        for summary in (experiment, start):
            self._write(lambda writer, one=summary: writer.file_writer.add_summary(one))

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Record a picture, (H, W, 3) uint8."""
        self._write(lambda writer: writer.add_image(name, picture, step, dataformats="HWC"))

    def text(self, name: str, text: str, step: int | None = None) -> None:
        """Record a text, shown as preformatted."""
        indented = "\n".join(f"    {line}" for line in text.splitlines())
        self._write(lambda writer: writer.add_text(name, indented, step))

    def event(self, step: int, text: str) -> None:
        """Record something out of the ordinary that happened at a step."""
        self.text("events", text, step)

    def flush(self) -> None:
        """Write what TensorBoard's writer still holds; any thread may call this."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Flush and close both files."""
        if self._writer is not None:
            with self.surviving_disk_errors():
                self._writer.close()
            self._lines.close()

    def _write(self, write: Callable[[SummaryWriter], object]) -> None:
        if self._writer is not None:
            with self.surviving_disk_errors():
                write(self._writer)

    @contextmanager
    def surviving_disk_errors(self) -> Iterator[None]:
        """Lose a record rather than the training; say so once."""
        try:
            yield
        except OSError as err:
            if not self._has_warned:
                sys.stderr.write(
                    f"warning: metrics or pictures could not be written ({err.strerror or err}); "
                    "training goes on without them, TensorBoard shows no more until a restart.\n"
                )
            self._has_warned = True


def _drop_later_records(path: Path, resume_step: int) -> None:
    """Keep the records up to `resume_step`, and what is not understood."""
    if not path.exists():
        return
    kept, num_strange = [], 0
    for line, record in _lines(path):
        num_strange += record is None
        if record is None or record["step"] <= resume_step:
            kept.append(line)
    if sum(map(len, kept)) != path.stat().st_size:  # late in a long run it has hundreds of MB
        replace_file(path, lambda file: file.writelines(kept))
    _warn_of_left_out(path, num_strange)


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """Read the records of a run, one dict per logging interval; says what it leaves out.

    Raises:
        OSError: the file cannot be read.
    """
    path = run_dir / METRICS_FILE
    records = [record for _, record in _lines(path)]
    found = [record for record in records if record is not None]
    _warn_of_left_out(path, len(records) - len(found))
    return found


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, float] | None]]:
    """Yield the lines and their records, None for one that is not understood.

    A last line without its end is none if it was cut off, or is being written.
    """
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line, _record(line)
            elif is_json(line):
                yield line + b"\n", _record(line)


def _record(line: bytes) -> dict[str, float] | None:
    """Return what a line says, if it is a step's numbers by name.

    It may be something else after a power cut, which leaves holes of zeros on some file systems,
    or of a newer program.
    """
    try:
        record = METRICS.loads(line.decode("ascii"), METRICS_FILE)
    except (ValueError, MalformedError, ConfigError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    return record if all(type(value) in (int, float) for value in record.values()) else None


def _warn_of_left_out(path: Path, count: int) -> None:
    if count:
        sys.stderr.write(
            f"warning: {path}: {count} line(s), damaged or of a newer program, are left out; they "
            "stay in the file.\n"
        )
