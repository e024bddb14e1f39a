"""Build the page of training/demo.py with gradio, which no other module needs."""

import shutil
from pathlib import Path

import gradio as gr
import numpy as np

from data_tools.errors import ConfigError
from models.sampler import methods_for
from training.playground.playground import (
    LATEST,
    MAX_IMAGES,
    MAX_SCALE,
    RAW,
    DrawingRequest,
    DrawingStoppedError,
    Playground,
)
from training.sampling.flags import DEFAULT_SCALE, DEFAULT_STEPS
from training.sampling.image_files import save_png
from training.sampling.latents import can_guide_without_classifier

DEFAULT_IMAGES = 8
MAX_SEED = 2**53 - 1  # what a browser holds exactly
MAX_WAITING = 8  # requests; more are refused
SWEEP_SEC, KEPT_SEC = 300, 3600  # how often old pictures are deleted, and what is old
CSS = """
.gradio-container { max-width: 1240px !important; }
#images img { object-fit: contain; }
#experts img, #timesteps img { width: auto !important; max-width: 100%; margin: 0; }
"""


def build_page(playground: Playground, folder: Path) -> gr.Blocks:
    """Build the page; `folder` is for the images of the last drawing, gradio serves copies."""
    name = playground.run_dir.resolve().name
    page = gr.Blocks(title=name, analytics_enabled=False, delete_cache=(SWEEP_SEC, KEPT_SEC))
    with page:
        gr.Markdown(f"# {name}\n{playground.description}")
        with gr.Row():
            sources = _source_fields(playground)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                drawing = _drawing_fields(playground)
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=80)
                    stop = gr.Button("Stop", elem_id="stop", min_width=80)
            with gr.Column(scale=2):
                gallery = gr.Gallery(
                    elem_id="images",
                    show_label=False,
                    columns=4,
                    object_fit="contain",
                    interactive=False,
                    buttons=["download", "download_all", "fullscreen"],
                )
        hidden = {"api_visibility": "private"}
        draw.click(
            _drawer(playground, folder, [*drawing, *sources]),
            [*drawing.values(), *sources.values()],
            gallery,
            concurrency_limit=1,
            **hidden,
        )
        stop.click(playground.stop, queue=False, **hidden)
        page.load(lambda: _checkpoint_choices(playground), None, sources["checkpoint"], **hidden)
        if playground.has_experts:
            _add_experts(page, playground, [*sources.values()])
    page.queue(api_open=False, max_size=MAX_WAITING)
    return page


def _drawing_fields(playground: Playground) -> dict[str, gr.components.Component]:
    """Add the fields that say what to draw, by the names of a `DrawingRequest`."""
    config = playground.config
    found = {}
    if classes := playground.classes():
        found["class_index"] = gr.Dropdown(classes, value=0, label="Class", elem_id="class")
    if can_guide_without_classifier(config.model.num_classes, config.data.class_dropout_prob):
        about = {"label": "Guidance (cfg)", "info": "1 = none", "elem_id": "cfg"}
        found["cfg_scale"] = gr.Slider(0, MAX_SCALE, DEFAULT_SCALE, step=0.1, **about)
    last = config.diffusion.num_timesteps
    steps = {"step": 1, "precision": 0}
    return found | {
        "steps": gr.Slider(
            1, last, min(DEFAULT_STEPS, last), label="Steps", elem_id="steps", **steps
        ),
        "sampler": gr.Dropdown(
            list(methods_for(config.diffusion.objective)), label="Sampler", elem_id="sampler"
        ),
        "seed": gr.Number(
            0, label="Seed", minimum=0, maximum=MAX_SEED, precision=0, elem_id="seed"
        ),
        "num_images": gr.Slider(
            1, MAX_IMAGES, DEFAULT_IMAGES, label="Images", elem_id="count", **steps
        ),
    }


def _source_fields(playground: Playground) -> dict[str, gr.components.Component]:
    """Add the fields that choose the weights, by the names of a `DrawingRequest`."""
    first, *others = playground.averages()
    weights = [
        (f"average {first}", ""),
        *((f"average {name}", name) for name in others),
        ("raw, as trained", RAW),
    ]
    checkpoints = [LATEST, *playground.checkpoints()]
    return {
        "checkpoint": gr.Dropdown(checkpoints, label="Checkpoint", elem_id="checkpoint"),
        "weights": gr.Dropdown(weights, value="", label="Weights", elem_id="weights"),
    }


def _checkpoint_choices(playground: Playground) -> gr.Dropdown:
    return gr.Dropdown([LATEST, *playground.checkpoints()])


def _drawer(playground: Playground, folder: Path, names: list[str]) -> object:
    """Return the function that the page calls with the fields' values."""

    def draw(*values: object, progress: gr.Progress = gr.Progress()) -> list[str]:  # noqa: B008
        asked = dict(zip(names, values, strict=True))
        request = DrawingRequest(**{"class_index": 0, "cfg_scale": 1.0} | asked)
        try:
            pictures = playground.draw(
                request, lambda step: progress((step + 1, request.steps), unit="steps")
            )
        except ConfigError as err:
            raise gr.Error(str(err), print_exception=False) from err
        except DrawingStoppedError as err:
            raise gr.Error("Stopped.", print_exception=False) from err
        shutil.rmtree(folder, ignore_errors=True)  # the drawing before
        name = f"class{request.class_index}-seed{request.seed}"
        paths = [folder / f"{name}-{i:02d}.png" for i in range(len(pictures))]
        for path, picture in zip(paths, pictures, strict=True):
            save_png(path, picture)
        return [str(path) for path in paths]

    return draw


def _add_experts(page: gr.Blocks, playground: Playground, sources: list) -> None:
    """Add the panel of experts."""
    last = playground.config.diffusion.num_timesteps - 1
    gr.Markdown(
        "## Which experts serve which noise level\n"
        "The gates of one timestep, and the experts of all of them. Brighter is a larger gate; "
        "black is an expert that the timestep does not meet."
    )
    about = {"label": "Timestep", "info": f"0 = clean, {last} = noise only", "elem_id": "timestep"}
    timestep = gr.Slider(0, last, last // 2, step=1, precision=0, **about)
    settings = {"format": "png", "interactive": False, "buttons": [], "show_label": False}
    at = gr.Image(elem_id="experts", alt_text="gates of the timestep", **settings)
    everywhere = gr.Image(elem_id="timesteps", alt_text="experts of all timesteps", **settings)

    def show(*values: object) -> tuple[np.ndarray, np.ndarray]:
        try:
            return playground.experts_at(*values)
        except ConfigError as err:
            raise gr.Error(str(err), print_exception=False) from err

    gr.on(
        [page.load, timestep.change, *(field.change for field in sources)],
        show,
        [timestep, *sources],
        [at, everywhere],
        trigger_mode="always_last",
        show_progress="hidden",
        concurrency_limit=1,
        api_visibility="private",
    )
