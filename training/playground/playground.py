"""Draw what a visitor of the demo's page asks for, and show which experts are at work.

Nothing here knows how the page is served. Every request is checked here, since a visitor can send
other values than the page offers.

L blocks, E experts, S timesteps.
"""

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from data_tools.errors import ArgumentParser, ConfigError, count_of
from data_tools.vae.autoencoder import decode_pixels, load_decoder
from models.gate import build_plan
from models.precision import PRECISIONS, cast_network, products_in
from models.switch_dit import MODEL_NAMES, SwitchDiT
from training.checkpoints.manifest import CHECKPOINT_DIR
from training.checkpoints.weight_files import load_model
from training.config.option import EXPECTED
from training.engine.average_profiles import profiles_of
from training.engine.gate_table import read_gate_table
from training.engine.objective import build_diffusion
from training.monitoring.expert_pictures import active_experts, expert_map, mark_timestep
from training.run.directory import load_config, load_manifest
from training.run.weights import find_checkpoint, find_weights
from training.sampling.flags import add_sampling_flags, class_names, sampler_settings
from training.sampling.latents import SamplerSettings, sample_latents

LATEST = "latest"  # instead of a checkpoint's name
RAW = "raw"  # instead of an average's name
MAX_IMAGES = 16  # fewer than training/sample.py draws at a time, so both draw them in one batch
MAX_SCALE = 10.0


class DrawingStoppedError(RuntimeError):
    """Somebody stopped the drawing before its last step."""


@dataclass(frozen=True)
class DrawingRequest:
    """What a visitor wants to be drawn."""

    class_index: int  # 0 for an unconditional run
    num_images: int
    cfg_scale: float
    steps: int
    seed: int
    sampler: str
    checkpoint: str = LATEST  # or its name
    weights: str = ""  # RAW, or the name of an average; empty = the first average


@dataclass
class _Loaded:
    """One file of weights; its network and its gates are loaded when they are first used."""

    folder: Path  # of the checkpoint
    weights: str
    path: Path
    model: SwitchDiT | None = None
    gates: torch.Tensor | None = None  # (L, S, E)
    expert_map: np.ndarray | None = None


class Playground:
    """A run that images are drawn from, one after the other.

    Args:
        run_dir: the run.
        device: that draws.
        vae: decodes the images; None = the run's.
        precision: of the network.

    Raises:
        ConfigError: no run, no checkpoint, or a damaged one.
    """

    def __init__(
        self,
        run_dir: Path,
        device: torch.device,
        vae: str | None = None,
        precision: str = PRECISIONS[0],
    ) -> None:
        self.run_dir, self.device, self.precision = run_dir, device, precision
        self.config = load_config(run_dir)
        manifest = load_manifest(run_dir)
        self._lock = threading.Lock()  # a server answers in several threads
        self._loaded: _Loaded | None = None
        self._load(LATEST, "")  # before anybody visits
        self._vae = load_decoder(vae or self.config.run.vae, manifest.vae, device)
        self._diffusion = build_diffusion(self.config).to(device)
        self._names = class_names(manifest)
        self._is_stopping, self._is_closed = threading.Event(), False

    def classes(self) -> list[tuple[str, int]]:
        """Return names and indices of the classes; none for an unconditional run."""
        names = [self._names.get(i, f"class {i}") for i in range(self.config.model.num_classes)]
        counts = Counter(names)
        return [(f"{name} ({i})" if counts[name] > 1 else name, i) for i, name in enumerate(names)]

    def averages(self) -> list[str]:
        """Return the names of the weights' averages, the default first."""
        return [profile.name for profile in profiles_of(self.config.optim).values()]

    def checkpoints(self) -> list[str]:
        """Return the names of the checkpoints, newest first; training may be adding some."""
        folders = (self.run_dir / CHECKPOINT_DIR).glob("step-*")
        return sorted((path.name for path in folders), reverse=True)

    @property
    def description(self) -> str:
        """A line on the model."""
        model = self.config.model
        experts = f", {count_of(model.num_experts, 'expert')} per block, {model.top_k} per timestep"
        routed = experts if self.has_experts else ""
        return f"{MODEL_NAMES[model.routing]}-{model.size}/{model.patch_size}{routed}"

    @property
    def has_experts(self) -> bool:
        """Whether timesteps choose experts: neither plain DiT nor DTR's fixed masks."""
        return self.config.model.routing == "switch"

    def draw(
        self, request: DrawingRequest, on_step: Callable[[int], None] = lambda _: None
    ) -> np.ndarray:
        """Draw images: those of training/sample.py with one class and the same settings.

        Args:
            request: what to draw.
            on_step: called with the number of every finished step.

        Returns:
            (N, H, W, 3) uint8.

        Raises:
            ConfigError: a value is out of range, or the run has no such weights.
            DrawingStoppedError: by `stop` or `close`.
        """
        self._is_stopping.clear()
        settings = self._checked(request)
        model = self._model(request)

        def step(number: int) -> None:
            if self._is_stopping.is_set() or self._is_closed:
                raise DrawingStoppedError
            on_step(number)

        with products_in(self.precision):
            latents = sample_latents(
                model,
                self._diffusion,
                settings,
                indices=torch.arange(request.num_images, device=self.device),
                labels=torch.full((request.num_images,), request.class_index, device=self.device),
                latent_shape=self.config.model.latent_shape,
                null_class=self.config.model.num_classes,
                on_step=step,
            )
        if not latents.isfinite().all():
            raise ConfigError(
                "These weights draw images that are not finite; choose another checkpoint, more "
                "steps or less guidance."
            )
        return decode_pixels(self._vae, latents)

    def stop(self) -> None:
        """End the drawing that goes on in another thread at its next step."""
        self._is_stopping.set()

    def close(self) -> None:
        """End the drawing that goes on, and every later one at its first step."""
        self._is_closed = True

    def experts_at(
        self, timestep: int, checkpoint: str = LATEST, weights: str = ""
    ) -> tuple[np.ndarray, np.ndarray]:
        """Show which experts serve a timestep.

        Args:
            timestep: 0 (clean) to S - 1 (noise).
            checkpoint: see `DrawingRequest`.
            weights: see `DrawingRequest`.

        Returns:
            Two pictures (height, width, 3) uint8: the gate value of every block and expert at the
            timestep, and all timesteps with this one marked.

        Raises:
            ConfigError: there is no such timestep, or the weights cannot be read.
        """
        assert self.has_experts, "the page of a run without experts does not ask"
        num_timesteps, model = self.config.diffusion.num_timesteps, self.config.model
        _check_range("timestep", timestep, 0, num_timesteps - 1)
        with self._lock:
            loaded = self._load(checkpoint, weights)
            if loaded.gates is None:
                loaded.gates = read_gate_table(loaded.path, num_timesteps)
                loaded.expert_map = expert_map(loaded.gates, model.top_k, num_timesteps)
            gates, whole = loaded.gates, loaded.expert_map
        plan = build_plan(
            gates, torch.tensor([timestep]), model.top_k, renormalize=model.renormalize_gates
        )
        marked = mark_timestep(whole, timestep, num_timesteps)
        return active_experts(plan.expert_weight[:, 0]), marked

    def _checked(self, request: DrawingRequest) -> SamplerSettings:
        for field in fields(DrawingRequest):
            value = getattr(request, field.name)
            allowed = (int, float) if field.type is float else (field.type,)
            if type(value) not in allowed:  # True is no number here
                raise ConfigError(f"{field.name} must be {EXPECTED[field.type]}, not {value!r}.")
        _check_range("num_images", request.num_images, 1, MAX_IMAGES)
        _check_range("cfg_scale", request.cfg_scale, 0, MAX_SCALE)
        _check_range(
            "class_index", request.class_index, 0, max(0, self.config.model.num_classes - 1)
        )
        parser = ArgumentParser()
        add_sampling_flags(parser)
        args = parser.parse_args([])
        args.sampler, args.steps, args.seed = request.sampler, request.steps, request.seed
        args.cfg_scale = request.cfg_scale
        return sampler_settings(args, self.config)

    def _model(self, request: DrawingRequest) -> SwitchDiT:
        with self._lock:
            loaded = self._load(request.checkpoint, request.weights)
            if loaded.model is None:
                model = load_model(self.config, loaded.path, self.device)
                loaded.model = cast_network(model, self.precision)
            return loaded.model

    def _load(self, checkpoint: str, weights: str) -> _Loaded:
        """Find the weights, unless they are those of the last time; the lock is the caller's."""
        folder = find_checkpoint(self.run_dir, None if checkpoint == LATEST else checkpoint)
        found = self._loaded
        if found is None or (found.folder, found.weights) != (folder, weights):
            path = find_weights(
                self.run_dir,
                self.config,
                checkpoint=folder.name,
                ema=None if weights in ("", RAW) else weights,
                is_raw=weights == RAW,
            )
            found = self._loaded = _Loaded(folder, weights, path)
        return found


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # NaN is refused, too
        raise ConfigError(f"{name} must be between {low:g} and {high:g}, not {value}.")
