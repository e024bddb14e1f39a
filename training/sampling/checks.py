"""What may be asked of a sampler: one set of checks for every way in.

The command line, the demo's page and an exported pipeline differ in what they call a value
("--steps", "num_inference_steps"), which begins each sentence, and in nothing else.
"""

import math
import operator
from dataclasses import dataclass
from typing import Any

from models.guidance import Guidance
from models.sampler import methods_for
from training.config.wording import either, shown
from training.sampling.latents import SamplerSettings

SEED_LIMIT = 2**63


class WrongValueError(ValueError):
    """A value that cannot be meant; the sentence begins with what its user calls it."""


@dataclass(frozen=True)
class Spelling:
    """What one way in calls the values."""

    sampler: str = "sampler"
    steps: str = "num_inference_steps"
    seed: str = "seed"
    shift: str = "shift"
    scale: str = "guidance_scale"
    interval: str = "guidance_interval"
    channels: str = "guidance_channels"


@dataclass(frozen=True)
class Asked:
    """How images are to be drawn, as it was given; None = not given."""

    sampler: Any = None
    steps: Any = None
    seed: Any = None
    shift: Any = None
    scale: Any = None
    interval: Any = None  # fractions of the timesteps, the lower one first
    channels: Any = None


@dataclass(frozen=True)
class Process:
    """What a model was trained on, as far as it decides how images can be drawn.

    Attributes:
        objective: of the diffusion process.
        num_timesteps: S.
        latent_channels: C.
        cannot_guide: why labels cannot guide it, such as "this run was trained without classes";
            "" if they can.
    """

    objective: str
    num_timesteps: int
    latent_channels: int
    cannot_guide: str


def checked_settings(
    asked: Asked, default: Asked, process: Process, call: Spelling
) -> SamplerSettings:
    """Put what was asked for over the defaults and check it.

    Args:
        asked: by the user.
        default: of the run or the export, for what was not; `interval` and `channels` may be None.
        process: that the model was trained on.
        call: the user's words.

    Raises:
        WrongValueError: one sentence on the first value that cannot be.
    """
    values = {
        name: getattr(default, name) if value is None else value
        for name, value in vars(asked).items()
    }
    scale = _scale(values["scale"], process, call)
    for name in ("interval", "channels"):
        if scale == 1.0 and getattr(asked, name) is not None:
            raise WrongValueError(
                f"{getattr(call, name)} has no effect without guidance, whose scale is 1; choose "
                "another scale or leave it out."
            )
    guidance = Guidance(
        scale,
        _channels(values["channels"], process, call),
        _interval(values["interval"], process, call),
    )
    return SamplerSettings(
        _method(values["sampler"], process, call),
        _steps(values["steps"], process, call),
        _seed(values["seed"], call),
        guidance=guidance,
        shift=_shift(values["shift"], process, call),
    )


def whole_number(value: Any, name: str) -> int:
    """Return a whole number of Python, numpy or torch as an int; True is none here."""
    plain = _unpacked(value)
    try:
        if isinstance(plain, bool):
            raise TypeError
        return operator.index(plain)
    except TypeError:
        raise WrongValueError(f"{name} must be a whole number, not {shown(value)}.") from None


def number(value: Any, name: str) -> float:
    """Return a number of Python, numpy or torch as a float; it may be infinite or NaN."""
    plain = _unpacked(value)
    try:
        if isinstance(plain, bool | str | bytes):
            raise TypeError
        return float(plain)
    except (TypeError, OverflowError):
        raise WrongValueError(f"{name} must be a number, not {shown(value)}.") from None


def _unpacked(value: Any) -> Any:
    """Take a number out of an array of no dimensions, as numpy and torch have them."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _steps(value: Any, process: Process, call: Spelling) -> int:
    steps = whole_number(value, call.steps)
    if steps < 1:
        raise WrongValueError(f"{call.steps} must be at least 1, not {steps}.")
    if steps > process.num_timesteps:
        raise WrongValueError(
            f"{call.steps} {steps} exceeds the {process.num_timesteps} timesteps of the model; use "
            "fewer."
        )
    return steps


def _method(value: Any, process: Process, call: Spelling) -> str:
    methods = methods_for(process.objective)
    if not isinstance(value, str) or value not in methods:
        given = value if isinstance(value, str) else shown(value)
        raise WrongValueError(
            f"{call.sampler} {given} does not fit objective {process.objective}; use "
            f"{either(methods)}."
        )
    return value


def _seed(value: Any, call: Spelling) -> int:
    seed = whole_number(value, call.seed)
    if not 0 <= seed < SEED_LIMIT:
        raise WrongValueError(f"{call.seed} must be >=0 and <{SEED_LIMIT}, not {seed}.")
    return seed


def _shift(value: Any, process: Process, call: Spelling) -> float:
    shift = number(value, call.shift)
    if shift != 1.0 and process.objective != "flow":
        raise WrongValueError(
            f"{call.shift} {shift} does not fit objective {process.objective}: only the times of "
            "flow are shifted; leave it out."
        )
    if not 0 < shift < math.inf:
        raise WrongValueError(f"{call.shift} must be a number above 0, not {shift}.")
    return shift


def _scale(value: Any, process: Process, call: Spelling) -> float:
    scale = number(value, call.scale)
    if not 0 <= scale < math.inf:
        raise WrongValueError(f"{call.scale} must be a number of at least 0, not {scale}.")
    if scale != 1.0 and process.cannot_guide:
        raise WrongValueError(
            f"{call.scale} {scale} compares predictions with and without the label, but "
            f"{process.cannot_guide}; use {call.scale} 1."
        )
    return scale


def _interval(value: Any, process: Process, call: Spelling) -> tuple[float, float] | None:
    """Return the smallest and the largest guided timestep."""
    if value is None:
        return None
    try:
        ends = [number(end, call.interval) for end in value]
    except TypeError:
        ends = []
    if len(ends) != 2:
        raise WrongValueError(f"{call.interval} must be two numbers, not {shown(value)}.")
    low, high = ends
    if not 0 <= low <= high <= 1:
        raise WrongValueError(
            f"{call.interval} {low} {high} is no interval within 0 and 1; give the lower end first."
        )
    return low * process.num_timesteps, high * process.num_timesteps


def _channels(value: Any, process: Process, call: Spelling) -> int | None:
    """Return how many latent channels are guided; None = all."""
    if value is None:
        return None
    channels, most = whole_number(value, call.channels), process.latent_channels
    if not 1 <= channels <= most:
        raise WrongValueError(
            f"{call.channels} must be from 1 to {most}, the latent channels of the model, not "
            f"{channels}."
        )
    return None if channels == most else channels
