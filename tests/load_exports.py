"""Load exports where this repository does not exist, and keep what they compute.

python -I tests/load_exports.py JOBS RESULTS THREADS: JOBS is JSON, a list of {"kind", "folder",
...}.
"""

import importlib.util
import json
import sys

import torch
from diffusers import DiffusionPipeline

PACKAGES = ("models", "data_tools", "training")
# Requirements of this repository that an export must do without.
NOT_NEEDED = {"deepspeed", "webdataset", "braceexpand", "mpi4py", "tensorboard"}


def tensors_of(job):
    return {name: torch.tensor(value) for name, value in job["inputs"].items()}


def pipeline(job):
    """The latents of every call, and the pixels of the first."""
    pipe = DiffusionPipeline.from_pretrained(job["folder"], trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    latents = [pipe(**call, output_type="latent").images for call in job["calls"]]
    pictures = pipe(**job["calls"][0], output_type="np").images
    first = dict(job["calls"][0])
    generator = torch.Generator().manual_seed(first.pop("seed", 0))
    by_generator = pipe(**first, generator=generator, output_type="latent").images
    refusals = []
    for call in job["refused"]:
        try:
            pipe(**call)
        except ValueError as err:
            refusals.append(str(err))
    return {
        "latents": latents,
        "by_generator": by_generator,
        "pixels": torch.from_numpy(pictures),
        "refusals": refusals,
    }


def dit(job):
    """The network's predictions, and what the pipeline of diffusers draws."""
    pipe = DiffusionPipeline.from_pretrained(job["folder"])
    pipe.set_progress_bar_config(disable=True)
    inputs = tensors_of(job)
    with torch.no_grad():
        predictions = [
            pipe.transformer(
                inputs["x"], timestep=torch.full((len(inputs["y"]),), t), class_labels=inputs["y"]
            ).sample
            for t in job["timesteps"]
        ]
    generator = torch.Generator().manual_seed(0)
    pictures = pipe(**job["call"], generator=generator, output_type="np").images
    return {
        "class": type(pipe).__name__,
        "labels": pipe.labels,
        "predictions": predictions,
        "timesteps": pipe.scheduler.timesteps.tolist(),
        "pixels": torch.from_numpy(pictures),
    }


def program(job):
    """The program's predictions."""
    denoiser, inputs = torch.export.load(job["folder"] + "/denoiser.pt2").module(), tensors_of(job)
    return [denoiser(inputs["x"], torch.tensor([t]), inputs["y"]) for t in job["timesteps"]]


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    jobs = json.loads(open(sys.argv[1]).read())  # noqa: SIM115
    results = [
        {"pipeline": pipeline, "dit": dit, "program": program}[job["kind"]](job) for job in jobs
    ]
    ours = [name for name in PACKAGES if importlib.util.find_spec(name) or name in sys.modules]
    assert ours == [], f"this repository can be imported: {ours}"
    assert not NOT_NEEDED & set(sys.modules), "an export needs more than diffusers"
    torch.save(results, sys.argv[2])
