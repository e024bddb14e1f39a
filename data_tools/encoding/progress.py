"""Report encoding's progress over all processes and restarts: a bar, or lines in a log."""

import sys
import time

from tqdm import tqdm

from data_tools.encoding.claims import Claims
from data_tools.encoding.output import EncodingOutput, claim_name

PLAIN_SEC = 10.0  # between lines where the output is no terminal, and between looks at the others


def duration(seconds: float) -> str:
    """Write a time for people."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class EncodingProgress:
    """Counts the images that all processes have encoded, whenever they did.

    The rate is that of all processes since this one started: what was done before does not count,
    so the time left is right after a restart.
    """

    def __init__(self, output: EncodingOutput, claims: Claims, is_quiet: bool) -> None:
        self.output, self.claims, self.total = output, claims, output.settings.num_files
        self.is_plain = not is_quiet and not sys.stderr.isatty()
        self.in_shard: dict[int, int] = {}
        self.started = self.last_look = time.monotonic()
        self.done = self.first = self._count()
        self.bar = tqdm(
            total=self.total, initial=self.first, unit="image", disable=is_quiet or self.is_plain
        )

    def update(self, index: int, count: int) -> None:
        """Add images of a shard that this process finished."""
        self.in_shard[index] = self.in_shard.get(index, 0) + count
        self.claims.note(claim_name(index), self.in_shard[index])
        self.done += count
        self.bar.update(count)
        if self.done >= self.total:
            self.look()
        else:
            self.look_now_and_then()

    def look_now_and_then(self) -> None:
        """Look if it is time to."""
        if time.monotonic() - self.last_look > PLAIN_SEC:
            self.look()

    def look(self) -> None:
        """Count again what all have done, and say it."""
        self.last_look = time.monotonic()
        self.output.refresh()
        self.done = self._count()
        self.bar.n = self.done
        self.bar.refresh()
        if self.is_plain:
            sys.stdout.write(self.line() + "\n")
            sys.stdout.flush()

    def line(self) -> str:
        """Describe the progress."""
        per_sec = (self.done - self.first) / max(time.monotonic() - self.started, 1e-9)
        left = self.total - self.done
        left_sec = duration(left / per_sec) if per_sec > 0 else "unknown time"
        return f"{self.done}/{self.total} images, {per_sec:.1f} images/s, {left_sec} left"

    def _count(self) -> int:
        """Count images in finished shards, and those that claims say are done in the others."""
        done = self.output.num_images_done
        for name, count in self.claims.held():
            index = int(name) if name.isdecimal() else -1
            if index in self.output.missing:
                done += self.in_shard.get(index, count)
        return done

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()
