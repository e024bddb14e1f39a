"""The share of a step that is communication: the arithmetic, what is recorded, what it leaves."""

import random
import time
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from tests.support.events import scalars_in_tensorboard
from tests.support.ranks import run_ranks
from tests.support.synthetic import make_dataset, random_moments
from training import run_parts
from training.checked_job import check
from training.config.command_line import parse_command_line
from training.main import train_job
from training.monitoring import communication
from training.monitoring.communication import (
    CommunicationWatch,
    Shares,
    shares,
    shares_of,
    union_length,
)
from training.monitoring.event_files import Monitor, read_metrics
from training.ranks.process_group import Ranks

CPU = torch.device("cpu")
STEPS, FIRST = 3, 2
TAGS = ("comm/share_pct", "comm/exposed_pct")


class Recorded(NamedTuple):
    """An event as torch's profiler presents them."""

    kind: str
    label: str
    thread: int
    start: int
    end: int

    def activity_type(self):
        return self.kind

    def name(self):
        return self.label

    def start_thread_id(self):
        return self.thread

    def start_ns(self):
        return self.start

    def end_ns(self):
        return self.end


def slow_shares(step, communication, computation):
    """Ask of every single moment what went on."""

    def is_in(moment, intervals):
        return any(start <= moment < end for start, end in intervals)

    moments = range(*step)
    busy = [m for m in moments if is_in(m, communication)]
    exposed = [m for m in busy if not is_in(m, computation)]
    return Shares(100.0 * len(busy) / len(moments), 100.0 * len(exposed) / len(moments))


def test_shares_are_those_of_asking_every_moment():
    draw = random.Random(0)

    def intervals():
        starts = [draw.randrange(-10, 110) for _ in range(draw.randrange(8))]
        return [(start, start + draw.randrange(30)) for start in starts]

    for _ in range(300):
        step, sent, computed = (0, draw.randrange(1, 100)), intervals(), intervals()
        assert shares(step, sent, computed) == pytest.approx(slow_shares(step, sent, computed))


def test_the_length_of_a_union_counts_every_moment_once():
    parts = [(1, 3), (5, 12), (20, 25)]

    found = union_length([(5, 9), (0, 2), (1, 3), (9, 12), (20, 30)], (1, 25))

    assert found == sum(end - start for start, end in parts)


def test_on_a_gpu_nccl_kernels_are_hidden_by_what_else_the_device_does():
    events = [
        Recorded("user_annotation", communication.STEP_NAME, 1, 0, 1000),
        Recorded("gpu_user_annotation", communication.STEP_NAME, 7, 10, 900),
        Recorded("cpu_op", "aten::mm", 1, 0, 1000),  # of the host: only launches
        Recorded("cuda_runtime", "cudaLaunchKernel", 1, 0, 1000),
        Recorded("kernel", "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernel)", 20, 100, 500),
        Recorded("gpu_user_annotation", "nccl:all_reduce", 20, 100, 990),
        Recorded("kernel", "void cutlass::Kernel2<...>", 7, 200, 300),
        Recorded("gpu_memcpy", "Memcpy DtoD", 7, 450, 600),
    ]

    assert shares_of(events, is_on_gpu=True) == pytest.approx((40.0, 25.0))


def test_on_a_cpu_operators_of_the_training_thread_hide_gloos_collectives():
    events = [
        Recorded("cpu_op", "aten::mm", 1, 0, 100),
        Recorded("user_annotation", communication.STEP_NAME, 1, 100, 1100),
        Recorded("cpu_op", "c10d::allgather_base_", 1, 200, 300),
        Recorded("cpu_op", "aten::clone", 1, 210, 290),  # for the collective
        Recorded("user_annotation", "gloo:all_gather", 1, 250, 600),
        Recorded("cpu_op", "aten::copy_", 2, 500, 590),  # in gloo's thread
        Recorded("cpu_op", "autograd::engine::evaluate_function: MmBackward0", 1, 200, 700),
        Recorded("cpu_op", "aten::mm", 1, 350, 450),
        Recorded("cpu_op", "aten::add", 1, 550, 700),
    ]

    assert shares_of(events, is_on_gpu=False) == pytest.approx((40.0, 25.0))


def test_a_gpu_that_another_tool_watches_gives_no_share():
    events = [Recorded("user_annotation", communication.STEP_NAME, 1, 0, 1000)]

    assert shares_of(events, is_on_gpu=True) is None


def test_events_of_an_older_torch_that_name_no_kind_give_no_share():
    event = SimpleNamespace(
        name=lambda: communication.STEP_NAME,
        start_ns=lambda: 0,
        end_ns=lambda: 1000,
        start_thread_id=lambda: 1,
    )

    assert shares_of([event], is_on_gpu=True) is None
    assert shares_of([event], is_on_gpu=False) is None


def collectives(rank, world_size, folder):
    """Steps of 100 ms and more: rank 0 waits, then computes beside a collective."""
    monitor = Monitor(folder if rank == 0 else None)
    watch = CommunicationWatch(monitor, CPU, 1, is_wanted=rank == 0, first=1)
    communication.MAX_COST = 1e9
    vector, matrix = torch.ones(1000), torch.ones(400, 400)

    def compute(seconds):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            matrix @ matrix

    def wait():
        time.sleep(0.2 * rank)
        dist.all_reduce(vector)

    def wait_and_compute():
        dist.barrier()
        time.sleep(0.2 * rank)
        work = dist.all_reduce(vector, async_op=True)
        compute(0.2 * (1 - rank))
        work.wait()

    def scatter():
        dist.reduce_scatter_tensor(torch.empty(500), vector)  # gloo's copies are no computation
        time.sleep(0.2 * rank)
        dist.all_gather_into_tensor(torch.empty(2000), vector)
        compute(0.001)

    for number, work in enumerate((wait, wait_and_compute, scatter), 1):
        dist.barrier()
        with watch.step(number):
            work()
            matrix.sum()
    monitor.close()


def train_three_times(rank, world_size, folder):
    """Look at a step, at none, and at one that another profiler looks at already."""
    ranks = Ranks(rank, world_size, rank)
    for name, first in (("watched", FIRST), ("unwatched", STEPS + 1), ("profiled", FIRST)):
        run_parts.CommunicationWatch = partial(CommunicationWatch, first=first)
        argv = ["--data", folder / "data", "--run-dir", folder / name, "--size", "demo"]
        argv += ["--deepspeed", "ds_configs/zero2.json", "--global-batch-size", 4]
        argv += ["--max-steps", STEPS, "--log-every", 1, "--save-every", STEPS]
        argv += ["--sample-every", 0, "--latent-size", 4, "--num-classes", 3]
        job = check(parse_command_line([str(part) for part in argv]), ranks)
        if name == "profiled":
            with profile(activities=[ProfilerActivity.CPU]) as other:
                train_job(job, ranks, CPU, is_quiet=True)
            assert any(event.name == "gloo:all_reduce" for event in other.events())
        else:
            train_job(job, ranks, CPU, is_quiet=True)


def on_ranks(rank, world_size, folder):
    """Everything that takes ranks, in one start of them."""
    train_three_times(rank, world_size, folder)
    collectives(rank, world_size, folder / "collectives")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What `on_ranks` leaves."""
    folder = tmp_path_factory.mktemp("communication")
    (folder / "collectives").mkdir()
    make_dataset(folder / "data", [8, 8], moments=random_moments((8, 4, 4)))
    run_ranks(on_ranks, 2, folder)
    return folder


@pytest.mark.processes
def test_waiting_for_a_slower_rank_is_exposed_unless_something_is_computed(folder):
    found = scalars_in_tensorboard(folder / "collectives")
    (_, waited), (_, overlapped), (_, scattered) = found["comm/share_pct"]
    (_, waited_exposed), (_, overlapped_exposed), (_, scattered_exposed) = found[TAGS[1]]
    assert 50 < waited <= 100
    assert 50 < waited_exposed <= waited
    assert 50 < overlapped <= 100
    assert overlapped_exposed < overlapped / 2
    assert 50 < scattered_exposed <= scattered <= 100


@pytest.mark.processes
def test_looking_at_a_step_changes_no_number_and_leaves_other_profilers_alone(folder):
    def losses(name):
        records = read_metrics(folder / name)
        return [(r["step"], r["loss/total"], r["optim/grad_norm"]) for r in records]

    assert len(losses("watched")) == STEPS
    assert losses("watched") == losses("unwatched") == losses("profiled")
    found = scalars_in_tensorboard(folder / "watched")
    ((step, share),) = found["comm/share_pct"]
    ((_, exposed),) = found["comm/exposed_pct"]
    assert step == FIRST
    assert 0 < exposed <= share < 100
    for name in ("unwatched", "profiled"):
        assert not set(TAGS) & set(scalars_in_tensorboard(folder / name))


@pytest.mark.parametrize(("max_cost", "expected"), [(1e9, [10, 30, 50]), (0.0, [10])])
def test_looks_are_rare_and_rarer_where_they_cost_too_much(
    max_cost, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr(communication, "MAX_COST", max_cost)
    monitor, x = Monitor(tmp_path), torch.ones(2)
    watch = CommunicationWatch(monitor, CPU, every=20, is_wanted=True)

    for number in range(1, 61):
        with watch.step(number):
            x + x
    monitor.close()

    found = scalars_in_tensorboard(tmp_path)["comm/share_pct"]
    assert found == [(step, 0.0) for step in expected]
