"""What is said of ranks that do not move, and what a failure is called."""

import threading
import time

import pytest
import torch

from data_tools.errors import ConfigError
from tests.support.launch import wait_until
from tests.support.ranks import run_ranks
from training.ranks.agreement import RunError
from training.ranks.diagnosis import (
    RankStatus,
    describe_failure,
    describe_lost,
    describe_standstill,
    name_ranks,
)
from training.ranks.heartbeat import (
    FORWARD,
    PHASES,
    READING,
    SAMPLING,
    SAVING,
    STARTING,
    Beat,
    Heartbeat,
)
from training.ranks.process_group import Ranks
from training.ranks.watchdog import Watchdog

REDUCE = "all_reduce of 2 int32"


def beat(phase="in the forward pass", step=12, stuck_sec=60.0, waits_in="", detail=""):
    return Beat(1, phase, step, stuck_sec, waits_in, detail)


def waiting(stuck_sec=60.0, **others):
    return RankStatus(beat("between two steps", stuck_sec=stuck_sec, waits_in=REDUCE, **others))


def test_slow_data_is_not_a_hung_collective():
    seen = dict.fromkeys(range(8), waiting(62.0))
    seen[3] = RankStatus(beat("reading data", stuck_sec=61.0, detail="s3://bucket/00007.tar"))

    found = describe_standstill(seen)

    assert found.text == (
        "rank 3: reading data, step 12, for 61 s (s3://bucket/00007.tar); ranks 0-2, 4-7: waiting "
        "in all_reduce of 2 int32, between two steps, step 12, for 62 s"
    )
    assert (found.since_sec, found.warn_after, found.end_after) == (61.0, 0.2, READING.end_after)


def test_a_rank_that_is_silent_gets_no_more_time_than_a_collective():
    seen = {0: waiting(), 1: RankStatus(beat("reading data"), 9.0), 2: RankStatus(None, 9.0)}

    found = describe_standstill(seen)

    assert found.text.startswith(
        "rank 1: last heard of 9 s ago, reading data, step 12; rank 2: never heard of; rank 0: wait"
    )
    assert found.end_after == STARTING.end_after, "rank 2 may be starting"
    assert describe_standstill({0: waiting(), 1: seen[1]}).end_after == 1.0
    assert describe_standstill({1: seen[1]}) is None, "nobody is there to see it"


@pytest.mark.parametrize("phase", [STARTING, SAMPLING, SAVING])
def test_a_phase_of_many_short_collectives_is_not_one_long_one(phase):
    """Whenever it is looked at, all ranks may be in one of them."""
    seen = dict.fromkeys(
        range(4), RankStatus(beat(phase.text, stuck_sec=400.0, waits_in="new_group"))
    )

    assert describe_standstill(seen).end_after == phase.end_after == 6.0


def test_the_job_stands_still_since_the_rank_that_moved_last_did():
    seen = {0: waiting(300.0), 1: RankStatus(beat("reading data", stuck_sec=4.0))}

    assert describe_standstill(seen).since_sec == 4.0


def test_ranks_in_other_collectives_are_a_mistake_of_the_program():
    other = RankStatus(beat(waits_in="barrier"))

    assert "do not agree" in describe_standstill({0: waiting(), 1: other}).advice
    assert "network" in describe_standstill({0: waiting(), 1: waiting()}).advice


def test_lost_ranks_are_named_with_their_last_place():
    seen = {0: waiting(5.0), 1: RankStatus(beat(step=11), 6.0), 2: waiting(5.0)}

    assert describe_lost(seen, [1], "Connection reset by peer") == (
        "lost rank 1, dead or hanging: rank 1: last heard of 6 s ago, in the forward pass, step "
        "11; ranks 0, 2: waiting in all_reduce of 2 int32, between two steps, step 12, for 5 s "
        "(Connection reset by peer); look at its node and the output above, and run the same "
        "command again: it continues from the last checkpoint."
    )


def test_ranks_are_named_in_runs():
    assert name_ranks([3]) == "rank 3"
    assert name_ranks([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"


def test_failures_are_sorted_by_what_a_person_can_do():
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 60)
    memory = describe_failure(found.value)
    assert memory.is_cause and memory.text.startswith("out of memory (tried to allocate 46116860")
    of_cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has")
    assert describe_failure(of_cuda).text == "out of memory (tried to allocate 20.00 MiB)"
    assert describe_failure(MemoryError()).text == "out of memory"
    assert not describe_failure(torch.distributed.DistBackendError("NCCL error")).is_cause
    assert describe_failure(ConfigError("--data x: is gone; look.")).exit_code == 2
    mistake = describe_failure(KeyError("a"))
    assert mistake.text == "KeyError: 'a'" and mistake.trace and mistake.exit_code == 1


def test_a_heartbeat_explains_itself_only_when_asked():
    heartbeat = Heartbeat(torch.device("cpu"))
    heartbeat.explain(READING, lambda: "00001.tar")
    heartbeat.enter(READING, 7)

    plain, asked = heartbeat.beat(False), heartbeat.beat(True)

    assert (plain.phase, plain.step, plain.detail) == ("reading data", 7, "")
    assert asked.detail == "00001.tar" and asked.number == plain.number + 1
    assert PHASES[asked.phase] is READING


def test_a_first_step_may_take_as_long_as_a_start():
    heartbeat = Heartbeat(torch.device("cpu"))
    heartbeat.begin(5)

    heartbeat.enter(FORWARD, 5)
    assert PHASES[heartbeat.beat(False).phase].end_after == STARTING.end_after
    heartbeat.enter(FORWARD, 6)
    assert PHASES[heartbeat.beat(False).phase].end_after == 1.0


def test_a_host_that_waits_for_its_gpu_says_so():
    heartbeat = Heartbeat(torch.device("cuda"))
    heartbeat.enter(FORWARD, 1)
    assert heartbeat.beat(True).waits_in == "its GPU"
    heartbeat.enter(READING, 1)
    assert heartbeat.beat(True).waits_in == ""


def look_at_a_collective(rank, world_size):
    heartbeat = Heartbeat(torch.device("cpu"))
    found = []

    def look():
        time.sleep(1.0)
        found.append(heartbeat.beat(True).waits_in)
        if rank == 0:
            torch.distributed.distributed_c10d._get_default_store().set("looked", "")

    thread = threading.Thread(target=look)
    thread.start()
    if rank == 1:
        torch.distributed.distributed_c10d._get_default_store().wait(["looked"])
    torch.distributed.all_reduce(torch.ones(3, dtype=torch.bfloat16))
    thread.join()
    if rank == 0:
        assert found == ["all_reduce of 3 bfloat16"], found


@pytest.mark.processes
def test_the_stack_says_in_which_collective_a_rank_waits():
    run_ranks(look_at_a_collective, 2)


@pytest.mark.parametrize("error", [RunError("x"), SystemExit(3), KeyboardInterrupt()])
def test_what_all_ranks_raise_alike_passes(single_process_group, error):
    with pytest.raises(type(error)), Watchdog(Ranks(0, 1, 0), torch.device("cpu")):
        raise error


def test_nobody_watches_what_was_not_entered():
    with (
        pytest.raises(KeyError),
        Watchdog(Ranks(0, 1, 0), torch.device("cpu")).reporting(),
    ):
        raise KeyError


class Stuck:
    """A stream, or the log behind it, on a disk that does not answer."""

    def __init__(self):
        self.is_back, self.texts = threading.Event(), []

    def write(self, text):
        self.is_back.wait(60.0)
        self.texts.append(text)

    def flush(self):
        pass


@pytest.mark.usefixtures("single_process_group")
def test_a_watchdog_does_not_wait_for_its_words(monkeypatch):
    stuck = Stuck()
    monkeypatch.setattr("sys.stderr", stuck)
    with Watchdog(Ranks(0, 1, 0), torch.device("cpu")) as watchdog:
        watchdog._say("slow")
        assert not stuck.texts, "it came back before"
        stuck.is_back.set()
        watchdog._say("quick")
        wait_until(lambda: len(stuck.texts) == 2)

    assert sorted(stuck.texts) == ["warning: [rank 0] quick\n", "warning: [rank 0] slow\n"]


@pytest.mark.usefixtures("single_process_group")
def test_a_watchdog_survives_the_loss_of_its_terminal(monkeypatch):
    class Closed:
        def write(self, _):
            raise BrokenPipeError

    monkeypatch.setattr("sys.stderr", Closed())
    with Watchdog(Ranks(0, 1, 0), torch.device("cpu")) as watchdog:
        watchdog._say("unheard")
        assert watchdog._thread.is_alive()
