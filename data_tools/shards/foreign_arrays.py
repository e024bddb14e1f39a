"""Recognise latents that other programs stored in a way that cannot be used, and say what to do.

C latent channels, H W latent size.
"""

from collections.abc import Sequence

import numpy as np

from data_tools.user_files.file_kinds import HEAD_BYTES, content_kind

DTYPES = ("float16", "float32")
USUAL_STD = (0.3, 3.0)  # of latents as a model sees them, which are scaled to about 1
_PICKLE = b"\x80"


def not_npy(content: bytes) -> str:
    """Say what a member is that should be an .npy file."""
    if content.startswith(b"PK\x03\x04"):
        kind = "a ZIP archive, as .npz and .pt files are"
    elif content.startswith(_PICKLE):
        kind = "a pickle, which is never loaded"
    else:
        kind = content_kind(content[:HEAD_BYTES]) or "something else"
    return f"is no .npy file but {kind}; write each array with numpy.save"


def unusable(shape: Sequence[int], dtype: np.dtype, is_fortran: bool) -> str:
    """Say why an array cannot be read in place and what to do; "" if it can."""
    found = f"holds {dtype} {tuple(shape)}"
    if dtype.hasobject:
        return f"{found}, pickled objects, which are never loaded; write numbers of float32"
    if dtype.kind == "V" and dtype.itemsize == 2:
        return f"{found}, 2 bytes without a type, as bfloat16 is stored; write float32"
    if dtype.newbyteorder("=").name not in DTYPES:
        return f"{found}; float16 and float32 can be read, write array.astype('float32')"
    if len(shape) == 4 and shape[0] == 1:
        return f"{found}, a batch of one; write array[0]"
    if len(shape) == 4:
        return f"{found}, a batch; write each sample of it as a member of its own"
    if len(shape) == 2:
        return f"{found}, as of tokens; reshape it to (channels, height, width)"
    if len(shape) != 3:
        return f"{found}; (channels, height, width) can be read"
    if is_fortran:
        return f"{found} in Fortran order; write numpy.ascontiguousarray(array)"
    return ""


def channels_last(shape: Sequence[int]) -> str:
    """Ask whether (H, W, C) was stored, where the shape looks like it; else ""."""
    if shape[2] >= min(shape[:2]):
        return ""
    return f"; its last axis has {shape[2]}: if these are the channels, write transpose(2, 0, 1)"


def doubts(scaled_std: Sequence[float], scaling_factor: float) -> str:
    """Warn of latents that are not unscaled ones of this VAE; "" where their size is usual.

    `scaled_std` is per channel, as a model would see them.
    """
    least, most = USUAL_STD
    if all(least <= std <= most for std in scaled_std):
        return ""
    advice = "see that --vae is the one that made them, and that they are not scaled"
    if all(least <= std / scaling_factor <= most for std in scaled_std):
        advice = (
            f"they seem to be multiplied by the scaling factor ({scaling_factor:g}) already: "
            "divide them by it and index again"
        )
    return (
        f"a model would see a standard deviation of {min(scaled_std):.2g} to {max(scaled_std):.2g} "
        f"per channel where 1 is usual; {advice}"
    )
