"""Write a file of weights under this program's names, or a pipeline folder with custom code."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch

from data_tools.errors import ConfigError
from data_tools.files import as_json
from data_tools.vae.vae_files import REPOSITORY
from models.merged import merge_experts
from models.sampler import visited_timesteps
from training.checkpoints.weight_files import write_weights
from training.engine.objective import build_diffusion
from training.exports.code_files import write_code
from training.exports.hub_code.transformer import SwitchDiTTransformer2DModel
from training.exports.job import EXPORT, ExportJob

MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
INDEX_FILE = "model_index.json"
NETWORK_CLASS = SwitchDiTTransformer2DModel.__name__
_LOADING = """\
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)
    pipeline({labels}, seed=0).images[0].save("image.png")

`trust_remote_code=True` runs the Python files of the folder, which need diffusers, torch and
Pillow and nothing else. Image i of a call depends on the seed, i and its class alone, and is the
one that `training/sample.py` draws. Arguments that are not given are those in
`scheduler/scheduler_config.json` and `model_index.json`. What `pipeline.save_pretrained` writes
loads in the same way.
"""


def write_safetensors(job: ExportJob, folder: Path) -> str:
    """Write the weights as they are, and what they belong to."""
    described = {
        "model": asdict(job.options),
        "diffusion": describe_process(job),
        "latents": describe_latents(job),
        "id2label": job.id2label,
        "run_configuration": job.config.to_dict(),
    }
    metadata = {"format": "pt", "origin": json.dumps(vars(job.origin))}
    write_weights(folder / MODEL_FILE, job.load_weights(), metadata)
    (folder / CONFIG_FILE).write_text(EXPORT.dumps(described) + "\n", encoding="utf-8")
    return f"""\
`{MODEL_FILE}` holds float32 tensors under the names of this program's `models/switch_dit.py`, the
experts of a block stacked. `{CONFIG_FILE}` holds the options of the network, the diffusion
process, and how latents are scaled. The file can be given to `training/sample.py --weights`, and to
`training/main.py --init-from`.
"""


def write_pipeline(job: ExportJob, folder: Path) -> str:
    """Write a pipeline folder with the network as it was trained."""
    options = asdict(job.options.for_prediction())
    with torch.device("meta"):  # its weights are replaced, not copied
        transformer = SwitchDiTTransformer2DModel(options=options)
    weights = {f"network.{name}": value for name, value in job.load_weights().items()}
    kept = transformer.state_dict().keys()
    transformer.load_state_dict({name: weights[name] for name in kept}, assign=True)
    return _write_folder(job, folder, transformer)


def check_merged(job: ExportJob) -> None:
    """Refuse models without affine experts, which alone merge to one matrix of the same size."""
    model = job.config.model
    if model.routing != "switch" or model.expert_kind != "affine":
        flag = f"--routing {model.routing}"
        if model.routing == "switch":
            flag = f"--expert-kind {model.expert_kind}"
        raise ConfigError(
            f"--format merged: a run with {flag} has no affine experts to merge; use --format "
            "diffusers."
        )


def write_merged_pipeline(job: ExportJob, folder: Path) -> str:
    """Write a pipeline folder with a network of merged experts, for one sampler's timesteps."""
    settings = job.settings
    diffusion = build_diffusion(job.config)
    timesteps = visited_timesteps(diffusion, settings.num_steps, settings.method, settings.shift)
    merged = merge_experts(job.load_model(), timesteps)
    with torch.device("meta"):
        transformer = SwitchDiTTransformer2DModel(
            timesteps=timesteps, options=asdict(merged.options)
        )
    weights = {f"network.{name}": value for name, value in merged.state_dict().items()}
    transformer.load_state_dict(weights, assign=True)
    usage = _write_folder(job, folder, transformer)
    millions = merged.merged_weight.numel() / 1e6
    return f"""{usage}
The experts are merged, exactly, to one affine map per block for each of the {len(timesteps)}
timesteps that {settings.method} visits in {settings.num_steps} steps: at each of them the network
is a plain DiT with one more affine map in every block. Other samplers and numbers of steps are
refused. The merged maps are {millions:,.1f} million parameters.
"""


def _write_folder(job: ExportJob, folder: Path, transformer: SwitchDiTTransformer2DModel) -> str:
    """Write the parts of a pipeline, its index and its code; return how it is used."""
    transformer.save_pretrained(folder / "transformer")
    _write_vae(job, folder)
    settings = job.settings
    process = {
        "_class_name": "SwitchDiTScheduler",
        "_diffusers_version": diffusers.__version__,
        **describe_process(job),
        "sampler": settings.method,
        "num_inference_steps": settings.num_steps,
        "shift": settings.shift,
        "id2label": job.id2label,
        "guidance": job.default_guidance,
    }
    scheduler = folder / "scheduler"
    scheduler.mkdir()
    (scheduler / "scheduler_config.json").write_text(as_json(process), encoding="utf-8")
    index = {
        "_class_name": [write_code(folder, "switch_dit_pipeline"), "SwitchDiTPipeline"],
        "_diffusers_version": diffusers.__version__,
        "id2label": job.id2label,
        "guidance": job.default_guidance,
        "transformer": [write_code(folder / "transformer", "switch_dit"), NETWORK_CLASS],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": [write_code(scheduler, "switch_dit_scheduler"), "SwitchDiTScheduler"],
    }
    (folder / INDEX_FILE).write_text(as_json(index), encoding="utf-8")
    label = "class_labels=[0, 0]" if job.id2label is None else f"[{job.id2label['0']!r}]"
    return _LOADING.format(labels=label)


def _write_vae(job: ExportJob, folder: Path) -> None:
    """Write a copy of the VAE in float32, with the card that came with it."""
    # Its weights lie channels-last in memory, which safetensors refuses.
    torch.nn.Module.to(job.vae.model, memory_format=torch.contiguous_format)
    job.vae.model.save_pretrained(folder / "vae")
    config_file = folder / "vae" / CONFIG_FILE
    config = json.loads(config_file.read_bytes())
    config.pop("_name_or_path", None)  # a path of this machine
    config_file.write_text(as_json(config), encoding="utf-8")
    card = REPOSITORY / job.vae.id / "README.md"
    if card.is_file():
        shutil.copyfile(card, folder / "vae" / "README.md")


def describe_process(job: ExportJob) -> dict[str, Any]:
    """Say what the network was trained on, as the arguments of Diffusion."""
    diffusion = build_diffusion(job.config)
    names = ("noise_schedule", "num_timesteps", "objective", "learned_variance")
    return {name: getattr(diffusion, name) for name in names}


def describe_latents(job: ExportJob) -> dict[str, Any]:
    """Say how latents of the VAE become what the network sees."""
    vae = job.manifest.vae
    return {
        "shape": job.config.model.latent_shape,
        "scaling_factor": vae.scaling_factor,
        "shift_factor": vae.shift_factor,
        "latents_mean": vae.latents_mean,
        "latents_std": vae.latents_std,
        "rule": "final = (latent - latents_mean) * scaling_factor / latents_std"
        if vae.latents_mean
        else "final = (latent - shift_factor) * scaling_factor",
        "vae": {"id": vae.id, "sha256": vae.sha256},
    }
