"""Requests to stop, by real signals and a real timer."""

import os
import signal
import time

import pytest

from dsmim.health.interrupt import SIGNALS, Interrupt


@pytest.fixture
def interrupt():
    """One that listens; what listened before does so again afterwards."""
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGALRM)}
    interrupt = Interrupt()
    interrupt.listen()
    yield interrupt
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in before.items():
        signal.signal(number, handler)


def blocked():
    """An iterator whose next element does not come."""
    time.sleep(60)
    yield "late"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_raises_a_flag_and_the_first_is_remembered(interrupt, number):
    assert interrupt.fetch(iter(["batch"])) == "batch" and interrupt.reason is None
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert interrupt.reason == number.name
    assert interrupt.fetch(iter(["batch"])) is None  # asked before: not even waited for


def test_a_signal_ends_waiting_for_data(interrupt):
    begun = time.monotonic()
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGUSR2))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    assert interrupt.fetch(blocked()) is None
    assert 0.2 < time.monotonic() - begun < 10 and interrupt.reason == "SIGUSR2"
    os.kill(os.getpid(), signal.SIGTERM)  # a second one raises nothing: it would cut short the saving


def test_the_end_of_the_job_is_met_half_way_when_it_is_near(interrupt):
    begun = time.monotonic()
    interrupt.stop_before(time.time() + 1.0, minutes=5)
    assert interrupt.fetch(blocked()) is None
    assert 0.4 < time.monotonic() - begun < 0.95 and interrupt.reason.startswith("the job ends at")


def test_the_end_of_the_job_is_met_so_many_minutes_before(interrupt):
    interrupt.stop_before(time.time() + 60, minutes=0.9 + 1e-3)
    left, _ = signal.getitimer(signal.ITIMER_REAL)
    assert 29 < left <= 30  # half of what is left: 54 s of margin would leave less
    interrupt.stop_before(time.time() + 3600, minutes=5)
    left, _ = signal.getitimer(signal.ITIMER_REAL)
    assert 3290 < left <= 3300
    signal.setitimer(signal.ITIMER_REAL, 0)
    for end, minutes in ((None, 5), (time.time() + 10, 0)):
        interrupt.stop_before(end, minutes)
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_job_past_its_end_stops_at_once(interrupt):
    interrupt.stop_before(time.time() - 5, minutes=1)
    time.sleep(0.05)
    assert interrupt.reason is not None
