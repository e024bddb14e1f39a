"""Section `data` of the configuration: where samples come from and in which order."""

from dataclasses import dataclass

from data_tools.stream.shard_store import CHECKS
from data_tools.user_files.paths import expand, expand_data
from training.config.option import option


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The encoded images and what is drawn at random from them."""

    data: str = option(
        "encoded latents: a folder, http(s), s3 or gs address with a dataset.json; a,b or {a,b} = "
        "a union; a=3,b=1 = a mixture by weight; pipe:COMMAND {} takes the rest",
        may_change=True,
        expands=expand_data,
    )
    data_shards: str | None = option(
        "where the tars lie, one place for each of --data; null = beside its dataset.json",
        None,
        may_change=True,
        expands=expand_data,
    )
    data_cache: str | None = option(
        "folder of this node for shards that are fetched; null = $SWITCH_DIT_CACHE, or one in the "
        "system's temporary folder",
        None,
        may_change=True,
        expands=expand,
    )
    data_cache_gib: float | None = option(
        "largest size of that folder; null = no limit", None, bounds=">0", may_change=True
    )
    check_shards: str = option(
        "of local shards, once per node before they are used; what is fetched is always checked in "
        "full",
        "sha256",
        choices=CHECKS,
        may_change=True,
    )
    data_streams: int = option(
        "equal parts of the data, one for each chunk of the global batch: a node needs only those "
        "of its ranks; 1 = all ranks read everything",
        1,
        bounds=">=1",
    )
    shuffle_window: int = option("shards that samples are shuffled across", 16, bounds=">=1")
    horizontal_flip: bool = option("mirror half of the samples", True)
    class_dropout_prob: float = option(
        "chance that a label becomes the null class, for guidance", 0.1, bounds=">=0 <=1"
    )
