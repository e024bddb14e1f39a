"""The diffusion process of an exported model, as a configuration that diffusers loads and saves."""

from typing import Any

from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config


class SwitchDiTScheduler(SchedulerMixin, ConfigMixin):
    """What the network was trained on, and how images are drawn unless a call says otherwise.

    It takes no steps itself: the pipeline's solvers visit trained timesteps only, at which the
    schedulers of diffusers would not stop.
    """

    @register_to_config
    def __init__(
        self,
        *,
        noise_schedule: str,
        num_timesteps: int,
        objective: str,
        learned_variance: bool,
        sampler: str,
        num_inference_steps: int,
        shift: float,
        id2label: dict[str, str] | None = None,
        guidance: dict[str, Any] | None = None,
    ) -> None:
        """Keep the arguments; all are in `config`.

        The last two are the pipeline's. It finds them here when it is made of the `components` of
        another, which have no place for them.
        """
