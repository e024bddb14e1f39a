"""Run one encoding command: alone, or beside others that write into the same output folder."""

import argparse
import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import torch

from data_tools.encoding.claims import Claims
from data_tools.encoding.encoder import ShardEncoder
from data_tools.encoding.input_summary import (
    check_files_exist,
    edited_images,
    refuse_mostly_empty,
    summary,
)
from data_tools.encoding.output import CLAIMS_NAME, INDEXES_NAME, EncodingOutput, claim_name
from data_tools.encoding.progress import EncodingProgress, duration
from data_tools.encoding.settings import (
    POLL_SEC,
    PRECISIONS,
    EncodingSettings,
    as_begun,
    begun_settings,
    disk_errors_as_config_errors,
    load_settings,
    make_settings,
    settle,
)
from data_tools.encoding.trial import (
    TRIAL_IMAGES,
    check_any_image,
    check_precision,
    choose_batch_size,
    first_images,
    timed_trial,
)
from data_tools.errors import ConfigError, count_of, one_line
from data_tools.process.accelerator import has_gpu
from data_tools.process.launcher import BY_TORCH, read_place_on_node
from data_tools.shards.manifest import MANIFEST_NAME, Manifest
from data_tools.sources.inputs import open_source, read_class_names
from data_tools.vae.autoencoder import load_vae, resolve_device, with_dtype

MAX_THREADS = 16
PRESETS_PATCH = 2  # side of the patches of all of training's presets, in latent pixels


def local_processes() -> int:
    """Return how many processes a launcher says it started on this machine."""
    place = read_place_on_node()
    # srun and mpirun bind each process to cores of its own, which are not to be shared again.
    return place.local_size or 1 if place.launcher in ("", BY_TORCH) else 1


def choose_device(name: str | None) -> torch.device:
    """Return the named device; without a name this process's own GPU, or the CPU."""
    if name is None and has_gpu():
        return torch.device("cuda", read_place_on_node().local_rank % torch.cuda.device_count())
    return resolve_device(name)


def choose_threads(asked: int | None) -> int:
    """Return how many threads decode: those asked for, or the cores of this process."""
    cores = len(os.sched_getaffinity(0)) // local_processes()
    return asked or max(1, min(MAX_THREADS, cores))


class EncodingRun:
    """One command: its images, VAE and settings, of which the batch size may still be open."""

    def __init__(self, args: argparse.Namespace, is_quiet: bool = False) -> None:
        """Check everything that can be checked before a shard is written.

        Args:
            args: what parse_arguments of encode_latents.py returns, --input and --vae filled in.
            is_quiet: print nothing.
        """
        self.output, self.is_strict, self.is_quiet = args.output, args.strict, is_quiet
        # A finished set stays as it is.
        keeps_indexes = not args.dry_run and not (args.output / MANIFEST_NAME).exists()
        with disk_errors_as_config_errors(args.output):
            cache = args.output / INDEXES_NAME if keeps_indexes else None
            source = open_source(*args.input, cache=cache, reading=args.reading)
            self.source = as_begun(args.output, source)
        classes = self.source.classes
        self.class_names = read_class_names(args.class_names, classes) if args.class_names else {}
        self.exact = load_vae(args.vae, device=choose_device(args.device))
        self.num_threads = choose_threads(args.workers)
        self._encoder: ShardEncoder | None = None
        self.busy_share = 0.0  # of the time spent encoding, that of the VAE's computing
        self.settings = make_settings(self.source, self.exact, args)
        with disk_errors_as_config_errors(args.output):
            self.begun = begun_settings(args.output, self.settings, self.source)
        sizes, self.edited = self.settings.sizes, []
        if self.begun is not None:
            self.edited = edited_images(args.output, self.begun, self.source, sizes)
            return
        check_files_exist(self.source, sizes)
        # Names for all of them show that they are meant.
        if not (args.allow_empty_classes or self.class_names):
            refuse_mostly_empty(self.source)

    def say(self, text: str) -> None:
        """Print a line, where anybody wants to read it; names of files may hold anything."""
        if not self.is_quiet:
            sys.stdout.write(f"{one_line(text)}\n")
            sys.stdout.flush()

    def describe(self) -> None:
        """Say what will be encoded into what."""
        settings, source = self.settings, self.source
        num_bytes = settings.num_files * settings.latent.record_layout.stride
        self.say(
            f"{source.text}: {count_of(len(source), 'image')} in "
            f"{count_of(len(source.classes), 'class')} -> {self.output}: "
            f"{count_of(settings.num_shards, 'shard')}, {num_bytes / 2**20:.0f} MiB, latents "
            f"{settings.latent.shape} of {self.exact.id}"
        )
        side, step = settings.latent.shape[1], self.exact.downsample
        if side % PRESETS_PATCH:
            size = settings.image.size
            self.say(
                f"latents of {side} x {side} cannot be cut into patches of {PRESETS_PATCH}, as "
                f"every preset's network does: encode with --size {size - step} or {size + step}, "
                f"or train with a --patch-size that divides {side}"
            )
        for line in summary(source):
            self.say(line)

    def complete(self, settings: EncodingSettings) -> EncodingSettings:
        """Choose the batch size if it is open, before a data set begins.

        Raises:
            ConfigError: no image can be decoded, or the precision is too low.
        """
        self.encoder(settings)
        if settings.batch_size:
            return settings
        vae = with_dtype(self.exact, PRECISIONS[settings.latent.precision])
        size = choose_batch_size(vae, settings.image.size, local_processes())
        self.say(f"--batch-size auto: {size}")
        return dataclasses.replace(settings, batch_size=size)

    def encoder(self, settings: EncodingSettings) -> ShardEncoder:
        """Return what encodes, with the VAE in the precision asked for, which is checked."""
        if self._encoder is not None:
            self._encoder.settings = settings
            return self._encoder
        encoder = self._encoder = ShardEncoder(
            self.source,
            self.exact,
            settings,
            self.output,
            is_strict=self.is_strict,
            num_threads=self.num_threads,
            on_damage=lambda text: self.say(f"skipped {text}"),
        )
        if self.begun is None:
            check_any_image(self.source, encoder.order, settings.image.size)
        name = settings.latent.precision
        if name != "fp32":
            encoder.vae = with_dtype(self.exact, PRECISIONS[name])
            size = settings.image.size
            pixels = first_images(self.source, encoder.order, size, TRIAL_IMAGES)
            if len(pixels):
                self.say(check_precision(self.exact, encoder.vae, pixels, name))
        return encoder

    def estimate(self) -> None:
        """Say what encoding would take."""
        settings = self.begun or self.complete(self.settings)
        stride = settings.latent.record_layout.stride
        self.say(
            f"{settings.num_files * stride:,} bytes in all, {stride:,} a sample, "
            f"{settings.shard_size * stride:,} a shard of {settings.shard_size}"
        )
        decode_sec, vae_sec = timed_trial(self.encoder(settings))
        per_sec = 1 / max(vae_sec, decode_sec / self.num_threads)
        done = EncodingOutput(self.output, settings).num_images_done if self.begun else 0
        left = settings.num_files - done
        self.say(
            f"{count_of(done, 'image', 'are')} done; about {per_sec:.1f} images/s here (decoding "
            f"{1000 * decode_sec:.1f} ms on each of {self.num_threads} threads, encoding "
            f"{1000 * vae_sec:.1f} ms), {duration(left / per_sec)} for one process"
        )

    def encode(self) -> Manifest:
        """Encode what is missing, together with any other processes; return dataset.json."""
        with disk_errors_as_config_errors(self.output):
            if self.begun is not None:
                folder = EncodingOutput(self.output, self.begun)
                if not folder.missing and (self.output / MANIFEST_NAME).exists():
                    self.say(
                        "finished before: nothing was encoded, the sizes of "
                        f"{len(self.begun.sizes)} of its {count_of(len(self.source), 'image')} "
                        "were compared"
                    )
                    self._drop_indexes()  # of this process, where another one has just finished
                    return folder.write_manifest(self.source, self.class_names)
            self.output.mkdir(parents=True, exist_ok=True)
            with Claims(self.output / CLAIMS_NAME) as claims:
                settings = settle(self.output, self.settings, self.source, self.complete, claims)
                folder = EncodingOutput(self.output, settings)
                folder.remove_leftovers(claims)
                folder.restore_sidecars()
                if folder.missing:
                    self._encode_missing(folder, claims)
                manifest = folder.write_manifest(self.source, self.class_names)
                folder.remove_leftovers(claims)
                self._drop_indexes()
                claims.sweep()
            return manifest

    def _drop_indexes(self) -> None:
        shutil.rmtree(self.output / INDEXES_NAME, ignore_errors=True)

    def _encode_missing(self, folder: EncodingOutput, claims: Claims) -> None:
        """Encode what no other process does, until all is done."""
        encoder = self.encoder(folder.settings)
        encoder.stated = folder.stated_sha256()
        is_waiting = False
        # Closed whatever happens: what is said then is not written into the bar.
        with closing(EncodingProgress(folder, claims, self.is_quiet)) as progress:
            while folder.missing:
                num_taken, indices = 0, _claimed(folder, claims)
                with closing(encoder.encode_all(indices, progress.update)) as sidecars:
                    for sidecar in sidecars:
                        index = int(sidecar.shard.name.removesuffix(".tar"))
                        folder.is_finished(index)
                        claims.release(claim_name(index))
                        num_taken += 1
                folder.refresh()
                if folder.missing and not num_taken:
                    if not is_waiting:
                        num_left = count_of(len(folder.missing), "shard")
                        self.say(f"waiting for other processes: {num_left}")
                        is_waiting = True
                    progress.look_now_and_then()
                    time.sleep(POLL_SEC)
        self.busy_share = encoder.busy_share
        if encoder.wall_sec:
            self.say(
                f"this process encoded for {duration(encoder.wall_sec)}; the VAE was busy "
                f"{100 * encoder.busy_share:.0f} % of that"
            )


def _claimed(folder: EncodingOutput, claims: Claims) -> Iterator[int]:
    """Claim one shard after the other, of those that nobody holds or has finished."""
    for index in list(folder.missing):
        name = claim_name(index)
        if not folder.is_finished(index) and claims.take(name):
            if folder.is_finished(index):  # meanwhile, by another process
                claims.release(name)
            else:
                yield index


def reopen(
    output: Path, inputs: Sequence[str], vae: str | None, device: str | None
) -> ShardEncoder:
    """Return the encoder of a data set that was begun, for writing single shards again.

    Args:
        output: holds encoding.json.
        inputs: the images, the words of --input.
        vae: where its VAE is now; None: where it was.
    """
    settings = load_settings(output)
    if settings is None:
        raise ConfigError(
            f"{output}: has no encoding.json, so how its shards were made is unknown; copy them "
            "again from where they came."
        )
    source = as_begun(output, open_source(*inputs, reading=settings.reading))
    if source.fingerprint() != settings.source:
        raise ConfigError(
            f"--input {source.text}: its {count_of(len(source), 'image', 'are')} not the "
            f"{settings.num_files} that {output} was made of; give those."
        )
    where = choose_device(device)
    found = load_vae(vae or settings.vae.id, device=where, expected_sha256=settings.vae.sha256)
    if settings.latent.precision != "fp32":
        found = with_dtype(found, PRECISIONS[settings.latent.precision])
    return ShardEncoder(source, found, settings, output, num_threads=choose_threads(None))
