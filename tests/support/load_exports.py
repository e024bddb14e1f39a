"""Load exports where this repository does not exist, and keep what they compute.

python -I load_exports.py JOBS RESULTS THREADS: JOBS is JSON, a list of {"kind", "folder",
...}. Fails if something was imported that an installation of NEEDED does not bring.
"""

import importlib.util
import json
import os
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import diffusers
import numpy as np
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
        "used": uses_of(pipe, job) if job.get("is_used") else None,
        "latents": latents,
        "by_generator": by_generator,
        "pixels": torch.from_numpy(pictures),
        "refusals": refusals,
    }


def uses_of(pipe, job):
    """What people of diffusers do with a pipeline: a result, or the refusal, by name."""
    quick = {"num_inference_steps": 2, "output_type": "latent"}
    saved = f"{job['folder']}-saved"
    pipe.save_pretrained(saved)
    again = DiffusionPipeline.from_pretrained(saved, trust_remote_code=True)
    half = DiffusionPipeline.from_pretrained(saved, trust_remote_code=True, dtype=torch.bfloat16)
    made = type(pipe)(**pipe.components)
    for one in (again, half, made):
        one.set_progress_bar_config(disable=True)

    def with_scheduler(scheduler):
        return type(pipe)(**pipe.components | {"scheduler": scheduler})

    def swapped(scheduler):
        made.scheduler = scheduler
        return made([0], **quick)

    foreign = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    uses = {
        "list": lambda: pipe([3, 3], **quick).images,
        "tensor": lambda: pipe(torch.tensor([3, 3]), **quick).images,
        "array": lambda: pipe(np.array([3, 3]), **quick).images,
        "numbers of numpy": lambda: pipe([np.int64(3), np.int32(3)], **quick).images,
        "tensor of none": lambda: pipe(torch.tensor(3), **quick).images,
        "one": lambda: pipe(3, **quick).images,
        "saved and loaded": lambda: again(["class 3"] * 2, **quick).images,
        "made of components": lambda: made(["class 3"] * 2, **quick).images,
        "made of components and parameters": lambda: type(pipe)(
            **pipe.components, **pipe.parameters
        ).labels["class 3"],
        "half": lambda: half([3, 3], **quick).images,
        "label ids": lambda: pipe.get_label_ids(["class 3", "class 0"]),
        "unsigned seed": lambda: (
            pipe(3, generator=torch.Generator().manual_seed(-1), **quick).images.shape
        ),
        "table": lambda: pipe(torch.zeros(2, 2, dtype=torch.int64), **quick),
        "truths": lambda: pipe(torch.tensor([True]), **quick),
        "fractions": lambda: pipe(np.array([3.0]), **quick),
        "bytes": lambda: pipe(b"class 3", **quick),
        "generators": lambda: pipe(3, generator=[torch.Generator()], **quick),
        "NaN": lambda: pipe(3, guidance_scale=float("nan"), **quick),
        "another scheduler": lambda: with_scheduler(foreign),
        "another scheduler later": lambda: swapped(diffusers.DDIMScheduler()),
    }
    found = {}
    for name, use in uses.items():
        try:
            found[name] = use()
        except ValueError as err:
            found[name] = str(err)
    return found


def program(job):
    """The program's predictions, and what it says of numbers that it was not trained at."""
    denoiser, inputs = torch.export.load(job["folder"] + "/denoiser.pt2").module(), tensors_of(job)
    predictions = [denoiser(inputs["x"], torch.tensor([t]), inputs["y"]) for t in job["timesteps"]]
    refusals = []
    for t, y in ((1000, 0), (-1, 0), (5, 11)):
        try:
            denoiser(inputs["x"], torch.tensor([t]), torch.full_like(inputs["y"], y))
        except RuntimeError as err:
            refusals.append(str(err))
    return predictions, refusals


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
    results = [{"pipeline": pipeline, "program": program}[job["kind"]](job) for job in jobs]
    ours = [name for name in PACKAGES if importlib.util.find_spec(name) or name in sys.modules]
    assert ours == [], f"this repository can be imported: {ours}"
    found = foreign_modules(dict(sys.modules))
    assert found == [], f"an export needs more than {NEEDED}: {found}"
    torch.save(results, sys.argv[2])
