"""Images from an exported model: what an exported folder's pipeline file holds.

With everything it uses, it is cut out of this repository into one file (training/export_bundle.py).
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from torch import Tensor

from data_tools.vae import Vae, decode_pixels
from models.diffusion import Diffusion
from models.guidance import Guidance
from models.sampler import methods_for
from training.sampling import SamplerSettings, sample_latents


class SwitchDiTPipeline(DiffusionPipeline):
    """Draw images by class. Image i depends on (seed, i) and its class, never on its batch."""

    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self,
        transformer: Any,
        vae: AutoencoderKL,
        scheduler: Any,
        id2label: dict[str, str] | None = None,
        guidance: dict[str, Any] | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            transformer: the network.
            vae: decodes latents.
            scheduler: describes the process.
            id2label: names of the classes by number; None for an unconditional model.
            guidance: scale, num_channels and interval, unless a call says otherwise.
        """
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_to_config(id2label=id2label, guidance=guidance)
        self.labels = {name: int(number) for number, name in (id2label or {}).items()}

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str] | int | str = 0,
        *,
        seed: int = 0,
        generator: torch.Generator | None = None,
        indices: Sequence[int] | None = None,
        num_inference_steps: int | None = None,
        sampler: str | None = None,
        shift: float | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_channels: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw one image for each label.

        Args:
            class_labels: numbers or names of classes; any number for an unconditional model.
            seed: of the images.
            generator: as other pipelines take it; the seed it began with replaces `seed`, so that
                a second call with it draws the same images.
            indices: numbers of the images in the seed's stream; 0, 1, 2, ... by default.
            num_inference_steps: steps of the sampler; None, here and below: as exported.
            sampler: ddim, ddpm or dpmpp-2m; euler or heun for rectified flow.
            shift: of the timesteps towards noise, for rectified flow.
            guidance_scale: of classifier-free guidance; 1 = none.
            guidance_interval: guide at these fractions of the timesteps only, from 0 to 1.
            guidance_channels: guide this many latent channels only, from the first.
            output_type: "pil", "np" for (N, H, W, 3) uint8, or "latent" for final latents.
            return_dict: return an object with `images` instead of a tuple.
        """
        process, device = self.scheduler.config, self._execution_device
        labels = self._numbers_of(class_labels)
        if isinstance(generator, list):
            raise ValueError("give one generator for all images, or seed and indices")
        numbers = list(range(len(labels)) if indices is None else indices)
        if len(numbers) != len(labels):
            raise ValueError(f"{len(numbers)} indices were given for {len(labels)} labels")
        settings = SamplerSettings(
            process.sampler if sampler is None else sampler,
            process.num_inference_steps if num_inference_steps is None else num_inference_steps,
            seed if generator is None else generator.initial_seed(),
            guidance=self._guidance(guidance_scale, guidance_channels, guidance_interval),
            shift=process.shift if shift is None else shift,
        )
        self._check(settings)
        if output_type not in ("pil", "np", "latent"):
            raise ValueError(f"output_type must be pil, np or latent, not {output_type!r}")
        with self.progress_bar(total=settings.num_steps) as progress:
            latents = sample_latents(
                self._predict,
                Diffusion(
                    process.noise_schedule,
                    process.num_timesteps,
                    objective=process.objective,
                    learned_variance=process.learned_variance,
                ).to(device),
                settings,
                indices=torch.tensor(numbers, device=device),
                labels=torch.tensor(labels, device=device),
                latent_shape=(self.transformer.config.in_channels, *self._latent_size()),
                null_class=self.transformer.config.num_classes,
                on_step=lambda _step: progress.update(),
            )
        images = self._decoded(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(self, x_t: Tensor, t: Tensor, y: Tensor) -> SimpleNamespace:
        return SimpleNamespace(prediction=self.transformer(x_t, t, y).sample)

    def _latent_size(self) -> tuple[int, int]:
        return tuple(self.transformer.config.input_size)

    def _numbers_of(self, class_labels: Sequence[int | str] | int | str) -> list[int]:
        """Turn names to numbers and check them."""
        is_one = isinstance(class_labels, int | str)
        given = [class_labels] if is_one else list(class_labels)
        num_classes = self.transformer.config.num_classes
        if num_classes == 0:
            return [0] * len(given)
        found = [self.labels.get(label, label) for label in given]
        for label in found:
            if not (isinstance(label, int) and 0 <= label < num_classes):
                known = f"a number below {num_classes}, or one of {', '.join(self.labels)}"
                raise ValueError(f"there is no class {label!r}; give {known}")
        return found

    def _guidance(
        self, scale: float | None, channels: int | None, interval: tuple[float, float] | None
    ) -> Guidance:
        exported = self.config.guidance or {}
        scale = exported.get("scale", 1.0) if scale is None else scale
        channels = exported.get("num_channels") if channels is None else channels
        interval = exported.get("interval") if interval is None else interval
        if scale != 1.0 and not exported.get("is_possible", True):
            raise ValueError(
                f"guidance_scale {scale} compares predictions with and without the label, but this "
                "model was not trained with both; use 1"
            )
        if interval is not None:
            S = self.scheduler.config.num_timesteps
            interval = (interval[0] * S, interval[1] * S)
        return Guidance(float(scale), channels, interval)

    def _check(self, settings: SamplerSettings) -> None:
        process = self.scheduler.config
        methods = methods_for(process.objective)
        if settings.method not in methods:
            raise ValueError(
                f"sampler {settings.method!r} does not fit objective {process.objective}; use one "
                f"of {', '.join(methods)}"
            )
        if not 1 <= settings.num_steps <= process.num_timesteps:
            raise ValueError(
                f"num_inference_steps must be from 1 to {process.num_timesteps}, not "
                f"{settings.num_steps}"
            )
        if settings.shift != 1.0 and process.objective != "flow":
            raise ValueError(f"shift {settings.shift} is for rectified flow only")

    def _decoded(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        config = self.vae.config
        self.vae.to(memory_format=torch.channels_last)  # as when samples are drawn in training
        vae = Vae(
            self.vae.eval(),
            source_id="",
            sha256="",
            scaling_factor=float(config.scaling_factor),
            shift_factor=float(config.get("shift_factor") or 0.0),
            latents_mean=tuple(config.get("latents_mean") or ()),
            latents_std=tuple(config.get("latents_std") or ()),
            latent_channels=int(config.latent_channels),
            downsample=2 ** (len(config.block_out_channels) - 1),
        )
        pixels = decode_pixels(vae, latents)
        return pixels if output_type == "np" else [Image.fromarray(picture) for picture in pixels]
