"""Load exports where this repository does not exist, and keep what they compute.

python -I tests/load_exports.py JOBS RESULTS THREADS: JOBS is JSON, a list of {"kind", "folder",
...}. Fails if something was imported that an installation of NEEDED does not bring.
"""

import importlib.util
import json
import os
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGES = ("models", "data_tools", "training")
NEEDED = ("diffusers", "torch", "pillow", "safetensors")
# What these import if it happens to be there, and do without if it is not.
OPTIONAL = (
    "scipy",  # schedulers of diffusers, for noise levels that no export has
    "dill",  # torch.utils.data, for pickling lambdas
    *("brotli", "_brotli"),  # diffusers' HTTP library, for compressed answers
)


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


def brought(names):
    """The distributions that an installation of some brings."""
    found, waiting = set(), list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        try:
            requirements = map(Requirement, metadata.requires(name) or ())
        except metadata.PackageNotFoundError:  # such as a backport that this system has no use for
            continue
        found.add(name)
        waiting += [
            r.name for r in requirements if not r.marker or r.marker.evaluate({"extra": ""})
        ]
    return found


def foreign_modules(modules):
    """The top-level names of modules that are of Python, NEEDED, OPTIONAL and the exports not."""
    exported = Path(os.environ["HF_MODULES_CACHE"])
    python = Path(sysconfig.get_path("stdlib"))  # one of its modules is named after the machine
    packages, known = metadata.packages_distributions(), brought(NEEDED)
    found = set()
    for name, module in modules.items():
        if module is sys.modules["__main__"] or getattr(module, "__file__", None) is None:
            continue  # without a file: built in, made in memory, or only a folder of others
        folders = Path(module.__file__).parents
        # Compiled modules of a package may be known by their last name alone.
        top = (module.__spec__.name if module.__spec__ else name).partition(".")[0]
        is_known = bool(known & set(map(canonicalize_name, packages.get(top, ()))))
        is_known |= top in sys.stdlib_module_names or folders[0] == python
        if not (is_known or top in OPTIONAL or exported in folders):
            found.add(top)
    return sorted(found)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    jobs = json.loads(open(sys.argv[1]).read())  # noqa: SIM115
    results = [
        {"pipeline": pipeline, "dit": dit, "program": program}[job["kind"]](job) for job in jobs
    ]
    ours = [name for name in PACKAGES if importlib.util.find_spec(name) or name in sys.modules]
    assert ours == [], f"this repository can be imported: {ours}"
    found = foreign_modules(dict(sys.modules))
    assert found == [], f"an export needs more than {NEEDED}: {found}"
    torch.save(results, sys.argv[2])
