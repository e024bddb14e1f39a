"""Random numbers that are a pure function of (seed, stream, position, element).

Nothing here has state. The numbers of a sample depend on its stream position alone, so they are
the same on any rank, in any order, after any resume, and on CPU and GPU (up to the rounding of
log, cos and sin). Each number comes from a 64-bit hash; the mixing function is the finaliser of
splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).

N positions.
"""

import math
from enum import IntEnum

import torch
from torch import Tensor

# The increment of splitmix64 (2^64 / golden ratio, odd) and the two multipliers of its finaliser.
_INCREMENT = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB
_MASK_64 = (1 << 64) - 1


class Stream(IntEnum):
    """What a random number is for; numbers of different streams are independent.

    The values are part of the meaning of a seed: never renumber, only add.
    """

    POSTERIOR = 0
    FLIP = 1
    LABEL_DROP = 2
    TIMESTEP = 3
    NOISE = 4
    SAMPLE_START = 5
    SAMPLE_STEP = 6
    TIMESTEP_STRATUM = 7
    SAMPLE_LABEL = 8


def uniform(seed: int, stream: Stream, positions: Tensor, count: int) -> Tensor:
    """Draw `count` numbers in [0, 1) for each position.

    Args:
        seed: any integer; taken modulo 2^64.
        stream: what the numbers are for.
        positions: (N,) int64, on the device where the numbers are wanted.
        count: numbers for each position.

    Returns:
        (N, count) float32, multiples of 2^-24.
    """
    bits = _hash(seed, stream, positions, count)
    return _shift_right(bits, 40).to(torch.float32) * 2.0**-24


def normal(seed: int, stream: Stream, positions: Tensor, count: int) -> Tensor:
    """Draw `count` standard normal numbers for each position, (N, count) float32.

    Box-Muller: one hash gives elements 2i and 2i + 1, so a number does not depend on `count`.
    """
    bits = _hash(seed, stream, positions, (count + 1) // 2)
    # float64 keeps CPU and GPU equal after the final rounding in all but rare cases.
    high = (_shift_right(bits, 32).to(torch.float64) + 0.5) * 2.0**-32  # in (0, 1): log is finite
    low = (bits & 0xFFFFFFFF).to(torch.float64) * 2.0**-32
    radius = torch.sqrt(-2.0 * torch.log(high))
    angle = low * (2.0 * math.pi)
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs.flatten(1)[:, :count].to(torch.float32)


def integers(seed: int, stream: Stream, positions: Tensor, high: int) -> Tensor:
    """Draw one integer in [0, high) for each position, (N,) int64.

    The bias towards small values is below high / 2^63.
    """
    assert high > 0, "high must be positive"
    return _shift_right(_hash(seed, stream, positions, 1)[:, 0], 1) % high


def _hash(seed: int, stream: Stream, positions: Tensor, count: int) -> Tensor:
    """Hash every (seed, stream, position, element) to 64 bits, (N, count) int64."""
    assert positions.dim() == 1 and positions.dtype == torch.int64, "positions must be (N,) int64"
    key = _mix_int(_mix_int(seed & _MASK_64) + int(stream) + 1)
    of_position = _mix(positions * _signed(_INCREMENT) + _signed(key))  # (N,)
    elements = torch.arange(1, count + 1, device=positions.device, dtype=torch.int64)
    of_element = _mix(elements * _signed(_INCREMENT))  # (count,)
    return _mix(of_position[:, None] ^ of_element)


def _mix(z: Tensor) -> Tensor:
    """Scramble 64-bit integers; int64 products wrap around, as they should."""
    z = (z ^ _shift_right(z, 30)) * _signed(_MULTIPLIER_1)
    z = (z ^ _shift_right(z, 27)) * _signed(_MULTIPLIER_2)
    return z ^ _shift_right(z, 31)


def _mix_int(z: int) -> int:
    """Scramble one 64-bit integer on the host: `_mix` after one increment."""
    z = (z + _INCREMENT) & _MASK_64
    z = ((z ^ (z >> 30)) * _MULTIPLIER_1) & _MASK_64
    z = ((z ^ (z >> 27)) * _MULTIPLIER_2) & _MASK_64
    return z ^ (z >> 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Shift the bits right and fill with zeros; torch's own shift of int64 copies the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """Return the two's complement reading of an unsigned 64-bit integer."""
    return value - (1 << 64) if value >> 63 else value
