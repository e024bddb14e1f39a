"""Write the card of an exported model, with the numbers that its run has and no others."""

import sys
from pathlib import Path
from typing import Any

import yaml

from data_tools.files import MalformedError
from data_tools.formats import NewerFormatError
from data_tools.vae.autoencoder import DEMO_VAE
from data_tools.vae.vae_files import REPOSITORY
from models.switch_dit import MODEL_NAMES
from training.checkpoints.manifest import MANIFEST_FILE, read_manifest
from training.exports.job import ExportJob
from training.monitoring.event_files import METRICS_FILE, read_metrics
from training.run.directory import CARD, EVALUATION_DIR

_LOSSES = ("loss/total", "loss/mse", "loss/vlb", "loss/prior")


def model_card(job: ExportJob, kind: str, usage: str) -> str:
    """Return the card in Markdown, with hubs' header; `kind` is --format, `usage` how it loads."""
    model = job.config.model
    name = f"{MODEL_NAMES[model.routing]}-{model.size}/{model.patch_size}"
    header = {
        "library_name": "pytorch" if job.vae is None else "diffusers",
        "tags": ["switch-dit", "diffusion", "image-generation", model.routing],
    }
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n# {name}, {job.origin.run}",
        f"The {job.origin.weights} of the run `{job.origin.run}`, exported as `{kind}`.",
        f"## Use\n\n{usage.rstrip()}",
        f"## Model\n\n{_table(_model_facts(job))}",
        f"## Training\n\n{_table(_training_facts(job))}",
    ]
    losses = _last_losses(job)
    if losses:
        parts.append(f"## Losses\n\n{_table(losses)}")
    scores = list(_scores(job))
    if scores:
        parts.append("## Evaluation\n\nOf these very weights.\n\n" + "\n\n".join(scores))
    parts.append(f"## Licences\n\n{_licences(job)}")
    configuration = job.config.to_yaml().rstrip()
    parts.append(f"## Configuration of the run\n\n```yaml\n{configuration}\n```")
    return "\n\n".join(parts) + "\n"


def _table(facts: dict[str, Any]) -> str:
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value is not None]
    return "\n".join(["| | |", "| --- | --- |", *rows])


def _model_facts(job: ExportJob) -> dict[str, Any]:
    model, diffusion = job.config.model, job.config.diffusion
    experts = None
    if model.routing == "switch":
        experts = f"{model.num_experts} {model.expert_kind} per block, {model.top_k} per timestep"
    parameters = sum(value.numel() for value in job.load_weights().values())
    is_flow = diffusion.objective == "flow"
    schedule = "" if is_flow else f", {diffusion.noise_schedule} noise schedule"
    return {
        "parameters": f"{parameters:,} in the run's file",
        "experts": experts,
        "classes": model.num_classes or "none (unconditional)",
        "latents": " x ".join(map(str, model.latent_shape)),
        "objective": diffusion.objective
        + (", learned variance" if job.options.learned_variance else ""),
        "process": f"{diffusion.num_timesteps} timesteps{schedule}",
        "VAE": _vae_fact(job),
    }


def _vae_fact(job: ExportJob) -> str:
    reference = job.manifest.vae
    if job.vae is None:
        return f"not included; the data was encoded with {reference.id}, sha256 {reference.sha256}"
    other = "" if job.vae.sha256 == reference.sha256 else " (not the one that encoded the data)"
    name = Path(job.vae.id)  # a path of this machine tells others nothing
    return f"{name.name if name.is_absolute() else name}, sha256 {job.vae.sha256}{other}"


def _training_facts(job: ExportJob) -> dict[str, Any]:
    origin, data = job.origin, job.manifest
    facts: dict[str, Any] = {
        "weights": f"{origin.weights}; `{origin.file}`, sha256 {origin.sha256}",
        "checkpoint": origin.checkpoint,
        "steps": None if origin.step is None else f"{origin.step:,}",
        "samples seen": None if origin.samples_seen is None else f"{origin.samples_seen:,}",
        "data": f"{data.num_samples:,} samples, {data.image.size} pixels ({data.image.crop})",
    }
    if (job.weights.parent / MANIFEST_FILE).exists():
        manifest = read_manifest(job.weights.parent)
        facts["data hash"] = manifest.data_hash
        facts["layout"] = str(manifest.layout)
    return facts


def _last_losses(job: ExportJob) -> dict[str, Any]:
    """Return the training losses of the last interval that the run logged up to these weights."""
    path, step = job.run_dir / METRICS_FILE, job.origin.step
    if step is None or not path.is_file():
        return {}
    last: dict[str, Any] = {}
    for record in read_metrics(job.run_dir):
        if record["step"] <= step and any(name in record for name in _LOSSES):
            last = record
    losses = {f"`{name}`": f"{last[name]:.6g}" for name in _LOSSES if name in last}
    return {"training losses, means up to step": last["step"]} | losses if losses else {}


def _scores(job: ExportJob) -> list[str]:
    """Return what `training/evaluate.py` kept about these weights, card by card."""
    found = []
    for path in sorted((job.run_dir / EVALUATION_DIR).rglob("*.json")):
        card = _read_card(path)
        weights = card.get("weights")
        if not isinstance(weights, dict) or weights.get("sha256") != job.origin.sha256:
            continue
        for key in ("metrics", "validation_loss"):
            if isinstance(card.get(key), dict):
                title = f"`{path.relative_to(job.run_dir)}`"
                about = {k: v for k, v in card.items() if k not in (key, "weights")}
                facts = _flat(card[key]) | _flat(about)
                found.append(f"{title}\n\n{_table(facts)}")
    return found


def _read_card(path: Path) -> dict[str, Any]:
    try:
        card = CARD.loads(path.read_bytes(), str(path))
    except NewerFormatError as err:
        sys.stderr.write(f"warning: {err} Its scores are left out.\n")
        return {}
    except (OSError, ValueError, MalformedError):  # not one of ours
        return {}
    return card if isinstance(card, dict) else {}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name nested values by their path."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name} ")
        elif value is not None:
            flat[f"{prefix}{name}"] = value
    return flat


def _licences(job: ExportJob) -> str:
    lines = ["No licence is stated for these weights: whoever publishes them must choose one."]
    if job.vae is not None and REPOSITORY / job.vae.id == DEMO_VAE:
        lines.append(
            "The VAE is the demo's, trained on OpenMoji (https://openmoji.org, CC BY-SA 4.0); it "
            "and pictures decoded with it are offered under CC BY-SA 4.0. See `vae/README.md`."
        )
    return "\n".join(lines)
