"""The learning rate of every step: a pure function of the configuration and the step.

So resuming needs no scheduler's state, and a continued run can be asked whether its past would have
been another one.
"""

import math

from data_tools.errors import ConfigError
from training.config.tree import Config

ENDING = ("linear", "cosine", "wsd")  # these end at max_steps, or with lr_length
WSD_PART = 0.2  # of the run that cools down, where lr_length does not say
MAX_STEPS_COMPARED = 2000


def learning_rate(config: Config, step: int) -> float:
    """Return the learning rate of optimizer step `step`, from 0.

    A linear warm-up, then a part of `lr`, with u from 0 to 1 over the steps that decay takes:

        constant      1
        linear        1 - u
        cosine        (1 + cos(pi u)) / 2
        wsd           1, and 1 - sqrt(u) in the last lr_length steps (arXiv 2405.18392)
        inverse-sqrt  sqrt(lr_length / step) from step lr_length on (EDM2, arXiv 2312.02696)

    Linear, cosine and wsd end at `lr_floor` of lr and stay there.
    """
    optim = config.optim
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    return optim.lr * _part(config, step)


def _part(config: Config, step: int) -> float:
    optim, kind = config.optim, config.optim.lr_schedule
    if kind == "constant":
        return 1.0
    if kind == "inverse-sqrt":
        assert optim.lr_length is not None, "checked"
        return min(1.0, math.sqrt(optim.lr_length / max(step, 1)))
    start, end = decay_steps(config)
    u = min(max((step - start) / max(end - start, 1), 0.0), 1.0)
    part = {
        "linear": 1.0 - u,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * u)),
        "wsd": 1.0 - math.sqrt(u),
    }[kind]
    return optim.lr_floor + (1.0 - optim.lr_floor) * part


def decay_steps(config: Config) -> tuple[int, int]:
    """Return the steps at which linear, cosine or wsd begins and ends to fall."""
    optim, last = config.optim, config.run.max_steps
    if optim.lr_schedule == "wsd":
        length = round(WSD_PART * last) if optim.lr_length is None else optim.lr_length
        return last - length, last
    return optim.warmup_steps, last if optim.lr_length is None else optim.lr_length


def check_schedule(config: Config) -> None:
    """Refuse a schedule that the run has no room for.

    Raises:
        ConfigError: naming the flag.
    """
    optim, last = config.optim, config.run.max_steps
    kind, length = optim.lr_schedule, optim.lr_length
    if kind == "inverse-sqrt" and length is None:
        raise ConfigError(
            "--lr-schedule inverse-sqrt falls from a step on that --lr-length names; give it, such "
            f"as --lr-length {max(1, last // 10)}."
        )
    if kind == "constant" and length is not None:
        raise ConfigError(
            f"--lr-length {length} does nothing with --lr-schedule constant; leave it out, or use "
            "another schedule."
        )
    if kind in ENDING and length is not None and length > last:
        raise ConfigError(
            f"--lr-length {length} is more than --max-steps {last}; use at most that many."
        )
    if kind not in ENDING:
        return
    start, end = decay_steps(config)
    if start < optim.warmup_steps:
        raise ConfigError(
            f"--lr-length {end - start} of --lr-schedule {kind} begins within --warmup-steps "
            f"{optim.warmup_steps} of --max-steps {last}; shorten one of them."
        )
    if end <= optim.warmup_steps:
        raise ConfigError(
            f"--warmup-steps {optim.warmup_steps} leaves --lr-schedule {kind} nothing of its "
            f"{end} steps; use fewer."
        )


def check_past(old: Config, new: Config, step: int) -> None:
    """Refuse to go on where an earlier step would have had another learning rate.

    So a cosine whose end is moved is refused, and a run at a constant rate may cool down.

    Args:
        old: the run's configuration.
        new: the command's.
        step: of the checkpoint that it continues from.

    Raises:
        ConfigError: naming the flags that differ.
    """
    every = max(1, step // MAX_STEPS_COMPARED)
    compared = {*range(0, step, every), step - 1} if step else set()
    if all(math.isclose(learning_rate(old, s), learning_rate(new, s)) for s in compared):
        return
    before, now = (
        f"--lr-schedule {c.optim.lr_schedule} of --max-steps {c.run.max_steps}" for c in (old, new)
    )
    raise ConfigError(
        f"{now} is not how the run has come to step {step}, which was {before}; keep that, or say "
        "--reschedule to go on by the new one."
    )
