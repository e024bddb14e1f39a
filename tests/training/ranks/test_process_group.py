"""Ranks share the cores of a node, and stop at the same step."""

import os
import signal

import pytest
import torch

from data_tools.process.signals import STOP_SIGNALS
from training.ranks.process_group import Ranks, share_cores
from training.ranks.stop_signal import StopSignal


def test_cores_are_shared_unless_the_user_said():
    before = torch.get_num_threads()
    try:
        share_cores(Ranks(0, 1_000_000, 0), {})
        assert torch.get_num_threads() == 1
        torch.set_num_threads(2)
        share_cores(Ranks(0, 2, 0, local_size=1_000_000), {"OMP_NUM_THREADS": "2"})
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def no_signal_is_ignored():
    """Whatever the tests were started by."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("no_signal_is_ignored")
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_kept_until_a_step_boundary_asks(single_process_group, number):
    handler = signal.getsignal(number)
    stop = StopSignal(torch.device("cpu"))
    try:
        stop.post()
        os.kill(os.getpid(), number)
        assert stop.read() == 0, "what was posted before the signal"
        stop.post()
        assert stop.read() == number
    finally:
        stop.restore()
    assert signal.getsignal(number) is handler


@pytest.mark.usefixtures("no_signal_is_ignored")
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_that_was_ignored_from_the_start_stays_ignored(single_process_group, number):
    signal.signal(number, signal.SIG_IGN)  # as nohup does with SIGHUP
    stop = StopSignal(torch.device("cpu"))
    try:
        os.kill(os.getpid(), number)
        stop.post()
        assert stop.read() == 0
    finally:
        stop.restore()
