"""Find and load an autoencoder: from a diffusers folder, one file of weights, or the hub."""

import contextlib
import difflib
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file

from data_tools.errors import ConfigError, count_of, first_line
from data_tools.user_files.file_kinds import refuse_lfs_pointer
from data_tools.user_files.paths import absence
from data_tools.user_files.user_text import read_text

if TYPE_CHECKING:  # its import takes seconds, and training needs it only to draw samples
    from diffusers import AutoencoderKL

REPOSITORY = Path(__file__).resolve().parents[2]
DEFAULT_VAE = "stabilityai/sd-vae-ft-ema"  # the paper's, for images of 256 and 512 pixels
_CONFIG = "config.json"
_PIPELINE_PART = "vae"  # folder of a whole pipeline
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"  # of weights in several files
# Weights of less precision, in the order in which they are taken where there are no others.
_PRECISIONS = ("fp32", "fp16", "bf16")
_VARIANT = re.compile(r"diffusion_pytorch_model\.([\w-]+?)\.safetensors")
_INDEX_VARIANT = re.compile(r"diffusion_pytorch_model\.safetensors\.index\.([\w-]+)\.json")
_PART = re.compile(r"-\d+-of-\d+$")
_PICKLED = (".bin", ".ckpt", ".pt", ".pth")
_LOADING = {"use_safetensors": True, "low_cpu_mem_usage": False}  # True needs accelerate
_DAMAGE = (OSError, SafetensorError, RuntimeError, ValueError, KeyError)


def load_model(source: str | Path) -> tuple["AutoencoderKL", str]:
    """Load an autoencoder.

    Args:
        source: a path (relative ones are tried from the working folder, then from the repository),
            or a hub id.

    Returns:
        The model, and what finds it again: the hub id, or a path; inside this repository relative
        to it.
    """
    path = _find(source)
    if path is None:
        return _from_folder(_hub_folder(str(source)), str(source)), str(source)
    model = _from_file(path, str(path)) if path.is_file() else _from_folder(path, str(path))
    if path.is_relative_to(REPOSITORY):
        return model, path.relative_to(REPOSITORY).as_posix()
    return model, str(path)


def _find(source: str | Path) -> Path | None:
    """Locate a folder or file; None if `source` can only be a hub id."""
    given = Path(source)  # of which flags and presets have expanded ~
    for path in (given, REPOSITORY / given):
        if path.exists():
            return path.resolve()
    text = str(source)
    beside = [path.name for path in (REPOSITORY / given).parent.glob("*")]
    if near := difflib.get_close_matches(given.name, beside, 1):
        raise ConfigError(
            f"--vae {source}: {absence(given)}; did you mean {given.with_name(near[0])}?"
        )
    is_hub_id = text.count("/") == 1 and not text.startswith((".", "~", "/"))
    if is_hub_id and given.suffix != ".safetensors":
        return None
    raise ConfigError(
        f"--vae {source}: {absence(given)}; give a diffusers folder, a .safetensors file, or a hub "
        f"id such as {DEFAULT_VAE}."
    )


def _from_folder(folder: Path, shown: str) -> "AutoencoderKL":
    """Load from a folder that diffusers saved, the VAE's own or that of a whole pipeline."""
    from diffusers import AutoencoderKL

    part = folder / _PIPELINE_PART
    if _model_name(folder / _CONFIG) != "AutoencoderKL" and (part / _CONFIG).is_file():
        folder = part
    _check_config(folder / _CONFIG, shown)
    found = _weights_in(folder, shown)
    if isinstance(found, Path):
        return _from_file(found, f"{shown}/{found.name}")
    try:
        with _quiet_diffusers(), _readable_folder(folder) as place:
            model, info = AutoencoderKL.from_pretrained(
                place, local_files_only=True, output_loading_info=True, **found, **_LOADING
            )
    except _DAMAGE as err:
        raise ConfigError(
            f"--vae {shown}: diffusers cannot load its weights ({first_line(err)}); "
            "fetch the folder again."
        ) from err
    if missing := sorted(info["missing_keys"]):
        if (folder / _WEIGHTS).is_file():  # perhaps under the names of the original code
            return _from_file(folder / _WEIGHTS, f"{shown}/{_WEIGHTS}")
        raise ConfigError(
            f"--vae {shown}: its weights lack {count_of(len(missing), 'tensor')} that {_CONFIG} "
            f"describes ({missing[0]}); fetch the folder again."
        )
    return model


def _weights_in(folder: Path, shown: str) -> dict[str, Any] | Path:
    """Choose the weights of a folder.

    Returns:
        What diffusers needs to be told of them; or a file under a name that it does not know.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    for name in names:
        if name.endswith(".safetensors"):
            refuse_lfs_pointer("--vae", folder / name)
    if _WEIGHTS in names or _INDEX in names:
        return {}
    variants = {match[1] for name in names if (match := _INDEX_VARIANT.fullmatch(name))}
    matches = filter(None, map(_VARIANT.fullmatch, names))
    variants |= {match[1] for match in matches if not _PART.search(match[1])}
    for variant in _PRECISIONS:
        if variant in variants:
            return {"variant": variant}
    files = [name for name in names if name.endswith(".safetensors")]
    if len(files) == 1:
        return folder / files[0]
    if files:
        raise ConfigError(
            f"--vae {shown}: has several files of weights ({', '.join(files)}); name one of them: "
            f"--vae {shown}/{files[0]}."
        )
    if pickled := [name for name in names if name.endswith(_PICKLED)]:
        refuse_lfs_pointer("--vae", folder / pickled[0])
        raise ConfigError(
            f"--vae {shown}: has pickled weights only ({pickled[0]}), which may run code; convert "
            f"them once, with diffusers.AutoencoderKL.from_pretrained({str(folder)!r}, "
            "use_safetensors=False).save_pretrained(FOLDER), and give --vae FOLDER."
        )
    raise ConfigError(f"--vae {shown}: has no weights ({_WEIGHTS}); fetch the folder again.")


def _from_file(path: Path, shown: str) -> "AutoencoderKL":
    """Load one file, with the configuration beside it: a weight file states no scaling factor."""
    from diffusers import AutoencoderKL

    refuse_lfs_pointer("--vae", path)
    if path.suffix in _PICKLED:
        raise ConfigError(
            f"--vae {shown}: is a pickled file, which may run code; give weights as .safetensors."
        )
    config = path.parent / _CONFIG
    if not config.is_file():
        raise ConfigError(
            f"--vae {shown}: no config.json beside it, and weights tell no scaling factor; "
            "put the VAE's config.json of the diffusers format into the same folder."
        )
    _check_config(config, shown)
    try:
        with _quiet_diffusers(), _readable_folder(path.parent) as place:
            model = AutoencoderKL.from_config(AutoencoderKL.load_config(place))
            weights = load_file(path)
            if weights.keys() == model.state_dict().keys():
                model.load_state_dict(weights)
                return model
            # The names of the original Stable Diffusion code; diffusers knows the translation.
            return AutoencoderKL.from_single_file(
                str(path), config=str(place), local_files_only=True
            )
    except _DAMAGE as err:
        raise ConfigError(
            f"--vae {shown}: these are not the weights that {config} describes "
            f"({first_line(err)}); give the two files of one VAE."
        ) from err


def _hub_folder(hub_id: str) -> Path:
    """Fetch what a VAE needs of a repository of the hub, or find it in the cache.

    Returns:
        The folder in the cache, that of the VAE itself.
    """
    try:
        folder, place = _hub_config(hub_id)
        for name in (_WEIGHTS, _INDEX, *(_WEIGHTS.replace(".", f".{v}.") for v in _PRECISIONS)):
            with contextlib.suppress(EntryNotFoundError):
                found = Path(hf_hub_download(hub_id, place + name))
                if name == _INDEX:
                    index = json.loads(found.read_text(encoding="utf-8"))
                    for part in sorted(set(index["weight_map"].values())):
                        hf_hub_download(hub_id, place + part)
                break
    except (OSError, EntryNotFoundError, HfHubHTTPError, HFValidationError, ValueError) as err:
        if isinstance(err, EntryNotFoundError) and not isinstance(err, LocalEntryNotFoundError):
            raise ConfigError(
                f"--vae {hub_id}: the hub has no VAE there (no config.json of an AutoencoderKL, at "
                "the top or in vae/); give the id of a VAE or of a pipeline with one."
            ) from err
        raise ConfigError(
            f"--vae {hub_id}: neither in the Hugging Face cache nor reachable "
            f"({type(err).__name__}); on a machine with a network run 'hf download {hub_id} "
            "--local-dir FOLDER', copy FOLDER here and pass --vae FOLDER."
        ) from err
    if not any(path.suffix in (".safetensors", *_PICKLED) for path in folder.iterdir()):
        raise ConfigError(
            f"--vae {hub_id}: has no weights as .safetensors in the Hugging Face cache or on the "
            "hub; fetch or convert them, and pass --vae FOLDER."
        )
    return folder


def _hub_config(hub_id: str) -> tuple[Path, str]:
    """Find the configuration of a repository's VAE.

    Returns:
        The folder in the cache; and the folder in the repository, "" or "vae/".
    """
    failure: Exception | None = None
    for place in ("", f"{_PIPELINE_PART}/"):
        try:
            config = Path(hf_hub_download(hub_id, place + _CONFIG))
        except EntryNotFoundError as err:
            failure = err
            continue
        if _model_name(config) == "AutoencoderKL":
            return config.parent, place
    if failure is not None:
        raise failure
    raise ConfigError(
        f"--vae {hub_id}: describes {_model_name(config) or 'no model'}, not an AutoencoderKL; "
        "give the id of a VAE or of a pipeline with one."
    )


def _model_name(config: Path) -> str | None:
    """Return which model a configuration describes; None if it cannot be read."""
    try:
        content = json.loads(read_text(config))
    except (OSError, ValueError):
        return None
    return content.get("_class_name") if isinstance(content, dict) else None


def _check_config(path: Path, shown: str) -> None:
    try:
        config = json.loads(read_text(path))
    except FileNotFoundError as err:
        raise ConfigError(
            f"--vae {shown}: no config.json; give a folder that diffusers saved."
        ) from err
    except ValueError as err:
        refuse_lfs_pointer("--vae", path)
        raise ConfigError(f"--vae {path}: is not JSON ({err}); fetch the folder again.") from err
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name != "AutoencoderKL":
        raise ConfigError(
            f"--vae {path}: describes {name or 'no model'}, not an AutoencoderKL; "
            "give the VAE's own folder."
        )


@contextlib.contextmanager
def _readable_folder(folder: Path) -> Iterator[Path]:
    """Give a folder that diffusers can read: its config.json must be UTF-8 without a mark."""
    text = read_text(folder / _CONFIG)
    if (folder / _CONFIG).read_bytes() == text.encode():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="vae-") as name:
        for path in folder.iterdir():
            if path.name != _CONFIG:
                (Path(name) / path.name).symlink_to(path.absolute())
        (Path(name) / _CONFIG).write_text(text, encoding="utf-8")
        yield Path(name)


@contextlib.contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Let diffusers log nothing: what it would say before it raises is in our sentence."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
