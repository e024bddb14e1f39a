"""Fit averages of any width, after training, as sums of stored ones (EDM2, arXiv 2312.02696).

A power-function average of the weights up to time t weighs them by the profile

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1),   0 <= tau <= t

and the optimizer's update does so exactly, with each update's weights held for one unit of time.
The stored profiles that add up best to a wanted one (section 3.2; least squares over tau) say how
to add up the stored averages.

P stored averages.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Against snapshots so dense that their profiles hardly differ: rounding noise is not a direction.
RELATIVE_CUTOFF = 1e-12


class Fit(NamedTuple):
    """How to add up stored averages."""

    weights: NDArray  # (P,) float64, of sum 1
    residual: float  # distance of the profiles' sum from the wanted one, relative to its norm


def inner_products(
    times_a: NDArray, gammas_a: NDArray, times_b: NDArray, gammas_b: NDArray
) -> NDArray:
    """Integrate the product of two profiles over the time that both cover, in closed form.

    All arguments are float64 and broadcast. With s the earlier time of the two, the integral of
    tau^(gamma_a + gamma_b) up to s times both normalisations; written in ratios, because t^gamma
    overflows.
    """
    early = np.minimum(times_a, times_b)
    ratio = (early / times_a) ** gammas_a * (early / times_b) ** gammas_b
    scale = (gammas_a + 1) * (gammas_b + 1) / (gammas_a + gammas_b + 1)
    return scale * ratio * early / (times_a * times_b)


def fit_profile(times: ArrayLike, gammas: ArrayLike, time: float, gamma: float) -> Fit:
    """Find the sum of stored profiles that is nearest to a wanted one.

    Differs from EDM2: the sum's weights add up to exactly 1, because what they lack would scale
    every parameter, and a profile that cannot be fitted well can lack percents.

    Args:
        times: (P,) updates that each stored average is over.
        gammas: (P,) exponents of the stored averages.
        time: updates of the wanted average.
        gamma: its exponent.
    """
    times, gammas = np.asarray(times, np.float64), np.asarray(gammas, np.float64)
    is_wanted = (times == time) & np.isclose(gammas, gamma, rtol=1e-12, atol=0)
    if is_wanted.any():  # stored: nothing to approximate
        return Fit(np.eye(len(times))[is_wanted.argmax()], 0.0)
    products = inner_products(times[:, None], gammas[:, None], times, gammas)  # (P, P)
    wanted = inner_products(times, gammas, np.float64(time), np.float64(gamma))  # (P,)
    norm = np.sqrt(inner_products(*map(np.float64, (time, gamma, time, gamma))))
    # All profiles scaled to norm 1, so that early ones, which are high and narrow, count equally.
    norms = np.sqrt(products.diagonal())
    products /= np.outer(norms, norms)
    wanted /= norms * norm
    sums = norm / norms  # of a solution's parts, in weights
    solved, *_ = np.linalg.lstsq(products, np.stack([wanted, sums], 1), rcond=RELATIVE_CUTOFF)
    free, correction = solved.T  # Lagrange: the free minimum, and how the condition moves it
    solution = free + correction * (1 - sums @ free) / (sums @ correction)
    squared = 1 - 2 * solution @ wanted + solution @ products @ solution
    return Fit(solution * sums, float(np.sqrt(max(squared, 0.0))))
