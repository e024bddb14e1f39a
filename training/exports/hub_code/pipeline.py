"""The pipeline of an exported model: draws images by class.

An exported folder carries this module after those that it imports (code_files.py).
"""

import inspect
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from torch import Tensor

from models.diffusion import Diffusion
from models.latents import decode, scale_and_shift
from training.config.wording import either, shown
from training.sampling.checks import (
    Asked,
    Process,
    Spelling,
    WrongValueError,
    checked_settings,
    whole_number,
)
from training.sampling.class_choice import ClassChoice
from training.sampling.latents import SamplerSettings, sample_latents

SCHEDULER = "SwitchDiTScheduler"
OUTPUT_TYPES = ("pil", "np", "latent")
CUSTOM_CODE = "diffusers_modules"  # the package that diffusers imports a folder's files into


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
        _check_scheduler(scheduler)
        if id2label is None and guidance is None:  # from the `components` of another pipeline
            id2label, guidance = scheduler.config.id2label, scheduler.config.guidance
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_to_config(id2label=id2label, guidance=guidance)
        names = {int(number): name for number, name in (id2label or {}).items()}
        self.labels = {name: number for number, name in names.items()}
        self._classes = ClassChoice(
            transformer.config.options["num_classes"], names, "class_labels", "the number {}"
        )

    def get_label_ids(self, label: str | Iterable[str]) -> list[int]:
        """Return the numbers of classes by their names, as DiTPipeline does."""
        return [self._classes.find(name) for name in ([label] if isinstance(label, str) else label)]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str] | Tensor | int | str = 0,
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
            class_labels: numbers or names of classes, as a list, tensor or array, or one alone;
                a text is a name, and a number if no class is called so; any number for an
                unconditional model.
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
        _check_scheduler(self.scheduler)
        process, device = self.scheduler.config, self._execution_device
        network = self.transformer.config.options
        labels = self._numbers_of(class_labels)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise WrongValueError(
                f"generator must be one torch.Generator for all images, not {shown(generator)}; "
                "to choose every image's numbers, give seed and indices."
            )
        numbers = _positions(indices, len(labels), process.num_timesteps)
        settings = self._settings(
            Asked(
                sampler=sampler,
                steps=num_inference_steps,
                seed=seed,
                shift=shift,
                scale=guidance_scale,
                interval=guidance_interval,
                channels=guidance_channels,
            )
        )
        if generator is not None:
            settings = replace(settings, seed=generator.initial_seed())
        if output_type not in OUTPUT_TYPES:
            raise WrongValueError(
                f"output_type must be {either(OUTPUT_TYPES)}, not {shown(output_type)}."
            )
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
                latent_shape=(network["in_channels"], *network["input_size"]),
                null_class=network["num_classes"],
                on_step=lambda _step: progress.update(),
            )
        images = self._decoded(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(self, x_t: Tensor, t: Tensor, y: Tensor) -> SimpleNamespace:
        return SimpleNamespace(prediction=self.transformer(x_t, t, y).sample)

    def _numbers_of(self, class_labels: Sequence[int | str] | Tensor | int | str) -> list[int]:
        """Turn names to numbers and check them."""
        given = _listed(class_labels, "class_labels")
        if not given:
            raise WrongValueError("class_labels is empty; give at least one class.")
        if self.transformer.config.options["num_classes"] == 0:
            return [0] * len(given)
        return [self._classes.find(label) for label in given]

    def _settings(self, asked: Asked) -> SamplerSettings:
        """Check what a call asks for."""
        process, exported = self.scheduler.config, self.config.guidance or {}
        default = Asked(
            sampler=process.sampler,
            steps=process.num_inference_steps,
            shift=process.shift,
            scale=exported.get("scale", 1.0),
            interval=exported.get("interval"),
            channels=exported.get("num_channels"),
        )
        can_guide = exported.get("is_possible", True)
        about = Process(
            process.objective,
            process.num_timesteps,
            self.transformer.config.options["in_channels"],
            "" if can_guide else "this model was not trained with both",
        )
        return checked_settings(asked, default, about, Spelling())

    def save_config(self, save_directory: str | Path, **options: Any) -> None:
        """Write model_index.json, and the Python files that it names, so that it loads again."""
        super().save_config(save_directory, **options)
        folder = Path(save_directory)
        index = json.loads((folder / self.config_name).read_text(encoding="utf-8"))
        parts = {"": self, "transformer": self.transformer, "scheduler": self.scheduler}
        for name, part in parts.items():
            kind = type(part)
            if not kind.__module__.startswith(CUSTOM_CODE):
                continue
            source = Path(inspect.getfile(kind))
            (folder / name).mkdir(exist_ok=True)
            shutil.copyfile(source, folder / name / source.name)
            index[name or "_class_name"] = [source.stem, kind.__name__]
        text = json.dumps(index, indent=2) + "\n"
        (folder / self.config_name).write_text(text, encoding="utf-8")

    def _decoded(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        config = self.vae.config
        self.vae.to(memory_format=torch.channels_last)  # as when samples are drawn in training
        normalisation = scale_and_shift(
            float(config.scaling_factor),
            float(config.get("shift_factor") or 0.0),
            config.get("latents_mean") or (),
            config.get("latents_std") or (),
            latents.device,
        )
        pixels = decode(self.vae.eval(), latents, *normalisation).numpy()
        return pixels if output_type == "np" else [Image.fromarray(picture) for picture in pixels]


def _check_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler of diffusers, which would have no effect."""
    kind = type(scheduler)
    if SCHEDULER not in (base.__name__ for base in kind.__mro__):
        raise WrongValueError(
            f"scheduler: a {kind.__name__} has no effect on this pipeline, whose solvers visit "
            "trained timesteps only; keep the exported one and choose a solver by sampler."
        )


def _listed(values: Any, name: str) -> list[Any]:
    """Return numbers or names as a list: of one alone, or of a list, tensor or array of them."""
    num_dimensions = getattr(values, "ndim", None)
    if isinstance(values, str) or num_dimensions == 0:
        return [values]
    if num_dimensions is not None:
        if num_dimensions != 1:
            raise WrongValueError(f"{name} must have one dimension, not {num_dimensions}.")
        return values.tolist()
    is_list = isinstance(values, Iterable) and not isinstance(values, bytes | dict)
    return list(values) if is_list else [values]


def _positions(indices: Any, count: int, num_timesteps: int) -> list[int]:
    """Return the numbers of the images in the seed's stream."""
    if indices is None:
        return list(range(count))
    found = [whole_number(index, "indices") for index in _listed(indices, "indices")]
    if len(found) != count:
        raise WrongValueError(f"{len(found)} indices were given for {count} labels.")
    limit = 2**63 // num_timesteps  # a step of an image has a number below 2^63
    if wrong := [index for index in found if not 0 <= index < limit]:
        raise WrongValueError(f"indices must be >=0 and <{limit}, not {wrong[0]}.")
    return found
