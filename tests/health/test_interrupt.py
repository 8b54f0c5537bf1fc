"""Requests to stop, by real signals and a real timer."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import DataLoader

from dsmim.data.loader import _prepare_worker, end_workers
from dsmim.health.interrupt import SIGNALS, Interrupt, _StopWaiting
from dsmim.shards.forking import ForkContext
from tests.conftest import ROOT, environment, patience


@pytest.fixture
def interrupt():
    """An Interrupt that listens. The signal handlers from before are restored afterwards."""
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGALRM, signal.SIGINT)}
    interrupt = Interrupt()
    interrupt.listen()
    yield interrupt
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.set_wakeup_fd(-1)
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


def in_thread(body):
    """Call body in a thread; return what it returns, or raise what it raises."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(body).result(patience(60))


def timers():
    return [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


def test_in_a_thread_the_reason_is_set_and_waiting_is_not_interrupted():
    def body():
        with Interrupt() as interrupt:
            interrupt.stop_before(time.time() + 0.4, minutes=5)
            assert [timer.daemon for timer in timers()] == [True]
            got = interrupt.fetch(late_batch(interrupt))
            return got, interrupt.fetch(iter(["batch"])), interrupt.reason

    got, following, reason = in_thread(body)
    assert (got, following) == ("late", None) and reason.startswith("the job ends at")


def late_batch(interrupt):
    """An iterator whose element comes after the request to stop."""
    deadline = time.monotonic() + patience(30)
    while interrupt.reason is None and time.monotonic() < deadline:
        time.sleep(0.01)
    yield "late"


def test_in_a_thread_the_timer_is_cancelled_at_the_end():
    def body():
        with Interrupt() as interrupt:
            interrupt.stop_before(time.time() + 3600, minutes=5)
            (timer,) = timers()
        timer.join(patience(30))
        return timer.is_alive(), interrupt.reason

    assert in_thread(body) == (False, None)


def test_the_alarm_is_cancelled_and_the_handler_from_before_restored(interrupt):
    def mine(*_):
        raise AssertionError

    for before in (mine, signal.SIG_DFL, signal.SIG_IGN):
        signal.signal(signal.SIGALRM, before)
        with interrupt:
            interrupt.stop_before(time.time() + 3600, minutes=5)
            interrupt.stop_before(time.time() + 7200, minutes=5)
            assert signal.getitimer(signal.ITIMER_REAL)[0] > 3600 and signal.getsignal(signal.SIGALRM) is not before
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0) and signal.getsignal(signal.SIGALRM) is before
    signal.signal(signal.SIGALRM, mine)
    with interrupt:
        interrupt.stop_before(None, minutes=5)
    assert signal.getsignal(signal.SIGALRM) is mine


IN_A_COLLECTIVE = """
import ctypes, signal, sys
from dsmim.health.interrupt import Interrupt

if "ignored" in sys.argv:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
interrupt = Interrupt()
interrupt.listen()
print("ready", flush=True)
lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
lock(mutex)
lock(mutex)  # never returns to Python, which would call the handlers of signals
"""


def start_waiting(*words: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", IN_A_COLLECTIVE, *words], env=environment(), cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_second_ctrl_c_leaves_at_once_even_from_a_collective():
    with start_waiting() as process:
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "Ctrl-C: saving; press Ctrl-C again to leave at once\n"
        process.send_signal(signal.SIGINT)  # of torchrun, at the same moment
        time.sleep(2)
        assert process.poll() is None
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(patience(10)) == 130 and time.monotonic() - begun < patience(5)


def test_an_ignored_ctrl_c_stays_ignored():
    """As of a command that a shell has started in the background."""
    with start_waiting("ignored") as process:
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.kill()
        assert process.stderr.read() == ""


def test_ctrl_c_is_a_request_and_fit_without_the_command_line_keeps_keyboard_interrupt(interrupt):
    os.kill(os.getpid(), signal.SIGINT)
    assert interrupt.reason == "Ctrl-C" and interrupt.fetch(iter(["batch"])) is None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Interrupt() as other, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        other.fetch(blocked())


def test_breaking_off_in_the_middle_of_a_batch_prints_nothing(monkeypatch, capfd):
    """A signal may come while the rank takes a tensor from a worker: the worker's connection is then reset."""
    loader = DataLoader(
        torch.zeros(64, 1000), num_workers=1, multiprocessing_context=ForkContext(), worker_init_fn=_prepare_worker
    )
    batches = iter(loader)

    def interrupted(*_):
        raise _StopWaiting

    monkeypatch.setattr("multiprocessing.connection.answer_challenge", interrupted)
    with pytest.raises(_StopWaiting):
        next(batches)
    time.sleep(patience(0.5))  # for the worker to see it
    end_workers(batches)
    assert capfd.readouterr().err == ""
