"""The heartbeat's thread."""

import time

from dsmim.cluster.placement import detect
from dsmim.health.heartbeat import Heartbeat
from dsmim.health.monitor import RankMonitor
from dsmim.health.status import Progress
from tests.conftest import patience

ALONE = detect({})


def test_an_error_in_every_beat_does_not_stop_the_heartbeat(capsys):
    calls = []

    def fail() -> None:
        calls.append(1)
        raise OSError("no such process")

    beat = Heartbeat(ALONE, Progress(), fail, interval=0.04)
    deadline = time.monotonic() + patience(30)
    while not calls:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.4)  # ten beats more
    assert beat.alive
    beat.close()
    while beat.alive:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(calls) == 1
    assert capsys.readouterr().err == "rank 0: OSError: no such process; not tried again\n"


def test_a_lone_process_misses_nobody():
    monitor = RankMonitor(ALONE, 60)
    assert monitor.diagnose() == "there is no other rank" and not monitor.peer_failed
    monitor.close()
