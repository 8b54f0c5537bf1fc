"""The watchdog in a lone process: it ends a stuck process and spares one that was stopped."""

import os
import signal
import time

import pytest

from tests.conftest import patience
from tests.health.rank_worker import ALONE, watched_main
from tests.health.test_monitor import PROCESSES


@pytest.mark.parametrize("what", ["stuck", "stopped"])
def test_the_watchdog_ends_a_stuck_process_and_spares_a_stopped_one(tmp_path, what):
    process = PROCESSES.Process(target=watched_main, args=(tmp_path, what))
    process.start()
    try:
        if what == "stopped":
            while not (tmp_path / "err").exists():
                assert process.is_alive()
                time.sleep(0.02)
            time.sleep(0.4)
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(2 * ALONE)
            os.kill(process.pid, signal.SIGCONT)
        process.join(patience(30))
        printed = (tmp_path / "err").read_text()
        assert process.exitcode == (70 if what == "stuck" else 0), printed
    finally:
        process.kill()
    if what == "stuck":
        assert "no progress for" in printed and "at: waiting for data, step 7; the process ends now" in printed
        assert "most recent call first" in printed and "in watched_main" in printed
