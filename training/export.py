"""Write a run's model in a format that other programs load.

    python training/export.py runs/demo

    safetensors    one file of weights under this program's names, and its configuration
    diffusers      a pipeline for diffusers with trust_remote_code=True; draws sample.py's images
    merged         the same, with the experts merged for the timesteps of one sampler
    torch-export   the denoiser as a program of torch.export

It needs one process and no GPU, whatever the run was trained on.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from safetensors import SafetensorError

from data_tools.errors import ArgumentParser, ConfigError, exit_on_config_error
from data_tools.process.entry_point import enter
from data_tools.user_files.paths import typed_path
from training.checkpoints.weight_files import describe_disk_error
from training.config.old_flags import OLD_FORMATS
from training.exports.card import model_card
from training.exports.job import (
    EXPORT,
    EXPORT_FILE,
    EXPORTS_DIR,
    ExportJob,
    check_job,
    check_output,
)
from training.exports.pipeline_folder import (
    check_merged,
    write_merged_pipeline,
    write_pipeline,
    write_safetensors,
)
from training.exports.torch_program import write_program
from training.sampling.flags import add_sampling_flags, add_vae_flag, add_weight_flags

README_FILE = "README.md"


class ExportFormat(NamedTuple):
    """What --format names."""

    check: Callable[[ExportJob], None] | None  # refuse what it cannot express exactly
    write: Callable[[ExportJob, Path], str]  # into an empty folder; returns how it is used
    is_pipeline: bool  # holds a VAE, and draws images by itself


FORMATS = {
    "safetensors": ExportFormat(None, write_safetensors, False),
    "diffusers": ExportFormat(None, write_pipeline, True),
    "merged": ExportFormat(check_merged, write_merged_pipeline, True),
    "torch-export": ExportFormat(None, write_program, False),
}


def build_parser() -> ArgumentParser:
    """Build the command line."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--format", type=_format, choices=FORMATS, default="diffusers", help="default: diffusers")
    add("--output", type=typed_path, metavar="FOLDER", help=f"default: RUN/{EXPORTS_DIR}/NAME")
    add("--force", action="store_true", help="replace an export that is there")
    add_weight_flags(parser)
    add_vae_flag(parser)
    add_sampling_flags(parser)
    return parser


def _format(name: str) -> str:
    if name in OLD_FORMATS:
        raise ConfigError(f"--format {name}: {OLD_FORMATS[name]}.")
    return name


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that say how images are drawn, where the format draws none.

    Raises:
        ConfigError: naming the first of them.
    """
    if args.seed != 0:
        raise ConfigError("--seed: an export has none; drop the flag, its callers give one.")
    if FORMATS[args.format].is_pipeline:
        return
    parser = ArgumentParser()
    add_sampling_flags(parser)
    for name, default in vars(parser.parse_args([])).items():
        if getattr(args, name) != default:
            raise ConfigError(
                f"--{name.replace('_', '-')}: --format {args.format} draws no images; drop the "
                "flag, or choose diffusers or merged."
            )


def export(args: argparse.Namespace, job: ExportJob) -> Path:
    """Write the export beside its place and move it there when it is whole."""
    temporary = job.output.with_name(f".{job.output.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        usage = FORMATS[args.format].write(job, temporary)
        about = {"format": args.format, "weights": asdict(job.origin)}
        (temporary / EXPORT_FILE).write_text(EXPORT.dumps(about) + "\n", encoding="utf-8")
        card = model_card(job, args.format, usage)
        (temporary / README_FILE).write_text(card, encoding="utf-8")
        check_output(job.output, args.force)  # again: it took a while
        old = temporary.with_suffix(".old")
        if job.output.exists():
            os.replace(job.output, old)
        os.replace(temporary, job.output)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as err:
        raise ConfigError(
            f"--output {job.output}: {describe_disk_error(err)}; free some space or choose another."
        ) from err
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return job.output


def main(argv: list[str] | None = None) -> None:
    """Export what the command line asks for."""
    with exit_on_config_error():
        args = build_parser().parse_args(argv)
        check_flags(args)
        job = check_job(args, FORMATS[args.format].is_pipeline)
        check = FORMATS[args.format].check
        if check is not None:
            check(job)
        folder = export(args, job)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(
        f"{folder}: {args.format}, {job.origin.weights} of {job.origin.run}, {size / 2**20:.1f} MiB"
    )


if __name__ == "__main__":
    enter(main)
