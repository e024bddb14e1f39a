"""The line that a person who watches a training reads."""

import sys


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
    losses = "every step was left out"
    if "loss/total" in metrics:
        losses = (
            f"loss {metrics['loss/total']:.4f} (mse {metrics['loss/mse']:.4f} vlb "
            f"{metrics['loss/vlb']:.4f} prior {metrics['loss/prior']:.4f})"
        )
    sys.stdout.write(
        f"step {step}/{max_steps}  {losses}  lr {metrics['optim/lr']:.2e}  "
        f"{metrics['speed/samples_per_sec']:.1f} samples/s  left {clock}\n"
    )
    sys.stdout.flush()
