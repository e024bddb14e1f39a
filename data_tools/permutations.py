"""Make permutations and seeds that depend on a key alone, on any machine and in any version.

They are argsorts of 64-bit hashes (the finaliser of splitmix64, Steele et al., OOPSLA 2014) and not
draws from a library's random stream, which may change with its version.
"""

import numpy as np

_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_MASK_64 = (1 << 64) - 1


def _mix(values: np.ndarray) -> np.ndarray:
    """Scramble uint64 values; products wrap around, as they should."""
    values = values + _INCREMENT
    values = (values ^ (values >> np.uint64(30))) * _MULTIPLIER_1
    values = (values ^ (values >> np.uint64(27))) * _MULTIPLIER_2
    return values ^ (values >> np.uint64(31))


def _state(key: tuple[int, ...]) -> np.ndarray:
    state = np.zeros(1, np.uint64)  # an array: numpy warns of overflow on scalars only
    for number in key:
        state = _mix(state ^ np.array([number & _MASK_64], np.uint64))
    return state


def permutation(length: int, *key: int) -> np.ndarray:
    """Permute range(length), int64; the same key gives the same permutation on any machine."""
    hashes = _mix(_mix(np.arange(length, dtype=np.uint64)) ^ _state(key))
    return np.argsort(hashes, kind="stable")


def derived_seed(*key: int) -> int:
    """Return a seed for a part of what a seed is for, in [0, 2^64)."""
    return int(_state(key)[0])
