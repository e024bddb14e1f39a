"""Show the progress of a training: a bar on a terminal, lines elsewhere."""

import sys
import threading
from collections.abc import Callable
from typing import Self, TextIO

from tqdm import tqdm


class Progress:
    """Shows how far a run is and how it does.

    On a terminal that is a bar at its last line, and the lines go to the log only. Without a log,
    as on all ranks but one, nothing is shown.

    Args:
        log: writes a line to the log of the run and nowhere else; None = nothing is shown.
        is_quiet: neither bar nor lines, but in the log.
    """

    def __init__(
        self, max_steps: int, log: Callable[[str], None] | None, is_quiet: bool, terminal: TextIO
    ) -> None:
        self._max_steps, self._log = max_steps, log
        self._has_bar = log is not None and not is_quiet and terminal.isatty()
        self._terminal, self._bar, self._restarts = terminal, None, ""

    def begin(self, step: int, num_starts: int) -> None:
        """Start, or go on, at a number of steps done; `num_starts` counts this one."""
        if self._has_bar:
            tqdm.set_lock(threading.RLock())  # the usual one is for several processes
            self._bar = tqdm(
                total=self._max_steps,
                initial=step,
                unit="step",
                smoothing=0,  # saving and sampling are part of the time left
                dynamic_ncols=True,
                file=self._terminal,
            )
            if num_starts > 1:
                self._restarts = f", {num_starts - 1} restart(s)"

    def advance(self) -> None:
        """Count one step."""
        if self._bar is not None:
            self._bar.update()

    def show(self, metrics: dict[str, float], step: int, speed: float) -> None:
        """Show the metrics of an interval; `speed` is in steps per second of this process."""
        if self._log is None:
            return
        left = round((self._max_steps - step) / speed)
        clock = f"{left // 3600}:{left % 3600 // 60:02d}:{left % 60:02d}"
        losses = short = "every step was left out"
        if "loss/total" in metrics:
            short = f"loss {metrics['loss/total']:.4f}"
            losses = (
                f"{short} (mse {metrics['loss/mse']:.4f} vlb "
                f"{metrics['loss/vlb']:.4f} prior {metrics['loss/prior']:.4f})"
            )
        speed_text = f"{metrics['speed/samples_per_sec']:.1f} images/s"
        line = (
            f"step {step}/{self._max_steps}  {losses}  lr {metrics['optim/lr']:.2e}  "
            f"{speed_text}  left {clock}"
        )
        if self._bar is None:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
        else:
            self._log(line)
            self._bar.set_postfix_str(f"{short}, {speed_text}{self._restarts}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
