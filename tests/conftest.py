"""Fixtures that several test files share."""

import os

import pytest
import torch

from tests.launch import run

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read by DeepSpeed when a test imports it


@pytest.fixture(scope="session", autouse=True)
def node_cache(tmp_path_factory):
    """A cache folder of this test session, for the processes it starts too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWITCH_DIT_CACHE", str(tmp_path_factory.mktemp("node-cache")))
        yield


@pytest.fixture(scope="session")
def demo_images(tmp_path_factory):
    """A small class-per-folder tree: ten classes of eight pictures, 64x64."""
    folder = tmp_path_factory.mktemp("images") / "demo"
    run(
        *("python", "data_tools/make_demo_images.py", "--output", folder),
        *("--size", 64, "--per-class", 8),
    )
    return folder


@pytest.fixture(scope="session")
def demo_latents(tmp_path_factory, demo_images):
    """The small tree encoded with the demo VAE, mirrored moments included, several shards."""
    folder = tmp_path_factory.mktemp("latents") / "demo"
    run(
        *("python", "data_tools/encode_latents.py", "--input", demo_images, "--output", folder),
        *("--vae", "data_tools/demo_vae", "--size", 64, "--shard-size", 16),
    )
    return folder


@pytest.fixture
def single_process_group(tmp_path):
    """A gloo group of this process alone, for code that announces collectives."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()
