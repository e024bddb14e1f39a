"""Weights of the loss by timestep: fixed tables, and weights that are learned.

A published weight belongs to one error: that of min-SNR to the error of x_0, that of P2 to the
error of the noise. The network may predict a third quantity. All these errors are proportional,
because x_0 follows from the noisy latents and the prediction; `x_start_error` gives the factor.
With it a weight means the same loss for every objective.

S timesteps, N samples.
"""

import math

import torch
from torch import Tensor, nn

from models.diffusion import Diffusion

WEIGHT_TABLES = ("constant", "min_snr", "p2", "sigma_sqrt", "cosmap")
LOSS_WEIGHTS = (*WEIGHT_TABLES, "uncertainty")
FLOW_ONLY = ("sigma_sqrt", "cosmap")
P2_OFFSET = 1.0  # k of P2, Eq. 8

NUM_CLUSTERS = 8  # groups of timesteps whose loss scale is learned, as in ANT (Go et al. 2023)
# The official code trains the eight numbers at a rate of 0.025 beside 1e-4 for the network.
RATE_RATIO = 250.0
GRADIENT_SCALE = 1e-3


def x_start_error(diffusion: Diffusion) -> Tensor:
    """Return |error of x_0|^2 / |error of the prediction|^2 per timestep, (S,) float64."""
    signal, sigma = diffusion.signal, diffusion.sigma
    if diffusion.objective == "epsilon":
        return (sigma / signal).square()
    if diffusion.objective == "x0":
        return torch.ones_like(sigma)
    return sigma.square()  # v and flow: x_0 = (...) - sigma * prediction


def loss_weight_table(
    kind: str, diffusion: Diffusion, *, min_snr_gamma: float = 5.0, p2_gamma: float = 1.0
) -> Tensor:
    """Return the factor of the squared error of the prediction at every timestep, (S,) float64.

    constant    1, whatever is predicted.
    min_snr     min(SNR, gamma) on the error of x_0 (Hang et al. 2023, arXiv 2303.09556): over SNR
                for epsilon, over SNR + 1 for v.
    p2          1 / (1 + SNR)^gamma on the error of the noise (Choi et al. 2022, arXiv 2204.00227).
    sigma_sqrt  flow only: sigma^-2 on the error of the velocity. The name and the formula are
                those of diffusers' training scripts. (On the error of x_0 the same formula would
                be the constant weight.) At the first timestep it is S^2.
    cosmap      flow only: 2 / (pi (1 - 2 sigma + 2 sigma^2)) on the error of the velocity, the
                density of a cosine schedule's noise levels (Esser et al. 2024, arXiv 2403.03206,
                Section 3.1).

    At flow's last timestep there is no signal, so min_snr and p2 are 0 there, as x_0's weight is.

    Args:
        kind: one of WEIGHT_TABLES.
        diffusion: the process and what is predicted about it.
        min_snr_gamma: the largest signal-to-noise ratio that counts.
        p2_gamma: the exponent of P2; 0 weighs all errors of the noise alike.
    """
    assert kind in WEIGHT_TABLES, f"unknown loss weight {kind}"
    assert kind not in FLOW_ONLY or diffusion.objective == "flow", f"{kind} is defined for flow"
    signal, sigma = diffusion.signal, diffusion.sigma
    snr = (signal / sigma).square()
    if kind == "min_snr":
        return snr.clamp(max=min_snr_gamma) * x_start_error(diffusion)
    if kind == "p2":
        of_x_start = snr / (P2_OFFSET + snr).pow(p2_gamma)
        return of_x_start * x_start_error(diffusion)
    if kind == "sigma_sqrt":
        return sigma.pow(-2.0)
    if kind == "cosmap":
        return 2.0 / (math.pi * (1.0 - 2.0 * sigma + 2.0 * sigma.square()))
    return torch.ones_like(sigma)


class UncertaintyWeights(nn.Module):
    """The log variance of the loss of each of 8 clusters of neighbouring timesteps, learned.

    Kendall et al. 2018 (arXiv 1705.07115), over clusters of timesteps as in ANT (Go et al. 2023,
    arXiv 2306.00354). The numbers are parameters of the model, so they are optimised, saved and
    averaged with it.
    """

    def __init__(self, num_timesteps: int) -> None:
        """Start with log variance 0 everywhere.

        Args:
            num_timesteps: S, at least 8.
        """
        super().__init__()
        assert num_timesteps >= NUM_CLUSTERS, "every cluster needs a timestep"
        self.scaled_log_variance = nn.Parameter(torch.zeros(NUM_CLUSTERS))
        # Cluster c begins at timestep S * c // 8.
        t = torch.arange(num_timesteps)
        cluster = (NUM_CLUSTERS * t + NUM_CLUSTERS - 1) // num_timesteps
        self.register_buffer("cluster", cluster, persistent=False)

    def forward(self) -> Tensor:
        """Return the log variance of every timestep, (S,) float32."""
        # Adam moves a parameter by about the learning rate whatever the scale of its gradient. So
        # the factor RATE_RATIO stands for a learning rate of its own, and the small scale of the
        # gradient, which changes nothing else, keeps these numbers out of the gradient's norm.
        parameter = self.scaled_log_variance.float()
        small = parameter * GRADIENT_SCALE
        log_variance = small + (parameter * RATE_RATIO - small).detach()
        return log_variance[self.cluster]


def cluster_log_variances(log_variance: Tensor) -> Tensor:
    """Read the 8 clusters' values, (8,), from those of the timesteps, (S,)."""
    c = torch.arange(NUM_CLUSTERS, device=log_variance.device)
    return log_variance[c * log_variance.shape[0] // NUM_CLUSTERS]


def uncertainty_weighted(loss: Tensor, log_variance: Tensor) -> Tensor:
    """Weigh the losses of samples by the learned scale of their timesteps.

    0.5 * (exp(-s) * loss + 8 s): the mean over a batch with as many samples of each cluster is the
    official code's sum over clusters of 0.5 * (exp(-s_c) * mean loss of c / 8 + s_c), and no batch
    needs to have that. The factor 8 puts the optimum at exp(s_c) = (mean loss of c) / 8.

    Args:
        loss: (N,) of each sample.
        log_variance: (N,), s of each sample's timestep.

    Returns:
        (N,), which may be negative.
    """
    return 0.5 * (torch.exp(-log_variance) * loss + NUM_CLUSTERS * log_variance)
