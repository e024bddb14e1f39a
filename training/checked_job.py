"""Check a training command: all that can be known before a process group exists."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.encode_latents import prepare_demo
from data_tools.encoding.output import DEMO_LATENTS
from data_tools.shards.manifest import MANIFEST_NAME, DatasetManifest
from data_tools.storage.cache import ShardCache, open_cache
from data_tools.stream.training_data import TrainingData, open_data
from data_tools.vae.autoencoder import Vae, load_decoder
from training.checkpoints.manifest import PARAMETER_ORDER, CheckpointManifest, Layout
from training.checkpoints.resume_point import check_resumable, newest_point
from training.checkpoints.warm_start import WarmStart
from training.config.command_line import CommandLine
from training.config.deepspeed_config import merge_deepspeed, stage_of
from training.config.learning_rate import check_past
from training.config.precision import precision_of
from training.config.tree import Config
from training.config.validation import check_data, validate
from training.cost.closed_forms import checkpoint_bytes, snapshot_bytes
from training.ranks.process_group import Ranks
from training.run.directory import check_free_space, check_run_directory, load_config
from training.run.init_from import check_initial_weights, check_is_elsewhere, with_own_origin


@dataclass(frozen=True)
class Job:
    """What training needs, from plain values and files."""

    config: Config
    deepspeed_config: dict[str, Any]
    data: TrainingData
    cache: ShardCache | None  # of this node; None in a dry run
    layout: Layout
    warm_start: WarmStart | None  # of a run that begins with another model's weights
    vae: Vae | None  # on rank 0, if grids of samples are wanted
    notes: tuple[str, ...] = ()  # what should be said of the command

    @property
    def manifest(self) -> DatasetManifest:
        """What all of the data is, as one."""
        return self.data.manifest

    def check_resumable(self, saved: CheckpointManifest) -> None:
        """Refuse a checkpoint of another precision, sample order or data set."""
        check_resumable(saved, self.layout, self.manifest.hash)


class Prepared(NamedTuple):
    """What is known of a checked command before its data is looked at."""

    config: Config  # with the source of its first weights, if it goes on
    notes: tuple[str, ...]  # what should be said of the command
    deepspeed_config: dict[str, Any]
    warm_start: WarmStart | None


def check_without_data(command: CommandLine, ranks: Ranks) -> Prepared:
    """Check everything that needs no data set, which may not exist yet; write nothing.

    Raises:
        ConfigError: for the first mistake found.
    """
    config, note = with_own_origin(command.config)
    run_dir = Path(config.run.run_dir)
    deepspeed_config = merge_deepspeed(command.deepspeed, config, ranks.world_size)
    validate(config, command.deepspeed, ranks.world_size)
    check_is_elsewhere(config)
    check_run_directory(run_dir, config)
    check_free_space(run_dir, checkpoint_bytes(config), snapshot_bytes(config))
    notes = (*command.notes, note) if note else command.notes
    return Prepared(config, notes, deepspeed_config, check_initial_weights(config))


def check(command: CommandLine, ranks: Ranks) -> Job:
    """Check everything that can be checked before a process group exists; write nothing.

    The folder of the node's cache is made all the same, unless the run is a dry one.

    Raises:
        ConfigError: for the first mistake found.
    """
    config, notes, deepspeed_config, warm_start = check_without_data(command, ranks)
    warn = _warn if ranks.is_main else lambda text: None
    data = open_data(config.data.data, config.data.data_shards, on_failure=warn)
    manifest = data.manifest
    check_data(config, manifest)
    num_classes, held = config.model.num_classes, manifest.num_classes
    if num_classes > held:
        warn(
            f"--num-classes {num_classes} is more than the {held} of --data {config.data.data}; "
            f"classes from number {held} on are never trained."
        )
    data.check_streams(config.data.data_streams)
    cache = None
    if not command.dry_run:
        cache = open_cache(config.data.data_cache, config.data.data_cache_gib)
    layout = Layout(
        ranks.world_size,
        config.run.expert_parallel_size,
        stage_of(deepspeed_config),
        precision_of(deepspeed_config),
        PARAMETER_ORDER,
    )
    vae = None
    if config.run.sample_every and ranks.is_main and not command.dry_run:
        vae = load_decoder(config.run.vae, manifest.vae)
    job = Job(config, deepspeed_config, data, cache, layout, warm_start, vae, notes)
    if (point := newest_point(Path(config.run.run_dir))) is not None:
        job.check_resumable(point.manifest)
        if not command.reschedule:
            check_past(load_config(Path(config.run.run_dir)), config, point.manifest.state.step)
    return job


def is_demo_missing(config: Config) -> bool:
    """Tell whether the configuration wants the demo data set and nobody has made it yet."""
    is_demo = Path(config.data.data).resolve() == DEMO_LATENTS.resolve()
    return is_demo and not (DEMO_LATENTS / MANIFEST_NAME).exists()


def prepare_demo_if_missing(command: CommandLine, ranks: Ranks) -> None:
    """Make the demo data set if this command needs it and would otherwise be right."""
    if not is_demo_missing(command.config):
        return
    check_without_data(command, ranks)
    is_silent = command.quiet or not ranks.is_main
    if not is_silent:
        sys.stdout.write(f"{command.config.data.data} is missing: preparing the demo data set.\n")
        sys.stdout.flush()
    prepare_demo(quiet=is_silent)


def _warn(text: str) -> None:
    sys.stderr.write(f"warning: {text}\n")
