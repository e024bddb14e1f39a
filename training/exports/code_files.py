"""Write the Python files that an exported folder carries: whole modules, joined to one file each.

One file a part, because diffusers follows relative imports only so far. From a local folder it
copies what the named file imports, but not what that imports in turn
(`get_cached_module_file` in utils/dynamic_modules_utils.py). From the Hub it downloads no file of
transformer/ but the named one (`allow_patterns` in pipelines/pipeline_utils.py).
"""

import hashlib
import re
from pathlib import Path

from training.config.location import REPOSITORY

# The modules of every file, each after those that it imports. The last one says what the file is.
FILES = {
    "switch_dit": (
        "models.network_options",
        "models.gate",
        "models.attention",
        "models.layers",
        "models.experts",
        "models.moe",
        "models.prior",
        "models.routing",
        "models.schedule",
        "models.variational",
        "models.diffusion",
        "models.loss_weights",
        "models.switch_dit",
        "models.merged",
        "training.exports.hub_code.transformer",
    ),
    "switch_dit_scheduler": ("training.exports.hub_code.scheduler",),
    "switch_dit_pipeline": (
        "models.schedule",
        "models.variational",
        "models.diffusion",
        "models.guidance",
        "models.sampler",
        "models.randomness",
        "models.latents",
        "training.config.wording",
        "training.sampling.latents",
        "training.sampling.checks",
        "training.sampling.class_choice",
        "training.exports.hub_code.pipeline",
    ),
}
_OUR_IMPORT = re.compile(
    r"^( *)from ((?:models|data_tools|training)[.\w]*) import (?:\([^)]*\)|.*)\n", re.MULTILINE
)
_HEADER = '''"""{purpose}

Whole modules of the program that trained the model, in the order in which they import each other.
"""
'''
_DIGEST_DIGITS = 8


def write_code(folder: Path, stem: str) -> str:
    """Write a file of FILES and return its name as a module.

    The name has a digest of the content. diffusers imports the code of all local folders under
    their bare file names: a second folder's file of the same name would replace the functions of a
    model that is already loaded.
    """
    text = joined_code(FILES[stem])
    name = f"{stem}_{hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_DIGITS]}"
    (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return name


def joined_code(modules: tuple[str, ...]) -> str:
    """Return the text of one file that holds modules of this repository and needs nothing of it.

    Imports from a module that stands above are left out. Where a function imports another one, as
    for experts on several ranks, the copy ends.
    """
    parts: list[str] = []
    for number, module in enumerate(modules):
        text = (REPOSITORY / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        above = modules[:number]

        def without(found: re.Match, module: str = module, above: tuple = above) -> str:
            indent, imported = found.groups()
            if imported in above:
                return ""
            assert indent, f"{module} imports {imported}, which must stand above it in FILES"
            return f'{indent}raise NotImplementedError("not part of this export")\n'

        parts.append(f"\n\n# From {module.replace('.', '/')}.py\n{_OUR_IMPORT.sub(without, text)}")
    purpose = text.split("\n")[0].strip('"')
    return _HEADER.format(purpose=purpose) + "".join(parts)
