"""Requests to stop, by real signals and a real timer."""

import os
import signal
import time

import pytest

from dsmim.health.interrupt import SIGNALS, Interrupt
from tests.conftest import patience


@pytest.fixture
def interrupt():
    """An Interrupt that listens. The signal handlers from before are restored afterwards."""
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGALRM)}
    interrupt = Interrupt()
    interrupt.listen()
    yield interrupt
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in before.items():
        signal.signal(number, handler)


def blocked():
    """An iterator whose next element comes late."""
    time.sleep(60)
    yield "late"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_sets_the_reason_and_the_first_is_remembered(interrupt, number):
    assert interrupt.fetch(iter(["batch"])) == "batch" and interrupt.reason is None
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert interrupt.reason == number.name
    assert interrupt.fetch(iter(["batch"])) is None  # asked before, so it does not wait


def test_a_signal_ends_waiting_for_data(interrupt):
    begun = time.monotonic()
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGUSR2))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    assert interrupt.fetch(blocked()) is None
    assert 0.2 < time.monotonic() - begun < patience(10) and interrupt.reason == "SIGUSR2"
    os.kill(os.getpid(), signal.SIGTERM)  # a second one raises nothing: it would interrupt the saving


def test_a_job_that_ends_soon_stops_halfway(interrupt):
    begun, left = time.monotonic(), patience(1)
    interrupt.stop_before(time.time() + left, minutes=5)
    assert interrupt.fetch(blocked()) is None
    assert 0.4 * left < time.monotonic() - begun < 0.95 * left and interrupt.reason.startswith("the job ends at")


def test_a_job_stops_so_many_minutes_before_its_end(interrupt):
    interrupt.stop_before(time.time() + 60, minutes=0.9 + 1e-3)
    left, _ = signal.getitimer(signal.ITIMER_REAL)
    assert 30 - patience(1) < left <= 30  # half of what is left; 54 s before the end would be in 6 s
    interrupt.stop_before(time.time() + 3600, minutes=5)
    left, _ = signal.getitimer(signal.ITIMER_REAL)
    assert 3300 - patience(10) < left <= 3300
    signal.setitimer(signal.ITIMER_REAL, 0)
    for end, minutes in ((None, 5), (time.time() + 10, 0)):
        interrupt.stop_before(end, minutes)
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_job_past_its_end_stops_at_once(interrupt):
    interrupt.stop_before(time.time() - 5, minutes=1)
    assert interrupt.fetch(blocked()) is None and interrupt.reason is not None
