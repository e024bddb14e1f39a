"""Compare the input with what is encoded already: missing files, and images edited since."""

from pathlib import Path

import numpy as np

from data_tools.encoding.encoder import SPLIT
from data_tools.encoding.output import EncodingOutput
from data_tools.encoding.settings import EncodingSettings
from data_tools.errors import ConfigError, count_of, some
from data_tools.permutations import permutation
from data_tools.sources.source import FileSource, ImageSource

_NAMES_SHOWN = 5


def check_files_exist(source: ImageSource, sizes: list[int]) -> None:
    """Refuse names without files before encoding begins: later, others are another data set.

    Args:
        source: of a data set that is not begun.
        sizes: what its `sizes` returned.

    Raises:
        ConfigError: files do not exist.
    """
    if not isinstance(source, FileSource):
        return
    places = zip(source.sized_places(), sizes, strict=True)
    missing = [source.name(place) for place, size in places if size < 0]
    if missing:
        is_expanded = missing[0].startswith(("~", "$"))
        hint = "names stand for themselves in a list, without ~ and $NAME; " if is_expanded else ""
        raise ConfigError(
            f"--input {source.text}: {len(missing)} of {len(sizes)} files do not exist "
            f"({some(missing, _NAMES_SHOWN)}); {hint}bring them or leave their names out, and run "
            "the same command again."
        )


def edited_images(
    output: Path, begun: EncodingSettings, source: ImageSource, sizes: list[int]
) -> list[str]:
    """Name images of finished shards whose files have other sizes than when encoding began.

    Args:
        output: holds the shards.
        begun: its settings.
        source: the same images by their names.
        sizes: what `source.sizes()` returns.
    """
    places = source.edited(begun.sizes, sizes)
    if not places:
        return []
    missing = EncodingOutput(output, begun).missing
    shard_of = np.empty(begun.num_files, np.int64)
    order = permutation(begun.num_files, begun.seed, SPLIT)
    shard_of[order] = np.arange(begun.num_files) // begun.shard_size
    return [source.name(place) for place in places if int(shard_of[place]) not in missing]


def edited_sentence(names: list[str]) -> str:
    """Say that the latents of these images are of what they were before."""
    return (
        f"images edited since they were encoded, by the sizes of their files: {len(names)} "
        f"({some(names, _NAMES_SHOWN)}); the shards hold the old pictures, for the new ones encode "
        "into a new --output"
    )


def finished_before(begun: EncodingSettings, source: ImageSource) -> str:
    """Say that there was nothing to do, and what was compared."""
    compared = (
        f"the sizes of {len(begun.sizes)} of its {count_of(len(source), 'image')} were compared"
    )
    return f"finished before: nothing was encoded, {compared}"
