"""Try a few batches before encoding: measure rounding errors, memory and time.

N batch, C latent channels, H W latent size.
"""

import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_tools.encoding.device import is_out_of_memory
from data_tools.encoding.encoder import ShardEncoder
from data_tools.errors import ConfigError, count_of
from data_tools.sources.images import BadImageError, decode_image
from data_tools.sources.source import ImageSource
from data_tools.vae.autoencoder import Vae, encode_moments

# Of the rms error of reduced precision over the standard deviation of the latents. 0.03 is -30 dB,
# while the VAEs themselves reproduce images at 25 to 35 dB.
MAX_PRECISION_ERROR = 0.03
TRIAL_IMAGES = 8
MAX_BATCH_SIZE = {"cpu": 32, "cuda": 256}  # larger ones gain no speed
_FREE_SHARE = 0.5  # of the memory that is free: other processes, and what this one does not know
_SAMPLES = (1, 3)  # batches whose peaks are compared; the difference is what an image takes


def first_images(source: ImageSource, order: np.ndarray, size: int, count: int) -> np.ndarray:
    """Decode the first images of the order that can be, uint8 (n <= count, size, size, 3)."""
    pixels: list[np.ndarray] = []
    for place in order[: 8 * count].tolist():
        try:
            pixels.append(decode_image(source.read(place), size))
        except (BadImageError, OSError):
            continue  # told when the shard is encoded
        if len(pixels) == count:
            break
    return np.stack(pixels) if pixels else np.zeros((0, size, size, 3), np.uint8)


def check_any_image(source: ImageSource, order: np.ndarray, size: int) -> None:
    """Decode images until one can be.

    Raises:
        ConfigError: none can.
    """
    example = ""
    for place in map(int, order):
        try:
            decode_image(source.read(place), size)
            return
        except BadImageError as err:
            example = example or f"{source.name(place)}: {err}"
        except OSError:
            return  # told when the shard is encoded
    raise ConfigError(
        f"--input {source.text}: none of its {len(order)} files could be decoded; give images "
        f"({example})."
    )


def precision_error(exact: Vae, reduced: Vae, pixels: np.ndarray) -> float:
    """Return the rms error of posterior means over their standard deviation; inf if not finite."""
    images = torch.from_numpy(pixels)
    wanted, found = (
        encode_moments(vae, images).float().chunk(2, dim=1)[0] for vae in (exact, reduced)
    )
    if not torch.isfinite(found).all():
        return float("inf")
    return float((found - wanted).square().mean().sqrt() / wanted.std())


def check_precision(exact: Vae, reduced: Vae, pixels: np.ndarray, name: str) -> str:
    """Refuse a precision whose error is too large for this VAE; else say how large it is."""
    error = precision_error(exact, reduced, pixels)
    if error > MAX_PRECISION_ERROR:
        raise ConfigError(
            f"--precision {name}: the latents of {count_of(len(pixels), 'image')} differ from "
            f"those in fp32 by {error:.2g} of their standard deviation, more than "
            f"{MAX_PRECISION_ERROR}; use fp32."
        )
    return (
        f"--precision {name}: rms error {error:.2g} of the latents' standard deviation on "
        f"{count_of(len(pixels), 'image')}, at most {MAX_PRECISION_ERROR} is accepted"
    )


def timed_trial(encoder: ShardEncoder) -> tuple[float, float]:
    """Decode and encode a few images of the first shard.

    Returns:
        seconds to read and decode one image on one thread; and seconds to encode one, with the
        mirrored one if that is stored.
    """
    settings, started = encoder.settings, time.perf_counter()
    count = min(TRIAL_IMAGES, settings.batch_size)
    pixels = first_images(encoder.source, encoder.order, settings.image.size, count)
    decode_sec = (time.perf_counter() - started) / max(len(pixels), 1)
    images = torch.from_numpy(pixels)
    for _ in range(2):  # the first one chooses algorithms and allocates
        started = time.perf_counter()
        if len(images):
            encoder.encode_pixels(images).arrays()
        vae_sec = (time.perf_counter() - started) / max(len(images), 1)
    return decode_sec, vae_sec


def choose_batch_size(vae: Vae, size: int, num_processes: int) -> int:
    """Choose how many images fit beside each other, from what small batches need.

    Args:
        num_processes: of this machine that share its memory; on a GPU, what they use is not free.

    Returns:
        a power of two.
    """
    device = next(vae.model.parameters()).device
    limit = MAX_BATCH_SIZE[device.type]
    try:
        low, high = (_peak_bytes(vae, size, count, device) for count in _SAMPLES)
    except RuntimeError as err:
        if not is_out_of_memory(err):
            raise
        raise ConfigError(
            f"--batch-size auto: not even {_SAMPLES[1]} images of {size} pixels fit into the "
            f"memory of {device}; end what else uses it, or use a larger device."
        ) from err
    # What a process already holds and uses again hides small needs; but a layer at full resolution
    # needs its input, its output and a workspace.
    width, parameter = vae.model.config.block_out_channels[0], next(vae.model.parameters())
    least = 3 * width * size**2 * parameter.element_size()
    per_image = max((high - low) / (_SAMPLES[1] - _SAMPLES[0]), least)
    free = _free_bytes(device) / (num_processes if device.type == "cpu" else 1)
    fitting = max(1, int(free * _FREE_SHARE / per_image))
    return min(limit, 1 << (fitting.bit_length() - 1))


def _peak_bytes(vae: Vae, size: int, count: int, device: torch.device) -> int:
    pixels: Tensor = torch.full((count, size, size, 3), 127, dtype=torch.uint8, device=device)
    encode_moments(vae, pixels)  # what is allocated once does not count
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        encode_moments(vae, pixels)
        return torch.cuda.max_memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak so far
    encode_moments(vae, pixels)
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    # What a container's or a job's limit leaves.
    for names in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # there is no limit, or it is "max"
            limit, used = (int(Path("/sys/fs/cgroup", name).read_text("utf-8")) for name in names)
            free = min(free, limit - used)
    return free
