"""Fixtures that several test files share."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter

import pytest
import torch

from tests.support.launch import REPOSITORY, TIMEOUT_SEC, environment, run
from training.config.precision import BF16_VARIABLE

# No test depends on what this machine multiplies: "auto" means fp32 where a test says nothing else.
# `make test-precision` runs those marked so with each answer.
os.environ.setdefault(BF16_VARIABLE, "0")


def pytest_configure(config):
    """Hide this machine's GPUs, unless the tests for one are asked for (`pytest -m gpu`).

    Tests start several ranks on any machine, and fork them, after which CUDA cannot be used.
    """
    if not re.search(r"(?<!not )\bgpu\b", config.getoption("markexpr")):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["DS_ACCELERATOR"] = "cpu"  # read by DeepSpeed when a test imports it
    elif not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


LEFT_OUT_OF_FAST = ("processes", "gpu", "cluster", "long")  # by make test-fast
STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn"}
_starts = Counter()  # of processes, from now on, by what Python calls them
_starting_fixtures = set()  # by file and name: those of two files may have one name
sys.addaudithook(lambda event, _: _starts.update([event]) if event in STARTS else None)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef):
    before = _starts.total()
    result = yield
    if _starts.total() > before:
        _starting_fixtures.add((fixturedef.baseid, fixturedef.argname))
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = _starts.total()
    result = yield
    known = item._fixtureinfo.name2fixturedefs
    used = {(d.baseid, d.argname) for name in item.fixturenames for d in known.get(name, ())}
    is_starting = _starts.total() > before or _starting_fixtures & used
    if is_starting and not any(map(item.get_closest_marker, LEFT_OUT_OF_FAST)):
        pytest.fail("starts a process; mark it with @pytest.mark.processes (for make test-fast)")
    return result


@pytest.fixture(scope="session", autouse=True)
def session_folders(tmp_path_factory):
    """Folders of this test session, for the processes it starts too: a cache, torchrun's logs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWITCH_DIT_CACHE", str(tmp_path_factory.mktemp("node-cache")))
        # By default it makes one in the system's temporary folder at every start, and leaves it.
        patch.setenv("PET_LOG_DIR", str(tmp_path_factory.mktemp("torchrun")))
        yield


@pytest.fixture(autouse=True)
def environment_put_back():
    """No test sees what another one, or a library that it called, wrote into the environment.

    DeepSpeed writes RANK, WORLD_SIZE and MASTER_PORT, and the next test would be taken for a rank.
    """
    before = dict(os.environ)
    yield
    if dict(os.environ) != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def train_forked(tmp_path_factory):
    """A function that trains without the start of a launcher and returns what the ranks say.

    Its arguments are those of training/main.py, the number of ranks, the exit code to expect, the
    largest file that the ranks may write, where what they say goes instead, and environment
    variables of theirs.
    """
    server = subprocess.Popen(
        [sys.executable, "tests/support/forked_jobs.py"],
        cwd=REPOSITORY,
        env=environment(DS_ACCELERATOR="cpu"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

    def train(*argv, num_ranks=2, expect=0, file_kib=None, said_to=None, **env):
        output = said_to or tmp_path_factory.mktemp("said") / "output"
        job = {"num_ranks": num_ranks, "argv": [str(part) for part in argv]}
        job |= {"output": str(output), "file_kib": file_kib, "env": env}
        timer = threading.Timer(TIMEOUT_SEC, os.killpg, (server.pid, signal.SIGKILL))
        timer.start()
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        timer.cancel()
        said = output.read_text() if said_to is None and output.exists() else ""
        assert answer == f"{expect}\n", f"exit {answer or 'after a timeout'}:\n{said}"
        return said

    yield train
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.communicate()


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


@pytest.fixture(scope="module")
def one_thread():
    """As the processes that tests start: the order of additions depends on the threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def single_process_group(tmp_path):
    """A gloo group of this process alone, for code that announces collectives."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()
