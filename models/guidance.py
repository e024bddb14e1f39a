"""Guide a prediction: move it away from the prediction of a weaker denoiser.

    guided = weak + scale * (strong - weak)

Classifier-free guidance (Ho and Salimans 2022): the weak one is the same network without the label.
Autoguidance (Karras et al. 2024, arXiv 2406.02507): it is a smaller or less trained network with
the label. Both work on whatever the network predicts: for one x_t, noise, v, x_0 and velocity are
affine functions of each other, and the weights 1 - scale and scale add up to one, so all of them
are guided alike.

N batch, C latent channels, H W latent size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Maps x_t (M, C, H, W), timesteps (M,) or (1,) int64, labels (M,) int64 to (M, C or 2C, H, W).
ModelFn = Callable[[Tensor, Tensor, Tensor], Tensor]
# Maps x_t (N, C, H, W), timesteps (N,) or (1,) int64 to a prediction (N, C or 2C, H, W).
Denoise = Callable[[Tensor, Tensor], Tensor]

OFFICIAL_CHANNELS = 3  # DiT guides the first three of four latent channels, as if they were colours


@dataclass(frozen=True)
class Guidance:
    """How strongly, in which channels and when a prediction is guided."""

    scale: float = 1.0  # 1 = not at all; larger = further away from the weak prediction
    num_channels: int | None = None  # latent channels that are guided, from the first; None = all
    # Smallest and largest guided timestep (Kynkaanniemi et al. 2024, arXiv 2404.07724); None = all.
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        assert 0 <= self.scale < math.inf, f"scale is {self.scale}"
        assert self.num_channels is None or self.num_channels >= 1, "no channel would be guided"
        assert self.interval is None or self.interval[0] <= self.interval[1], "lower end first"

    def acts_at(self, t: Tensor) -> bool:
        """Tell whether a step at timestep t (1,), or (N,) of one value, is guided."""
        if self.scale == 1.0:
            return False
        if self.interval is None:
            return True  # without looking at t, which may be on a device
        return self.interval[0] <= t[0].item() <= self.interval[1]

    def combine(self, strong: Tensor, weak: Tensor, num_latent_channels: int) -> Tensor:
        """Guide the main channels of `strong` (N, C or 2C, H, W); the others stay as they are."""
        num = min(self.num_channels or num_latent_channels, num_latent_channels)
        strong, weak = strong.float(), weak.float()
        guided = weak[:, :num] + self.scale * (strong[:, :num] - weak[:, :num])
        return torch.cat((guided, strong[:, num:]), dim=1)


def classifier_free(model_fn: ModelFn, y: Tensor, null_class: int, guidance: Guidance) -> Denoise:
    """Guide away from the prediction without a label.

    Variance channels are those with the label. Where guidance does not act, the half without
    labels, which would cancel, is not computed.

    Args:
        model_fn: called with N samples, or with 2N when guiding, those with their label first.
        y: (N,) int64 labels.
        null_class: the label that means "no label".
        guidance: scale, channels and interval.
    """
    labels = torch.cat((y, torch.full_like(y, null_class)))

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        if not guidance.acts_at(t):
            return model_fn(x, t, y)
        both_t = t if len(t) == 1 else torch.cat((t, t))
        with_label, without = model_fn(torch.cat((x, x)), both_t, labels).chunk(2, dim=0)
        return guidance.combine(with_label, without, x.shape[1])

    return denoise


def autoguided(model_fn: ModelFn, weak_fn: ModelFn, y: Tensor, guidance: Guidance) -> Denoise:
    """Guide away from the prediction of a weaker model, which sees the same labels y (N,).

    Variance channels are those of the model itself. The weaker one is not called where guidance
    does not act.
    """

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        strong = model_fn(x, t, y)
        if not guidance.acts_at(t):
            return strong
        return guidance.combine(strong, weak_fn(x, t, y), x.shape[1])

    return denoise
